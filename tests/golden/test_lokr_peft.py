"""LoKr against peft (huggingface/peft, run live)."""

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
from trimtab.methods.weight.lokr import split_width

peft = pytest.importorskip("peft")
lokr = pytest.importorskip("peft.tuners.lokr.layer")

NAMES = {"W1": "lokr_w1", "B1": "lokr_w1_a", "A1": "lokr_w1_b", "W2": "lokr_w2", "B2": "lokr_w2_a", "A2": "lokr_w2_b"}


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    names = leaf.method.tensors(leaf.site)
    return [reshaped(getattr(leaf, name), getattr(layer, NAMES[name])["default"]) for name in names]


@pytest.mark.parametrize("place", ["linear", "plain", "head"])
@pytest.mark.parametrize("factor", [None, 2, 6])
@pytest.mark.parametrize(
    ("rank", "decompose_both", "zero"), [(1, True, "first"), (1, False, "second"), (3, False, "first")]
)
def test_lokr_trains_and_merges_as_in_peft(
    place: str, factor: int | None, rank: int, decompose_both: bool, zero: Literal["first", "second"]
) -> None:
    method = trimtab.LoKr(rank=rank, alpha=2, factor=factor, decompose_both=decompose_both, zero=zero, targets=place)
    config = peft.LoKrConfig(
        r=rank,
        alpha=2,
        decompose_factor=-1 if factor is None else factor,
        decompose_both=decompose_both,
        init_weights=True if zero == "first" else "lycoris",
        target_modules=[place],
    )
    beside = beside_peft(method, config, (place,), pairs_at)
    for pair in beside.pairs:  # the same factor starts at zero
        assert bool(pair.ours.any()) == bool(pair.theirs.any())
    assert_trains_and_merges_as_in_peft(beside, (place,), spread=1.0)


def test_both_forms_of_both_factors_are_met() -> None:
    """On wide layers; the small ones above hardly ever decompose the first factor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100)).double()
    adapter = trimtab.attach(
        model, trimtab.LoKr(rank=2, alpha=3, decompose_both=True, targets="0"), dtype=torch.float64
    )
    leaf = leaf_at(adapter, "0")
    assert set(leaf.method.tensors(leaf.site)) == {"B1", "A1", "B2", "A2"}
    bare = nn.Sequential(nn.Linear(64, 100)).double()
    config = peft.LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=["0"])
    layer = peft.get_peft_model(bare, config).base_model.model[0]
    for pair in pairs_at(leaf, layer):
        with torch.no_grad():
            pair.theirs.normal_()
        pair.copy()
    torch.testing.assert_close(leaf.method.delta(leaf), layer.get_delta_weight("default"), rtol=0, atol=1e-12)
    assert adapter.trainable_count == 2 * (10 + 8) + 2 * (10 + 8)


def test_widths_split_as_in_peft() -> None:
    for width in range(1, 400):
        for factor in (None, 1, 2, 4, 7, 8, 16, 100):
            theirs = lokr.factorization(width, -1 if factor is None else factor)
            assert split_width(width, factor) == theirs, (width, factor)


def test_gradients_are_those_of_differences() -> None:
    for method in (
        trimtab.LoKr(rank=1, alpha=3, decompose_both=True, targets="linear"),
        trimtab.LoKr(rank=8, targets="linear"),
    ):
        assert_gradients_are_those_of_differences(method)
