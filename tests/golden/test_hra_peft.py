"""HRA against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    reshaped,
    twins,
)

peft = pytest.importorskip("peft")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.U, layer.hra_u["default"])]


@pytest.mark.parametrize("place", ["linear", "plain"])
@pytest.mark.parametrize("rank", [2, 6])
def test_hra_trains_and_merges_as_in_peft(place: str, rank: int) -> None:
    method = trimtab.HRA(rank=rank, targets=place)
    beside = beside_peft(method, peft.HRAConfig(r=rank, target_modules=[place]), (place,), pairs_at)
    assert beside.adapter.trainable_count == rank * {"linear": 8, "plain": 9}[place]
    assert_trains_and_merges_as_in_peft(beside, (place,), 1e-11)


def test_the_start_is_that_of_peft() -> None:
    """Pairs of equal vectors of the same distribution, and the base."""
    beside = beside_peft(
        trimtab.HRA(rank=8, targets="linear"), peft.HRAConfig(r=8, target_modules=["linear"]), ("linear",), pairs_at
    )
    for tensor in (beside.pairs[0].ours, beside.pairs[0].theirs):
        assert torch.equal(tensor[:, ::2], tensor[:, 1::2])
        assert 0.3 < float(tensor.detach().abs().max()) <= 0.5  # 1/√(r/2)
        assert len(tensor.unique()) == 32


@pytest.mark.parametrize("rank", [2, 8])
def test_the_start_is_the_base(rank: int) -> None:
    model, adapter, bare = twins(trimtab.HRA(rank=rank, targets="linear"))
    leaf = leaf_at(adapter, "linear")
    x = torch.randn(50, 8, dtype=torch.float64)
    torch.testing.assert_close(model.linear(x), bare.linear(x), rtol=0, atol=1e-13)
    assert leaf.U.any()


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.HRA(rank=4, targets="linear"))


def test_an_odd_rank_is_refused() -> None:
    with pytest.raises(trimtab.SettingError, match="take an even rank"):
        twins(trimtab.HRA(rank=3, targets="linear"))
