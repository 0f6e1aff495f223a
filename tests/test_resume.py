"""Resuming: every method at three cut points, and runs that are killed at random moments, end in the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kills
from method_runs import (
    CUTS,
    METHODS,
    SETTINGS,
    STEPS,
    fit,
    loop_cuts,
    loop_state,
    make_trainer,
    set_up,
    trainer_arguments,
    trainer_cuts,
    trainer_state,
)

QUICK = {"AdaLoRA", "LoRA", "PrefixTuning"}
KILLS = 4


def each_method(quick: set[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", each_method(QUICK))
def test_the_loop_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    assert loop_cuts(name, tmp_path) == {cut: [] for cut in CUTS}


@pytest.mark.parametrize("name", each_method({"AdaLoRA", "LoRA"}))
def test_the_trainer_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    assert trainer_cuts(name, tmp_path) == {cut: [] for cut in CUTS}


def test_the_hashes_see_every_part(tmp_path: Path) -> None:
    """Another seed changes all of them; more steps change the optimizer, the generators and the adapter."""
    fit(set_up("AdaLoRA"), output=tmp_path / "one")
    fit(set_up("AdaLoRA"), replace(SETTINGS, seed=1), output=tmp_path / "two")
    one, two = loop_state(tmp_path / "one"), loop_state(tmp_path / "two")
    assert {part for part in one if one[part] == two[part]} == {"step"}
    args = trainer_arguments(tmp_path / "trainer")
    make_trainer(set_up("AdaLoRA"), args).train()
    first, last = (trainer_state(tmp_path / f"trainer/checkpoint-{step}") for step in (STEPS - 1, STEPS))
    assert {part for part in first if first[part] == last[part]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("program", [kills.COMMAND_LINE, kills.TRAINER], ids=["command line", "trainer"])
def test_runs_killed_at_random_moments_end_in_the_same_bits(program: kills.Program, tmp_path: Path) -> None:
    trials = kills.trials(program, tmp_path, KILLS)
    assert [trial for trial in trials if not trial.holds] == []
    assert sum(len(trial.kills) for trial in trials) >= KILLS
