"""SoKA: the formula with dense Kronecker products, LoKr of huggingface/peft, finite differences, ranks, learning.

There is no official code; the paper prints no figure that fixes the configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, fit, linear, numbers
from test_weight_methods import PLACES
from trimtab.kinds.kronecker import kronecker_sum, kronecker_svd, rearranged
from trimtab.kinds.rebuilt import linear_with_rebuilt_weight
from trimtab.kinds.spectrum import terms_before_elbow, terms_for_energy


def terms(sigma: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Σ_k σ_k·kron(U_k, V_k), each product written out."""
    if sigma.dim() > 1:
        return torch.stack([terms(*one) for one in zip(sigma, U, V, strict=True)])
    return sum((s * torch.kron(u, v) for s, u, v in zip(sigma, U, V, strict=True)), torch.zeros(1, dtype=DOUBLE))


def changed(leaf: Any, weight: Tensor) -> Tensor:
    start = terms(leaf.start_sigma, leaf.start_U, leaf.start_V)
    return weight - start + terms(leaf.sigma, leaf.U, leaf.V)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("embedding", "groups")])
@pytest.mark.parametrize("rearrange", ["van_loan", "none"])
def test_output_and_gradients_are_those_of_the_formula(place: str, rearrange: Any) -> None:
    split = {"in_factor": 2, "out_factor": 2} if rearrange == "none" else {}
    assert_formula(lambda at: trimtab.SoKA(terms=3, rearrange=rearrange, targets=at, **split), changed, place)


def test_gradients_are_those_of_finite_differences() -> None:
    assert_finite_differences(trimtab.SoKA(terms=2, targets="0"))


def test_the_function_that_rebuilds_its_weight_has_right_gradients_and_keeps_no_weight() -> None:
    def rebuild(weight: Tensor, scale: Tensor) -> Tensor:
        return weight * scale.exp()

    x, weight = numbers(2, 3, 5, phase=0.1).requires_grad_(), numbers(4, 5, phase=0.2).requires_grad_()
    bias, scale = numbers(4, phase=0.3).requires_grad_(), numbers(4, 1, phase=0.4).requires_grad_()
    call = lambda x, bias, *tensors: linear_with_rebuilt_weight(x, bias, rebuild, *tensors)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, bias, weight, scale))
    assert torch.autograd.gradcheck(call, (x, None, weight.detach(), scale))
    own, kept = {tensor.data_ptr() for tensor in (x, weight, bias, scale)}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x, bias, weight, scale)
    assert kept == []


@pytest.mark.parametrize(("shape", "m", "n"), [((12, 8), 3, 4), ((6, 9), 2, 3), ((2, 8, 8), 2, 4)])
def test_the_decomposition_is_exact_and_best(shape: tuple[int, ...], m: int, n: int) -> None:
    weight = numbers(*shape, phase=0.3)
    count = min(m * n, (shape[-2] // m) * (shape[-1] // n))
    torch.testing.assert_close(kronecker_sum(*kronecker_svd(weight, m, n, count)), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(rearranged(weight, m, n).norm(), weight.norm())
    spectrum = torch.linalg.svdvals(rearranged(weight, m, n))
    left = [(weight - kronecker_sum(*kronecker_svd(weight, m, n, terms))).square().sum() for terms in range(1, count)]
    for terms_kept, error in enumerate(left, 1):
        torch.testing.assert_close(error, spectrum[..., terms_kept:].square().sum())
    assert all(later < earlier for earlier, later in itertools.pairwise(left))


def test_one_term_is_that_of_lokr_in_peft() -> None:
    peft = pytest.importorskip("peft")
    model = linear(6, 8)
    leaf: Any = trimtab.attach(model, trimtab.SoKA(terms=1, targets="0"), dtype=DOUBLE).parts[0].leaves[0]
    config = peft.LoKrConfig(r=64, alpha=64, target_modules=["0"], init_weights=False)
    wrapped = peft.get_peft_model(linear(6, 8), config)
    layer = wrapped.base_model.model.get_submodule("0")
    layer.lokr_w1["default"].data, layer.lokr_w2["default"].data = leaf.U[0].data, leaf.V[0].data
    ours = kronecker_sum(torch.ones(1, dtype=DOUBLE), leaf.U, leaf.V)
    torch.testing.assert_close(ours, layer.get_delta_weight("default"), rtol=0, atol=1e-12)


def test_the_spectrum_chooses_the_terms() -> None:
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(16, 3, dtype=DOUBLE))
    V, _ = torch.linalg.qr(torch.randn(64, 3, dtype=DOUBLE))
    three = kronecker_sum(torch.ones(3, dtype=DOUBLE), U.t().reshape(3, 4, 4), V.t().reshape(3, 8, 8))
    noise = torch.randn(32, 32, dtype=DOUBLE)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).double()
    with torch.no_grad():
        model[0].weight.copy_(three + 0.01 * three.norm() / noise.norm() * noise)
    spectrum = torch.linalg.svdvals(rearranged(model[0].weight.detach(), 4, 4))
    assert (terms_for_energy(spectrum, 0.9), terms_before_elbow(spectrum)) == (3, 3)
    adapter = trimtab.attach(model, trimtab.SoKA(terms=5, energy=0.9, targets="0 | 1"), dtype=DOUBLE)
    first, second = adapter.parts[0].leaves
    assert len(first.sigma) == 3
    assert 1 <= len(second.sigma) <= 5
    assert adapter.trainable_count == (3 + len(second.sigma)) * (4 * 4 + 8 * 8 + 1)
    assert terms_before_elbow(torch.tensor([1.0, 0.1, 0.05, 0.0])) == 1
    assert terms_for_energy(torch.ones(4), 1.0) == 4


def test_only_the_rearranged_terms_approximate_the_weight() -> None:
    weight = numbers(16, 16, phase=0.3)

    def left(rearrange: Any, count: int) -> float:
        model = linear(16, 16)
        method = trimtab.SoKA(terms=count, in_factor=4, out_factor=4, rearrange=rearrange, targets="0")
        leaf: Any = trimtab.attach(model, method, dtype=DOUBLE).parts[0].leaves[0]
        return float((weight - terms(leaf.start_sigma, leaf.start_U, leaf.start_V)).norm() / weight.norm())

    assert 1.0 > left("van_loan", 1) > left("van_loan", 4) > left("van_loan", 16) < 1e-12
    assert left("none", 8) > 1.0


@pytest.mark.parametrize(
    ("method", "shape", "text"),
    [
        (lambda: trimtab.SoKA(targets="0"), (7, 8), "'0:weight' of shape 7×8 has no even split; set both"),
        (lambda: trimtab.SoKA(out_factor=4, in_factor=2, targets="0"), (6, 8), "4 × 2 blocks do not divide '0:weight'"),
        (lambda: trimtab.SoKA(terms=9, targets="0"), (6, 8), r"SoKA\(terms=9\): '0:weight' has only 4 terms"),
    ],
)
def test_what_it_cannot_do_is_refused(method: Callable[[], Any], shape: tuple[int, int], text: str) -> None:
    with pytest.raises(trimtab.SettingError, match=text):
        trimtab.attach(linear(*shape), method())


def test_counts_are_those_of_the_card() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(11008, 4096))
    assert trimtab.plan(model, trimtab.SoKA(terms=1, targets="0")).trainable == 8_193
    assert trimtab.plan(model, trimtab.SoKA(terms=3, targets="1")).trainable == 3 * (64 * 86 + 64 * 128 + 1)


def test_it_learns_its_leading_terms_faster_than_from_zero() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 32, dtype=DOUBLE) / 32**0.5
    leading = kronecker_svd(weight, 4, 4, 2)
    target = weight + 0.5 * kronecker_sum(*leading)
    method = trimtab.SoKA(terms=2, out_factor=4, in_factor=4, targets="0")
    start, after_ten = fit(method, weight, target, 10)
    _, end = fit(method, weight, target, 200)
    assert after_ten < 0.2 * start
    assert end < 1e-4 * start
