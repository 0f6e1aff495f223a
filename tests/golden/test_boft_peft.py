"""BOFT against peft (huggingface/peft, run live; several factors against its permutations and blocks)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_starts_as_in_peft,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    randomise,
    reshaped,
)

peft = pytest.importorskip("peft")
layers = pytest.importorskip("peft.tuners.boft.layer")


@pytest.fixture(autouse=True)
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not try to compile peft's CUDA extension."""
    monkeypatch.setattr(layers, "get_fbd_cuda", lambda: None)


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.X, layer.boft_R["default"]), reshaped(leaf.s, layer.boft_s["default"])]


@pytest.mark.parametrize(("place", "block"), [("linear", 4), ("linear", 2), ("plain", 3), ("head", 2)])
def test_boft_trains_and_merges_as_in_peft(place: str, block: int) -> None:
    method = trimtab.BOFT(block_size=block, targets=place)
    config = peft.BOFTConfig(boft_block_size=block, target_modules=[place])
    beside = beside_peft(method, config, (place,), pairs_at, torch.float32)
    assert_starts_as_in_peft(beside)
    assert_trains_and_merges_as_in_peft(beside, (place,), 2e-6)


@pytest.mark.parametrize(("width", "block", "count"), [(16, 4, 3), (16, 2, 4), (24, 6, 3), (8, 4, 2)])
def test_several_factors_are_those_of_peft(width: int, block: int, count: int) -> None:
    """R from peft's permutations and Cayley transforms, multiplied as peft's code does with its extension."""
    model = nn.Sequential(nn.Linear(width, 10)).double()
    base, bias = model[0].weight.detach().clone(), model[0].bias.detach()
    method = trimtab.BOFT(block_size=block, butterfly_factors=count, targets="0")
    adapter = trimtab.attach(model, method, dtype=torch.float64)
    leaf: Any = leaf_at(adapter, "0")
    randomise([leaf.X, leaf.s])
    assert adapter.trainable_count == count * width * block + 10
    layer = peft.get_peft_model(
        nn.Sequential(nn.Linear(width, 10)), peft.BOFTConfig(boft_block_size=block, target_modules=["0"])
    ).base_model.model[0]
    R = torch.eye(width, dtype=torch.float64)
    for i in range(count):
        order = layer.block_butterfly_perm(width, width // block // 2**i, block // 2, count - 1)
        P = layer.perm2mat(order).double()
        skew = 0.5 * (leaf.X[i] - leaf.X[i].mT)
        D = torch.block_diag(*torch.linalg.solve(torch.eye(block) + skew, torch.eye(block) - skew, left=False))
        R = P @ D @ P.T @ R
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(model(x), leaf.s * (x @ R @ base.T) + bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(R @ R.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(leaf.method.weight(leaf, base), leaf.s[:, None] * (base @ R.T), rtol=0, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.BOFT(block_size=4, butterfly_factors=2, targets="linear"))
