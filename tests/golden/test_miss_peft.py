"""MiSS against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any, Literal

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
    twins,
)

peft = pytest.importorskip("peft")

Variant = Literal["standard", "mini", "bat"]
CASES: list[tuple[str, Variant, int, int]] = [
    ("linear", "standard", 4, 24), ("linear", "standard", 3, 24), ("linear", "standard", 8, 24),
    ("linear", "mini", 3, 24), ("linear", "bat", 4, 48), ("head", "standard", 3, 24),
]  # fmt: skip


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.D, layer.miss_block["default"])]


@pytest.mark.parametrize(("place", "variant", "rank", "_"), CASES)
def test_miss_trains_and_merges_as_in_peft(place: str, variant: Variant, rank: int, _: int) -> None:
    method = trimtab.MiSS(rank=rank, variant=variant, mini_width=4, targets=place)
    config = peft.MissConfig(
        r=rank, mini_r=4, init_weights=True if variant == "standard" else variant, target_modules=[place]
    )
    beside = beside_peft(method, config, (place,), pairs_at)
    outputs = 12 if place == "linear" else 3
    assert (
        beside.adapter.trainable_count == {"standard": rank * outputs, "mini": rank * 4, "bat": outputs * rank}[variant]
    )
    for pair in beside.pairs:
        assert not pair.ours.any()
        assert not pair.theirs.any()
    assert_trains_and_merges_as_in_peft(beside, (place,))


def test_dropout_drops_as_in_peft() -> None:
    """Both draw by torch's dropout on the padded or unpadded input; here nothing is padded."""
    method = trimtab.MiSS(rank=4, dropout=0.4, targets="linear")
    config = peft.MissConfig(r=4, miss_dropout=0.4, target_modules=["linear"])
    beside = beside_peft(method, config, ("linear",), pairs_at)
    with torch.no_grad():
        beside.pairs[0].theirs.normal_()
    beside.pairs[0].copy()
    assert_dropout_draws_as_in_peft(beside)


@pytest.mark.parametrize("variant", ["standard", "mini", "bat"])
def test_gradients_are_those_of_differences(variant: Variant) -> None:
    assert_gradients_are_those_of_differences(trimtab.MiSS(rank=4, variant=variant, mini_width=3, targets="linear"))


def test_sizes_that_do_not_fit_are_refused() -> None:
    for method in (
        trimtab.MiSS(rank=9, targets="linear"),
        trimtab.MiSS(rank=3, variant="bat", targets="linear"),
        trimtab.MiSS(rank=4, variant="mini", mini_width=5, targets="linear"),
    ):
        with pytest.raises(trimtab.SettingError, match="does not fit 'linear:weight' of shape 12×8"):
            twins(method)
