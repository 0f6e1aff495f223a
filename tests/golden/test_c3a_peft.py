"""C³A against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    reshaped,
)

peft = pytest.importorskip("peft")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.kernel, layer.c3a_kernel["default"])]


@pytest.mark.parametrize(("place", "block"), [("linear", 4), ("linear", 2), ("linear", 1)])
def test_c3a_trains_and_merges_as_in_peft(place: str, block: int) -> None:
    """In float32, to which peft converts."""
    method = trimtab.C3A(block_size=block, targets=place)
    config = peft.C3AConfig(block_size=block, target_modules=[place])
    beside = beside_peft(method, config, (place,), pairs_at, torch.float32)
    assert beside.adapter.trainable_count == 12 * 8 // block
    assert_trains_and_merges_as_in_peft(beside, (place,), 2e-6, spread=1.0)


@pytest.mark.parametrize(
    ("initial", "theirs"),
    [("xavier", "xavier_uniform"), ("kaiming", "kaiming_uniform"), ("gaussian", "gaussian"), ("zero", True)],
)
def test_the_start_is_drawn_as_in_peft(
    initial: Literal["xavier", "kaiming", "gaussian", "zero"], theirs: str | bool
) -> None:
    ours, bare = nn.Sequential(nn.Linear(640, 384)), nn.Sequential(nn.Linear(640, 384))
    adapter = trimtab.attach(ours, trimtab.C3A(block_size=32, initial=initial, targets="0"))
    wrapped = peft.get_peft_model(bare, peft.C3AConfig(block_size=32, init_weights=theirs, target_modules=["0"]))
    (pair,) = pairs_at(leaf_at(adapter, "0"), wrapped.base_model.model[0])
    assert pair.ours.std().item() == pytest.approx(pair.theirs.std().item(), rel=0.05)
    if initial in ("xavier", "kaiming"):
        assert pair.ours.abs().max().item() == pytest.approx(pair.theirs.abs().max().item(), rel=5e-3)


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.C3A(block_size=4, targets="linear"))
