"""PEGO: figures of the authors' code, the dense penalty, finite differences, counts, and what the penalty does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, numbers, official
from test_weight_methods import PLACES, perturb


def test_outputs_and_penalty_are_those_of_the_authors_code() -> None:
    """Their fused projection trains its query and value parts: two linear maps here."""
    theirs, weight, bias = official("pego"), numbers(18, 6, phase=0.3), numbers(18, phase=1.3)
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in "qkv"}).double()
    with torch.no_grad():
        for name, rows, shift in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            model[name].weight.copy_(rows)
            model[name].bias.copy_(shift)
    method = trimtab.PEGO(groups=3, rank=2, orthogonality=0.7, targets="q | v")
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    leaves: list[Any] = adapter.parts[0].leaves
    with torch.no_grad():
        for leaf, phase in zip(leaves, (0.1, 0.4), strict=True):
            leaf.A.copy_(torch.cat([numbers(2, 6, phase=phase + i) for i in range(3)]))
            leaf.B.copy_(torch.cat([numbers(6, 2, phase=phase + 0.1 + i) for i in range(3)], dim=1))
    x = numbers(2, 3, 6, phase=0.9)
    output = torch.cat([model[name](x) for name in "qkv"], dim=-1)
    torch.testing.assert_close(output, theirs["output"], rtol=1e-8, atol=1e-8)
    penalty = method.penalty(adapter.parts[0])
    assert penalty is not None
    torch.testing.assert_close(penalty, theirs["penalty"], rtol=1e-9, atol=0)
    penalty.backward()
    for leaf, name in zip(leaves, "qv", strict=True):
        torch.testing.assert_close(leaf.A.grad, theirs[f"A_{name}"], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(leaf.B.grad, theirs[f"B_{name}"], rtol=1e-8, atol=1e-8)


def dense_penalty(leaf: Any, weight: Tensor, groups: int) -> Tensor:
    updates = [b @ a for a, b in zip(leaf.A.chunk(groups, dim=-2), leaf.B.chunk(groups, dim=-1), strict=True)]
    preserve = sum((weight @ update.mT).abs().sum() for update in updates)
    return preserve + sum((a @ b.mT).abs().sum() for i, a in enumerate(updates) for b in updates[:i])


@pytest.mark.parametrize("place", [place for place in PLACES if place != "groups"])
def test_output_gradients_and_penalty_are_those_of_the_formula(place: str) -> None:
    seen: list[tuple[Any, Tensor]] = []

    def formula(leaf: Any, weight: Tensor) -> Tensor:
        seen.append((leaf, weight))
        products = zip(leaf.A.chunk(3, dim=-2), leaf.B.chunk(3, dim=-1), strict=True)
        return weight + sum(b @ a for a, b in products)

    assert_formula(lambda at: trimtab.PEGO(groups=3, rank=2, targets=at), formula, place)
    ((leaf, weight),) = seen
    cheap = trimtab.PEGO(groups=3, rank=2)._overlap(leaf)
    torch.testing.assert_close(cheap, dense_penalty(leaf, weight, 3), rtol=1e-6, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    assert_finite_differences(trimtab.PEGO(groups=2, rank=2, targets="0"))


def test_the_penalty_starts_at_zero_and_leaves_the_base_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    method = trimtab.PEGO(groups=2, rank=2, targets="0 | 1")
    adapter = trimtab.attach(model, method)
    penalty = adapter.penalty()
    assert penalty is not None
    penalty.backward()
    assert float(penalty.detach()) == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    perturb(adapter)
    total, mean = method.penalty(adapter.parts[0]), trimtab.PEGO(groups=2, rank=2, reduction="mean").penalty
    first, second = (method._overlap(leaf) for leaf in adapter.parts[0].leaves)
    torch.testing.assert_close(total, 1e-3 * (first + second))
    torch.testing.assert_close(mean(adapter.parts[0]), 1e-3 * (first / 64 + second / 36) / 2)
    assert trimtab.PEGO(orthogonality=0.0).penalty(adapter.parts[0]) is None


def test_counts_are_those_of_the_card() -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig())
    for groups, count in ((4, 589_824), (2, 294_912)):
        plan = trimtab.plan(model, trimtab.PEGO(groups=groups, rank=4, targets="query | value"))
        assert plan.trainable == count


def test_the_penalty_trades_fit_for_orthogonality() -> None:
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(16, 16))
    weight = U @ torch.diag(torch.cat([torch.ones(8), 1e-3 * torch.ones(8)])) @ Vh
    wanted = weight + 0.3 * torch.randn(16, 8) @ torch.randn(8, 16) / 4

    def trained(strength: float) -> tuple[float, float, float]:
        model = nn.Sequential(nn.Linear(16, 16, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight)
        adapter = trimtab.attach(model, trimtab.PEGO(groups=4, rank=2, orthogonality=strength, targets="0"))
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
        adapter.bind(optimizer, total_steps=300)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.eye(16)), wanted.t())
            loss.backward()
            optimizer.step()
        leaf: Any = adapter.parts[0].leaves[0]
        with torch.no_grad():
            updates = [b @ a for a, b in zip(leaf.A.chunk(4), leaf.B.chunk(4, dim=1), strict=True)]
            delta = sum(updates, torch.zeros(16, 16))
            preserved = (weight @ delta.t()).norm() / (weight.norm() * delta.norm())
            pairs = [(a @ b.t()).norm() / (a.norm() * b.norm()) for i, a in enumerate(updates) for b in updates[:i]]
        return float(preserved), float(torch.stack(pairs).mean()), float(loss.detach())

    without, weak, strong = (trained(strength) for strength in (0.0, 1e-3, 3e-3))
    assert without[0] > weak[0] > strong[0]
    assert without[1] > 10 * max(weak[1], strong[1])  # both near zero: which is nearer is rounding
    assert without[2] < weak[2] < strong[2]
