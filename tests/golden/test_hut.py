"""HUT: the formula with Kronecker products and with indices, finite differences, counts, and that it learns.

There is no official code, and no figure of the paper is known beyond its claims.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, fit, linear, numbers
from test_weight_methods import PLACES


def by_kronecker(leaf: Any, weight: Tensor) -> Tensor:
    """γ·(M_A ⊗ 1)ᵀ ⊙ W ⊙ (1 ⊗ M_B)ᵀ with M = 1 + the stored offset."""
    if weight.dim() > 2:
        parts = [by_kronecker(_Leaf(leaf.A[i], leaf.B[i], leaf.gamma[i]), one) for i, one in enumerate(weight)]
        return torch.stack(parts)
    outputs, inputs = weight.shape
    r = leaf.A.shape[-1]
    left = torch.kron(1 + leaf.A, torch.ones(1, outputs // r, dtype=DOUBLE))  # (in, out)
    right = torch.kron(torch.ones(inputs // r, 1, dtype=DOUBLE), 1 + leaf.B)  # (in, out)
    return (1 + leaf.gamma)[:, None] * (left * weight.t() * right).t()


class _Leaf:
    def __init__(self, A: Tensor, B: Tensor, gamma: Tensor) -> None:
        self.A, self.B, self.gamma = A, B, gamma


def shifted(leaf: Any, bias: Tensor | None) -> Tensor | None:
    if not leaf.site.called:
        return bias
    return leaf.beta.flatten() if bias is None else bias + leaf.beta.flatten()


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("embedding", "groups")])
@pytest.mark.parametrize("rank", [1, 2])
def test_output_and_gradients_are_those_of_the_formula(place: str, rank: int) -> None:
    assert_formula(lambda at: trimtab.HUT(rank=rank, targets=at), by_kronecker, place, bias=shifted)


def test_a_convolution_with_groups_has_factors_of_its_own_for_each_group() -> None:
    assert_formula(lambda at: trimtab.HUT(rank=3, targets=at), by_kronecker, "groups", bias=shifted)


def test_the_formula_by_indices() -> None:
    model = linear(6, 8)
    leaf: Any = trimtab.attach(model, trimtab.HUT(rank=2, targets="0"), dtype=DOUBLE).parts[0].leaves[0]
    with torch.no_grad():
        for phase, tensor in enumerate(leaf.parameters()):
            tensor.copy_(numbers(*tensor.shape, phase=phase))
    weight = leaf.method.weight(leaf, leaf.weight())
    for j in range(6):
        for i in range(8):
            wanted = (1 + leaf.A[i, j // 3]) * (1 + leaf.B[i % 2, j]) * (1 + leaf.gamma[j]) * model[0].weight[j, i]
            torch.testing.assert_close(weight[j, i], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_are_those_of_finite_differences(rank: int) -> None:
    assert_finite_differences(trimtab.HUT(rank=rank, targets="0"))


def test_one_segment_scales_inputs_and_outputs() -> None:
    model, x = linear(6, 4), numbers(5, 4, phase=0.9)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    leaf: Any = trimtab.attach(model, trimtab.HUT(expansion="rank1", targets="0"), dtype=DOUBLE).parts[0].leaves[0]
    with torch.no_grad():
        for phase, tensor in enumerate(leaf.parameters()):
            tensor.copy_(numbers(*tensor.shape, phase=phase))
    scale = (1 + leaf.gamma) * (1 + leaf.B[0])
    expected = scale * ((x * (1 + leaf.A[:, 0])) @ weight.t()) + leaf.beta + bias
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_zeros_stay_zero_and_the_rank_of_the_change_is_full() -> None:
    model = linear(8, 8)
    with torch.no_grad():
        model[0].weight[2] = 0.0
    adapter = trimtab.attach(model, trimtab.HUT(rank=1, scale_shift=False, targets="0"), dtype=DOUBLE)
    leaf: Any = adapter.parts[0].leaves[0]
    with torch.no_grad():
        leaf.A.copy_(numbers(8, 1, phase=0.1))
        leaf.B.copy_(numbers(1, 8, phase=0.2))
    delta = leaf.method.delta(leaf)
    assert torch.equal(delta[2], torch.zeros(8, dtype=DOUBLE))
    assert torch.linalg.matrix_rank(delta) == 7


def test_merging_creates_a_bias_and_unmerging_removes_it() -> None:
    model, x = linear(6, 4, bias=False), numbers(5, 4, phase=0.9)
    adapter = trimtab.attach(model, trimtab.HUT(rank=2, targets="0"), dtype=DOUBLE)
    with torch.no_grad():
        adapter.parts[0].leaves[0].beta.fill_(0.5)
    output = model(x)
    receipt = adapter.merge()
    assert receipt.created == ("0.bias",)
    torch.testing.assert_close(model(x), output)
    adapter.unmerge()
    assert model[0].bias is None


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(trimtab.SettingError, match=r"HUT\(rank=4\): 4 segments do not divide '0:weight' of shape 6×4"):
        trimtab.attach(linear(6, 4), trimtab.HUT(rank=4, targets="0"))
    with pytest.raises(trimtab.TargetError, match="HUT is not defined for the embedding '0'"):
        trimtab.attach(nn.Sequential(nn.Embedding(4, 4)), trimtab.HUT(rank=2, targets="0"))


def test_counts_are_those_of_the_card() -> None:
    config = transformers.RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        model = transformers.RobertaModel(config)
    assert trimtab.plan(model, trimtab.HUT(rank=8, targets="query | value")).trainable == 884_736
    alone = trimtab.HUT(rank=8, expansion="rank1", scale_shift=False, targets="query | value")
    assert trimtab.plan(model, alone).trainable == 48 * 2048


def test_it_learns_a_rescaling_that_lora_of_more_numbers_cannot() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 32, dtype=DOUBLE) / 32**0.5
    u, v = torch.rand(2, 32, dtype=DOUBLE) + 0.5
    target = u[:, None] * weight * v
    start, end = fit(trimtab.HUT(rank=1, scale_shift=False, targets="0"), weight, target, 400)
    _, lora = fit(trimtab.LoRA(rank=4, targets="0"), weight, target, 400)
    assert end < 1e-9
    assert lora > 0.3 * start
