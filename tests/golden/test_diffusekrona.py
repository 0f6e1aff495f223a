"""DiffuseKronA: figures of the authors' code, both layouts, finite differences, counts, and that it learns."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, fit, linear, numbers, official
from test_weight_methods import PLACES


def test_updates_are_those_of_the_authors_code() -> None:
    model, theirs, x = linear(8, 6), official("diffusekrona"), numbers(2, 3, 6, phase=0.9)
    base = model(x)
    method = trimtab.DiffuseKronA(out_factor=4, in_factor=3, layout="official", targets="0")
    leaf: Any = trimtab.attach(model, method, dtype=DOUBLE).parts[0].leaves[0]
    with torch.no_grad():
        leaf.A.copy_(numbers(3, 4, phase=0.1).t())  # their `down` is A transposed
        leaf.B.copy_(numbers(2, 2, phase=0.2))
    update = model(x) - base
    torch.testing.assert_close(update, theirs["update"], rtol=1e-8, atol=1e-8)
    update.square().sum().backward()
    torch.testing.assert_close(leaf.A.grad.t(), theirs["down"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(leaf.B.grad, theirs["up"], rtol=1e-8, atol=1e-8)


def kron(leaf: Any, layout: str) -> Tensor:
    """torch's own Kronecker product, and the published index formula of the official order."""
    if leaf.A.dim() > 2:
        return torch.stack([torch.kron(a, b) for a, b in zip(leaf.A, leaf.B, strict=True)])
    product = torch.kron(leaf.A, leaf.B)
    if layout == "paper":
        return product
    (a1, _), (b1, _) = leaf.A.shape, leaf.B.shape
    return torch.stack([product[q * b1 + p] for p in range(b1) for q in range(a1)])


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("embedding", "groups")])
@pytest.mark.parametrize("layout", ["paper", "official"])
def test_output_and_gradients_are_those_of_the_formula(place: str, layout: Literal["paper", "official"]) -> None:
    if place == "experts" and layout == "official":
        pytest.skip("the order of the outputs is tested on one matrix")
    assert_formula(
        lambda at: trimtab.DiffuseKronA(out_factor=2, in_factor=2, scale=1.5, layout=layout, targets=at),
        lambda leaf, weight: weight + 1.5 * kron(leaf, layout),
        place,
    )


def test_a_convolution_with_groups_has_factors_of_its_own_for_each_group() -> None:
    method = trimtab.DiffuseKronA(out_factor=3, in_factor=2, targets="0")
    assert_formula(lambda at: method, lambda leaf, weight: weight + kron(leaf, "paper"), "groups")


@pytest.mark.parametrize("layout", ["paper", "official"])
def test_gradients_are_those_of_finite_differences(layout: Literal["paper", "official"]) -> None:
    method = trimtab.DiffuseKronA(out_factor=3, in_factor=2, layout=layout, targets="0")
    assert_finite_differences(method)


def test_the_rank_is_the_product_of_the_ranks() -> None:
    method = trimtab.DiffuseKronA(out_factor=4, in_factor=2, targets="0")
    leaf: Any = trimtab.attach(linear(12, 8), method, dtype=DOUBLE).parts[0].leaves[0]
    with torch.no_grad():
        leaf.B.copy_(numbers(3, 4, phase=0.2))
    assert torch.linalg.matrix_rank(leaf.method.delta(leaf)) == 2 * 3
    assert (leaf.A.std() - 1 / 4).abs() < 0.15


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(trimtab.TargetError, match="A of 4 × 3 does not divide '0:weight' with 8 outputs and 8 inputs"):
        trimtab.attach(linear(8, 8), trimtab.DiffuseKronA(out_factor=4, in_factor=3, targets="0"))
    with pytest.raises(trimtab.TargetError, match="with 6 outputs and 2 inputs"):
        trimtab.attach(nn.Sequential(nn.Conv2d(2, 6, 3)), trimtab.DiffuseKronA(out_factor=2, in_factor=3, targets="0"))


def unet(widths: dict[int, int], text: int) -> nn.ModuleDict:
    """The projections of a U-Net's attention blocks: `widths` gives the number of blocks of each width."""

    def attention(width: int, source: int) -> nn.ModuleDict:
        shapes = {"to_q": width, "to_k": source, "to_v": source, "to_out": width}
        return nn.ModuleDict({name: nn.Linear(inside, width, bias=name == "to_out") for name, inside in shapes.items()})

    blocks = [width for width, count in widths.items() for _ in range(count)]
    return nn.ModuleDict(
        {
            str(i): nn.ModuleDict({"attn1": attention(width, width), "attn2": attention(width, text)})
            for i, width in enumerate(blocks)
        }
    )


def test_counts_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        sdxl, sd = unet({640: 10, 1280: 60}, 2048), unet({320: 5, 640: 5, 1280: 6}, 768)
    targets = "*.to_q | *.to_k | *.to_v | *.to_out"

    def count(model: nn.Module, method: trimtab.Method) -> int:
        return trimtab.plan(model, method).trainable

    assert count(sdxl, trimtab.DiffuseKronA(out_factor=64, in_factor=4, targets=targets)) == 3_874_560  # 3.8 M
    assert count(sdxl, trimtab.DiffuseKronA(out_factor=64, in_factor=8, targets=targets)) == 2_152_320
    assert count(sdxl, trimtab.LoRA(rank=4, targets=targets)) == 5_806_080  # 5.8 M
    assert count(sd, trimtab.DiffuseKronA(out_factor=64, in_factor=4, targets=targets)) == 398_048


def test_it_learns_a_kronecker_product_that_lora_of_more_numbers_cannot() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 32, dtype=DOUBLE) / 32**0.5
    product = torch.kron(torch.randn(8, 4, dtype=DOUBLE), torch.randn(4, 8, dtype=DOUBLE))
    target = weight + product / product.norm()
    method = trimtab.DiffuseKronA(out_factor=8, in_factor=4, targets="0")
    start, end = fit(method, weight, target, 400)
    _, lora = fit(trimtab.LoRA(rank=4, targets="0"), weight, target, 400)
    assert end < 1e-6 * start
    assert lora > 0.2 * start
