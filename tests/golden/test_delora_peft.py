"""DeLoRA against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_same_training,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    randomise,
    reshaped,
    twins,
)

peft = pytest.importorskip("peft")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    pairs = [(leaf.A, layer.delora_A), (leaf.B, layer.delora_B), (leaf.strength, layer.delora_lambda)]
    return [reshaped(ours, theirs["default"]) for ours, theirs in pairs]


@pytest.mark.parametrize("place", ["linear", "head"])
def test_delora_trains_and_merges_as_in_peft(place: str) -> None:
    method = trimtab.DeLoRA(rank=3, strength=4.0, targets=place)
    config = peft.DeloraConfig(r=3, delora_lambda=4, target_modules=[place])
    beside = beside_peft(method, config, (place,), pairs_at)
    leaf = leaf_at(beside.adapter, place)
    assert beside.adapter.trainable_count == 3 * (leaf.site.in_features + leaf.site.out_features) + 1
    layer = beside.wrapped.base_model.model.get_submodule(place)
    torch.testing.assert_close(leaf.norm, layer.delora_w_norm["default"], rtol=0, atol=1e-12)
    torch.testing.assert_close(leaf.strength, layer.delora_lambda["default"])
    assert_trains_and_merges_as_in_peft(beside, (place,))


def test_the_first_steps_from_zero_are_those_of_peft() -> None:
    """B = 0, where the norm is held at its least: only A is made equal."""
    method = trimtab.DeLoRA(rank=3, targets="linear")
    beside = beside_peft(method, peft.DeloraConfig(r=3, target_modules=["linear"]), ("linear",), pairs_at)
    randomise([beside.pairs[0].theirs])
    beside.pairs[0].copy()
    assert not beside.pairs[1].ours.any()
    assert_same_training(beside.model, beside.wrapped, beside.pairs, 1e-9)


def test_the_strength_bounds_the_update() -> None:
    _, adapter, _ = twins(trimtab.DeLoRA(rank=4, strength=0.7, targets="linear"))
    leaf = leaf_at(adapter, "linear")
    randomise([leaf.A, leaf.B])
    size = torch.linalg.matrix_norm((leaf.method.delta(leaf) / leaf.norm).detach())
    assert 0.1 < float(size) <= 0.7


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.DeLoRA(rank=2, strength=2.0, targets="linear"))
