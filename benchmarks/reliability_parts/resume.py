"""Resuming: every method at three cut points, and kill -9 at random moments of the command line and the Trainer."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from reliability_parts import Row

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import kills
from method_runs import CUTS, METHODS, STEPS, loop_cuts, trainer_cuts

QUICK_METHODS, QUICK_KILLS, KILLS = ("LoRA", "AdaLoRA"), 3, 100
PARTS = "adapter, optimizer, schedule and generators hash-equal to the unbroken run"


def rows(full: bool) -> list[Row]:
    """Return what resuming gave; `full`: every method, and at least 100 kills during training of each program."""
    names = METHODS if full else QUICK_METHODS
    found = [
        _methods("the training loop", names, loop_cuts),
        _methods("TrimtabTrainer", names, trainer_cuts),
    ]
    return found + [_kills(program, KILLS if full else QUICK_KILLS) for program in (kills.COMMAND_LINE, kills.TRAINER)]


def _methods(where: str, names: Sequence[str], cuts: Callable[[str, Path], dict[int, list[str]]]) -> Row:
    wrong: list[str] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            wrong += [f"{name} after step {cut}: {parts}" for cut, parts in cuts(name, Path(folder)).items() if parts]
    points = ", ".join(map(str, CUTS))
    count = len(names) * len(CUTS)
    told = f"{count - len(wrong)} of {count} runs ({len(names)} methods)" + "".join(f"; {text}" for text in wrong)
    return Row(f"Resume in {where} after step {points} of {STEPS}", PARTS, told, not wrong)


def _kills(program: kills.Program, count: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        trials = kills.trials(program, Path(folder), count)
    early = sum(kill == 0 for trial in trials for kill in trial.kills)
    during = sum(kill > 0 for trial in trials for kill in trial.kills)
    wrong = [trial for trial in trials if not trial.holds]
    told = (
        f"{during} kills during training and {early} before its first checkpoint in {len(trials)} runs, "
        f"{len(trials) - len(wrong)} of them equal"
    )
    told += "".join(f"; killed at {trial.kills}: {trial.differing}" for trial in wrong)
    return Row(
        f"kill -9 at random moments, also while resuming: {program.name}",
        f"at least {count} kills during training; every run ends equal; no checkpoint is lost",
        told,
        not wrong and during >= count,
    )
