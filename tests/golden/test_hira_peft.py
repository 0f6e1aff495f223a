"""HiRA against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import (
    Pair,
    assert_dropout_draws_as_in_peft,
    assert_gradients_are_those_of_differences,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    reshaped,
)

peft = pytest.importorskip("peft")

PLACES = ("embedding", "linear", "transposed")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    if leaf.site.path == "embedding":
        return [
            reshaped(leaf.A, layer.hira_embedding_A["default"]), reshaped(leaf.B, layer.hira_embedding_B["default"]),
        ]  # fmt: skip
    return [reshaped(leaf.A, layer.hira_A["default"]), reshaped(leaf.B, layer.hira_B["default"])]


@pytest.mark.parametrize("place", PLACES)
def test_hira_trains_and_merges_as_in_peft(place: str) -> None:
    method = trimtab.HiRA(rank=4, targets=place)
    beside = beside_peft(method, peft.HiraConfig(r=4, target_modules=[place]), (place,), pairs_at)
    zero = 0 if place == "embedding" else 1
    for index, pair in enumerate(beside.pairs):
        assert bool(pair.ours.any()) == bool(pair.theirs.any()) == (index != zero)
    assert_trains_and_merges_as_in_peft(beside, (place,), spread=1.0)


def test_dropout_drops_as_in_peft() -> None:
    method = trimtab.HiRA(rank=4, dropout=0.4, targets="linear")
    config = peft.HiraConfig(r=4, hira_dropout=0.4, target_modules=["linear"])
    beside = beside_peft(method, config, ("linear",), pairs_at)
    for pair in beside.pairs:
        with torch.no_grad():
            pair.theirs.normal_()
        pair.copy()
    assert_dropout_draws_as_in_peft(beside)


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.HiRA(rank=3, targets="linear"))
