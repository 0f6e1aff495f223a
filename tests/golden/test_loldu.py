"""LoLDU: figures of the authors' code, the formula, finite differences, counts, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor, nn

import trimtab
from golden.weight_checks import assert_finite_differences, assert_formula, fit, linear, numbers, official
from test_weight_methods import PLACES

EVERY_START: tuple[Literal["lu", "uniform", "normal", "constant", "ones", "zeros"], ...] = (
    "lu",
    "uniform",
    "normal",
    "constant",
    "ones",
    "zeros",
)


@pytest.mark.parametrize(
    ("run", "shape", "initial", "at_base"),
    [
        ("loldu_tall", (6, 4), "lu", True),
        ("loldu_wide", (4, 6), "constant", True),
        ("loldu_zeros", (6, 4), "zeros", False),
    ],
)
def test_figures_are_those_of_the_authors_code(run: str, shape: tuple[int, int], initial: Any, at_base: bool) -> None:
    model, theirs = linear(*shape), official(run)
    x = numbers(5, shape[1], phase=0.9)
    base = model(x)
    adapter = trimtab.attach(
        model, trimtab.LoLDU(rank=3, alpha=6.0, initial=initial, compat="official", targets="0"), dtype=torch.float64
    )
    (z,) = adapter.parameters()
    torch.testing.assert_close(z, theirs["z0"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x), theirs["start"], rtol=1e-5, atol=1e-5)
    assert torch.allclose(model(x), base) is at_base
    with torch.no_grad():
        z.add_(numbers(3, phase=2.0))
    output = model(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, theirs["output"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(z.grad, theirs["gradient"], rtol=2e-5, atol=1e-3)


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P·L, diag(D) and U of W = P·L·D·U, the first of each."""
    P, L, U = torch.linalg.lu(weight)
    D = torch.diagonal(U, dim1=-2, dim2=-1)
    return (P @ L)[..., :rank], D[..., :rank], (U / D[..., None])[..., :rank, :]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("train_scale", [False, True])
def test_output_and_gradients_are_those_of_the_formula(place: str, train_scale: bool) -> None:
    rank = 4 if place == "groups" else 3  # of two groups of the convolution, each gets half
    scale = 6.0 / rank

    def formula(leaf: Any, weight: Tensor) -> Tensor:
        L, D, U = factors(weight, leaf.z.shape[-1])
        rest = weight - scale * L @ torch.diag_embed(D) @ U
        return rest + (leaf.scale[..., None] if train_scale else scale) * L @ torch.diag_embed(leaf.z) @ U

    assert_formula(lambda at: trimtab.LoLDU(rank=rank, alpha=6.0, train_scale=train_scale, targets=at), formula, place)


def test_gradients_are_those_of_finite_differences() -> None:
    assert_finite_differences(trimtab.LoLDU(rank=3, train_scale=True, targets="0"))


@pytest.mark.parametrize("initial", EVERY_START)
def test_every_start_is_the_base_and_survives_the_file(initial: Any, tmp_path: Path) -> None:
    model = linear(6, 4)
    x = numbers(5, 4, phase=0.9)
    base = model(x)
    adapter = trimtab.attach(model, trimtab.LoLDU(initial=initial, targets="0"), dtype=torch.float64)
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-14)
    with torch.no_grad():
        next(adapter.parameters()).add_(1.0)
    changed = model(x)
    adapter.save(tmp_path)
    adapter.detach()
    trimtab.load(model, tmp_path)
    assert torch.equal(model(x), changed)
    assert (changed - base).abs().max() > 0.1


def test_the_decomposition_is_exact_also_where_a_pivot_is_zero() -> None:
    model = nn.Sequential(nn.Linear(5, 5)).double()
    with torch.no_grad():
        model[0].weight.copy_(numbers(5, 3, phase=0.3) @ numbers(3, 5, phase=0.4))  # rank 3: two pivots are zero
    leaf: Any = trimtab.attach(model, trimtab.LoLDU(targets="0"), dtype=torch.float64).parts[0].leaves[0]
    torch.testing.assert_close(leaf.L @ torch.diag(leaf.z) @ leaf.U, model[0].weight, rtol=0, atol=1e-12)
    assert leaf.U.abs().max() < 1e3


def test_counts_are_those_of_the_card() -> None:
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig())
    plan = trimtab.plan(model, trimtab.LoLDU(rank=768, targets="query | value"))
    assert plan.trainable == 24 * 768 == 18_432
    assert trimtab.plan(model, trimtab.LoLDU(rank=16, train_scale=True, targets="query | value")).trainable == 24 * 17


def test_it_learns_what_lora_of_more_numbers_cannot() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 32, dtype=torch.float64) / 32**0.5
    L, D, U = factors(weight, 32)
    target = L @ torch.diag(D * (1.0 + 0.5 * torch.randn(32, dtype=torch.float64))) @ U
    start, end = fit(trimtab.LoLDU(targets="0"), weight, target, 400)
    _, lora = fit(trimtab.LoRA(rank=4, targets="0"), weight, target, 400)
    assert end < 1e-9
    assert lora > 0.05 * start
