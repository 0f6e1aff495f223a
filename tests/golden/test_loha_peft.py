"""LoHa against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

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

PLACES = ("linear", "plain", "head")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    ours = (leaf.B1, leaf.A1, leaf.B2, leaf.A2)
    theirs = (layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b)
    return [reshaped(one, two["default"]) for one, two in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("place", PLACES)
def test_loha_trains_and_merges_as_in_peft(place: str) -> None:
    method = trimtab.LoHa(rank=2, alpha=3, targets=place)
    config = peft.LoHaConfig(r=2, alpha=3, target_modules=[place])
    beside = beside_peft(method, config, (place,), pairs_at)
    assert_trains_and_merges_as_in_peft(beside, (place,), spread=1.0)


def test_the_start_is_drawn_as_in_peft() -> None:
    """Not the same numbers, but the same bounds, and the same zero."""
    ours, theirs = nn.Sequential(nn.Linear(900, 700)), nn.Sequential(nn.Linear(900, 700))
    adapter = trimtab.attach(ours, trimtab.LoHa(rank=9, targets="0"))
    wrapped = peft.get_peft_model(theirs, peft.LoHaConfig(r=9, target_modules=["0"]))
    for pair in pairs_at(leaf_at(adapter, "0"), wrapped.base_model.model[0]):
        assert pair.ours.abs().max().item() == pytest.approx(pair.theirs.abs().max().item(), rel=5e-3)
    assert not leaf_at(adapter, "0").A2.any()


def test_the_start_of_lycoris_is_the_base_too() -> None:
    model = nn.Sequential(nn.Linear(40, 30))
    x = torch.randn(4, 40)
    before = model(x)
    adapter = trimtab.attach(model, trimtab.LoHa(rank=4, initial="normal", targets="0"))
    leaf = leaf_at(adapter, "0")
    assert torch.equal(model(x), before)
    assert not leaf.B2.any()
    assert 0.05 < leaf.B1.std() < 0.15
    assert 0.8 < leaf.A1.std() < 1.2


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.LoHa(rank=2, alpha=3, targets="linear"))
