"""DyLoRA: the formula at every rank, what a step trains, the draw of ranks, finite differences, and that it learns.

The scale and the slices are those of `dynamic` in the authors' code: with the first b of r rows and columns, each
factor times √(r/b), and the product times alpha/r.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, linear, numbers
from test_weight_methods import PLACES, perturb


def at_rank(leaf: Any, rank: int, alpha: float = 3.0) -> Tensor:
    """The authors' arithmetic."""
    largest = leaf.A.shape[-2]
    factor = math.sqrt(largest / rank)
    return alpha / largest * (leaf.B[..., :rank] * factor) @ (leaf.A[..., :rank, :] * factor)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "groups"])
def test_the_whole_adapter_is_a_lora(place: str) -> None:
    assert_formula(
        lambda at: trimtab.DyLoRA(rank=4, alpha=3.0, targets=at), lambda leaf, w: w + at_rank(leaf, 4), place
    )


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_rank_can_be_used_merged_and_saved(rank: int, tmp_path: Path) -> None:
    model, x = linear(6, 8).eval(), numbers(5, 8, phase=0.9)
    base = model(x)
    adapter = trimtab.attach(model, trimtab.DyLoRA(rank=4, alpha=3.0, targets="0"), dtype=DOUBLE)
    perturb(adapter)
    trimtab.DyLoRA.use_rank(adapter, rank)
    wanted = base + x @ at_rank(adapter.parts[0].leaves[0], rank).t()
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)
    adapter.merge()
    torch.testing.assert_close(model(x), wanted)
    adapter.unmerge()
    adapter.save(tmp_path)
    adapter.detach()
    trimtab.load(model, tmp_path)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    assert_finite_differences(trimtab.DyLoRA(rank=3, targets="0"))


@pytest.mark.parametrize("update", ["all", "last"])
def test_a_step_trains_the_rank_that_was_drawn(update: Any) -> None:
    method = trimtab.DyLoRA(rank=4, alpha=3.0, update=update, targets="0")
    model, x = linear(6, 8).train(), numbers(5, 8, phase=0.9)
    bare = linear(6, 8)
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    perturb(adapter)
    leaf: Any = adapter.parts[0].leaves[0]
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
    adapter.bind(optimizer, total_steps=6)
    for step in range(6):
        rank = method.drawn(step)
        output = model(x)
        torch.testing.assert_close(output, bare(x) + x @ at_rank(leaf, rank).t(), rtol=0, atol=1e-12)
        A, B = (tensor.detach().clone().requires_grad_() for tensor in (leaf.A, leaf.B))
        product = 3.0 / rank * B[:, :rank] @ A[:rank]
        wanted = torch.autograd.grad((bare(x) + x @ product.t()).square().sum(), (A, B))
        optimizer.zero_grad()
        output.square().sum().backward()
        kept = torch.arange(4) == rank - 1 if update == "last" else torch.arange(4) < rank
        torch.testing.assert_close(leaf.A.grad, wanted[0] * kept[:, None], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(leaf.B.grad, wanted[1] * kept, rtol=1e-9, atol=1e-9)
        optimizer.step()


def test_an_adapter_that_is_not_trained_keeps_its_rank_in_training_mode(tmp_path: Path) -> None:
    model, x = linear(6, 8).eval(), numbers(5, 8, phase=0.9)
    adapter = trimtab.attach(model, trimtab.DyLoRA(rank=4, targets="0"), dtype=DOUBLE)
    perturb(adapter)
    output = model(x)
    assert not torch.allclose(model.train()(x), output)
    adapter.save(tmp_path)
    adapter.detach()
    trimtab.load(model, tmp_path)
    assert torch.equal(model.train()(x), output)


def test_ranks_are_drawn_uniformly_and_from_the_step_alone() -> None:
    method = trimtab.DyLoRA(rank=8, lowest=3)
    drawn = [method.drawn(step) for step in range(3000)]
    assert drawn[:50] == [method.drawn(step) for step in range(50)]
    counts = Counter(drawn)
    assert sorted(counts) == [3, 4, 5, 6, 7, 8]
    assert all(abs(count - 500) < 5 * math.sqrt(500) for count in counts.values())


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(trimtab.SettingError, match=r"DyLoRA\(lowest=5\) is larger than rank=4"):
        trimtab.attach(linear(6, 8), trimtab.DyLoRA(rank=4, lowest=5))
    with pytest.raises(trimtab.SettingError, match="cannot cut its ranks over the groups of '0:weight'"):
        trimtab.attach(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), trimtab.DyLoRA(rank=2, targets="0"))
    adapter = trimtab.attach(linear(6, 8), trimtab.DyLoRA(rank=4, lowest=2, targets="0"))
    with pytest.raises(trimtab.AttachError, match=r"merged at the rank chosen for evaluation: call model\.eval"):
        adapter.merge()
    with pytest.raises(trimtab.SettingError, match="rank 1 was not trained by DyLoRA"):
        trimtab.DyLoRA.use_rank(adapter, 1)


def test_its_small_ranks_are_better_than_a_lora_cut_to_them() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16, dtype=DOUBLE) / 4
    target = weight + torch.randn(16, 4, dtype=DOUBLE) @ torch.randn(4, 16, dtype=DOUBLE) / 4

    def trained(method: trimtab.Method) -> tuple[nn.Module, trimtab.Adapter]:
        model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(weight)
        adapter = trimtab.attach(model, method, dtype=DOUBLE)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
        adapter.bind(optimizer, total_steps=800)
        model.train()
        for _ in range(800):
            optimizer.zero_grad()
            F.mse_loss(model(torch.eye(16, dtype=DOUBLE)), target.t()).backward()
            optimizer.step()
        return model.eval(), adapter

    model, adapter = trained(trimtab.DyLoRA(rank=4, targets="0"))
    _, plain = trained(trimtab.LoRA(rank=4, targets="0"))
    leaf: Any = plain.parts[0].leaves[0]
    losses, cuts = [], []
    for rank in (1, 2, 3, 4):
        trimtab.DyLoRA.use_rank(adapter, rank)
        with torch.no_grad():
            losses.append(float(F.mse_loss(model(torch.eye(16, dtype=DOUBLE)), target.t())))
            cut = weight + leaf.B[:, :rank] @ leaf.A[:rank]
            cuts.append(float(F.mse_loss(cut, target)))
    assert losses == sorted(losses, reverse=True)
    assert sum(losses[:3]) < 0.9 * sum(cuts[:3])
