"""Runs that are killed at random moments, and again while they resume, until they end: nothing may be lost or mixed."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distributed_runs
import warm
from method_runs import differing, loop_state, make_trainer, set_up, trainer_arguments, trainer_state
from trimtab.interop.transformers import _missing
from trimtab.training.checkpoints import newest_checkpoint
from trimtab.training.run_folder import state_of

CLI_STEPS, TRAINER_STEPS = 40, 20


@dataclass(frozen=True)
class Program:
    """A run to kill: how it is begun or gone on with in `folder`, where it is, and what it leaves when it has ended.

    `progress` returns the steps of the newest checkpoint and None where the program has not begun to train.
    """

    name: str
    run: Callable[[str, str], None]
    progress: Callable[[Path], int | None]
    state: Callable[[Path], dict[str, str]]


@dataclass(frozen=True)
class Trial:
    """One run that was killed until it ended: the steps saved at each kill, and what of its end differs."""

    kills: tuple[int, ...]
    differing: tuple[str, ...]
    went_back: bool

    @property
    def holds(self) -> bool:
        return not self.differing and not self.went_back


def command_line(inputs: str, folder: str) -> None:
    """`trimtab train`, with --resume where there is a run to go on with."""
    begun = state_of(Path(folder)) != "new"
    options = ["--resume"] if begun else [
        f"{inputs}/model", f"{inputs}/data.csv", "--method", "AdaLoRA", "--set", "dropout=0.1", "--steps",
        str(CLI_STEPS), "--batch-size", "4", "--checkpoint-every", "1", "--evaluate-every", "3",
    ]  # fmt: skip
    distributed_runs.command_line(*options, "--output", folder)


def trainer_script(inputs: str, folder: str) -> None:
    """A script with TrimtabTrainer, which resumes where there is a checkpoint that is complete."""
    trainer = make_trainer(set_up("AdaLoRA"), trainer_arguments(Path(folder), max_steps=TRAINER_STEPS))
    trainer.train(resume_from_checkpoint=_complete(Path(folder)) > 0)


def _complete(folder: Path) -> int:
    found = [path for path in folder.glob("checkpoint-*") if not _missing(path)]
    return max((int(path.name.removeprefix("checkpoint-")) for path in found), default=0)


def _cli_progress(folder: Path) -> int | None:
    newest = newest_checkpoint(folder)
    return None if newest is None else int(newest.name.removeprefix("step-"))


def _cli_state(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "run.json").read_text())
    kept = {name: value for name, value in report["report"].items() if name in ("steps", "final_loss", "metrics")}
    return loop_state(folder) | {"report": json.dumps(kept, sort_keys=True)}


COMMAND_LINE = Program("trimtab train --resume", command_line, _cli_progress, _cli_state)
TRAINER = Program(
    "TrimtabTrainer, resume_from_checkpoint=True", trainer_script, lambda folder: _complete(folder) or None,
    lambda folder: trainer_state(folder / f"checkpoint-{TRAINER_STEPS}"),
)  # fmt: skip


def killed_until_ended(program: Program, inputs: str, expected: dict[str, str], folder: Path, draw: Any) -> Trial:
    """Kill the run at a random moment, and what goes on with it, three times; then let it end, and compare."""
    kills: list[int] = []
    went_back = False
    for _ in range(3):
        process = warm.start(program.run, inputs, str(folder))
        saved = program.progress(folder) or 0
        aim = saved + draw.randint(0, 8)
        if aim == saved:
            process.join(draw.uniform(0.0, 1.5))  # somewhere between its start and the first steps
        else:
            _wait(lambda aim=aim: (program.progress(folder) or 0) >= aim, process)
            process.join(draw.uniform(0.0, 0.03))  # somewhere within a step, or within the writing of a checkpoint
        process.kill()
        process.join(warm.SECONDS)
        if process.exitcode == 0:
            break
        assert process.exitcode == -9, f"{program.name}: ended with {process.exitcode}"
        kills.append(program.progress(folder) or 0)
        went_back |= kills[-1] < saved
    process = warm.start(program.run, inputs, str(folder))
    process.join(warm.SECONDS)
    assert process.exitcode == 0, f"{program.name}: resuming ended with {process.exitcode}"
    different = tuple(differing(program.state(folder), expected))
    shutil.rmtree(folder)
    return Trial(tuple(kills), different, went_back)


def _wait(there: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + warm.SECONDS
    while not there() and process.is_alive():
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.002)


def trials(program: Program, folder: Path, kills: int, seed: int = 0) -> list[Trial]:
    """Return trials with at least `kills` kills during training: after the first checkpoint and before the end."""
    distributed_runs.make_inputs(folder)
    inputs = str(folder)
    process = warm.start(program.run, inputs, str(folder / "unbroken"))
    process.join(warm.SECONDS)
    assert process.exitcode == 0
    expected = program.state(folder / "unbroken")
    draw, done = random.Random(seed), []
    while sum(kill > 0 for trial in done for kill in trial.kills) < kills:
        done.append(killed_until_ended(program, inputs, expected, folder / "killed", draw))
    return done
