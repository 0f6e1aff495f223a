"""Invariants of weights: the fast path against the reference, merging, averaging."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attach import attach
from trimtab.contract.case import (
    ROUNDING,
    Case,
    ContractViolation,
    NotApplicable,
    attached,
    capabilities_of,
    difference,
    expect_near,
    expect_near_gradients,
    expect_same,
    gradients,
    objective,
    optimizer_of,
    require_base_kept,
    require_weight_kind,
    train,
    trained,
)
from trimtab.contract.training import APPROXIMATE
from trimtab.errors import AttachError
from trimtab.hooks import base_state_dict
from trimtab.kinds.weight import WeightLeaf
from trimtab.merge import Edit
from trimtab.method import Method

MERGED = 1e-4
"""An exact merge is off by at most this share of the largest output: the weights are rounded once to float32."""
LINEAR = 0.01
"""The weights of a mean are the mean of the weights if they are this near, as a share of the weights' distance."""


def doubled(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model in double precision."""
    return build().double()


def in_double(case: Case) -> tuple[Case, torch.dtype]:
    """Return the case in double precision, where two ways to compute the same differ visibly less than two formulas.

    A model that cannot compute in it (grouped matrix products of experts) stays as it is.
    """
    double = dataclasses.replace(case.converted(torch.float64), build=partial(doubled, case.build))
    try:
        double.output(double.build())
    except RuntimeError:
        return case, torch.float32
    return double, torch.float64


def effective_parameters(adapter: Adapter) -> dict[tuple[str, str], Tensor]:
    """Return W′ (and b′) of every site by (path, parameter), recorded by autograd down to the adapter's parameters."""
    changed: dict[tuple[str, str], Tensor] = {}
    for part in adapter.parts:
        for leaf in part.leaves:
            assert isinstance(leaf, WeightLeaf)
            site, holder = leaf.site, leaf.holder
            stored = holder._parameters[site.parameter]
            assert stored is not None
            value = site.layout.stored(leaf.method.weight(leaf, leaf.weight()), stored)
            places = _holders(adapter.model, stored) if site.whole else [(site.path, site.parameter)]
            bias = leaf.bias() if site.called else None
            new_bias = leaf.method.bias(leaf, bias) if site.called else None
            values = dict.fromkeys(places, value)
            if new_bias is not None and new_bias is not bias:
                values[site.path, "bias"] = new_bias
            if changed.keys() & values.keys():
                raise NotApplicable("two parts change one weight")
            changed |= values
    return changed


def _holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[str, str]]:
    return [
        (path, name)
        for path, module in model.named_modules()
        for name, other in module._parameters.items()
        if other is parameter
    ]


def substitute(model: nn.Module, values: dict[tuple[str, str], Tensor]) -> None:
    """Put plain tensors in the place of parameters, so that the model itself applies them."""
    for (path, name), value in values.items():
        module = model.get_submodule(path)
        module._parameters[name] = value  # type: ignore[assignment]


def fast_path_equals_reference(method: Method, case: Case) -> None:
    """Output and gradients beside the base equal those of the plain model with W′ (and b′) as its weights."""
    require_weight_kind(method)
    if capabilities_of(method).input_dependent:
        raise NotApplicable("input_dependent=True: there is no single W′")
    case, dtype = in_double(case)
    adapter = attach(case.build(), case.method(method), dtype=dtype, base_mode="eval")
    train(case, adapter, optimizer_of(adapter), 3)
    fast = case.forward(adapter.model)
    fast_gradients = gradients(adapter, objective(fast))
    plain = case.build()
    with adapter.disabled():
        substitute(plain, effective_parameters(adapter))
    reference = case.forward(plain)
    loose = 1.0 if dtype is torch.float64 else 10.0
    expect_near("fast path against W′ in the plain model", fast.detach(), reference.detach(), loose * ROUNDING)
    expect_near_gradients(
        "fast path against W′", fast_gradients, gradients(adapter, objective(reference)), loose * 1e-4
    )


def merges_as_declared(method: Method, case: Case) -> None:
    """The merged output is the attached one (exact), near it (approximate), or merging is refused (none)."""
    declared = capabilities_of(method)
    if declared.merge == "none":
        _refuses_to_merge(method, case, declared.merge_reason)
        return
    if declared.input_dependent:
        raise ContractViolation(f"input_dependent=True cannot be merged, yet merge={declared.merge!r}")
    adapter = trained(case, method)
    beside = case.output(adapter.model)
    receipt = adapter.merge(untie=True)
    apart = difference(case.output(adapter.model), beside)
    if receipt.created and not declared.creates_bias:
        raise ContractViolation(f"creates_bias=False, but merging created {receipt.created[0]!r}")
    right = apart <= MERGED if declared.merge == "exact" else MERGED < apart <= APPROXIMATE
    if not right:
        raise ContractViolation(
            f"merge={declared.merge!r}, but the merged output is {apart:.2g} of the largest output away from the "
            f"attached one (exact: at most {MERGED:.0e}, approximate: more, and at most {APPROXIMATE})"
        )


def _refuses_to_merge(method: Method, case: Case, reason: str) -> None:
    if not reason:
        raise ContractViolation("merge='none' without a merge_reason")
    adapter = trained(case, method)
    beside = case.output(adapter.model)
    try:
        adapter.merge(untie=True)
    except AttachError as error:
        if not any(part.capabilities.merge_reason in str(error) for part in method.parts()):
            raise ContractViolation(f"the refusal to merge does not give the reason: {error}") from error
    else:
        raise ContractViolation("merge='none', but merging went through")
    edits = _edits(adapter)
    if not edits:
        return
    with adapter.disabled():
        substitute(adapter.model, {(edit.path, edit.parameter): edit.value for edit in edits})
        apart = difference(case.output(adapter.model), beside)
    if apart <= MERGED:
        raise ContractViolation(f"merge='none', but folding it into the weights is exact (difference {apart:.2g})")


def _edits(adapter: Adapter) -> list[Edit]:
    """What the adapter would write if it could be merged; empty where a leaf has nothing to write."""
    leaves: list[Any] = adapter.leaves()
    try:
        with torch.no_grad():
            return [edit for leaf in leaves for edit in leaf.edits()]
    except (AttachError, NotImplementedError):
        return []


def unmerge_restores(method: Method, case: Case) -> None:
    """Unmerging gives back every bit of the base and of the attached output; a kept merge stays in the plain model."""
    require_base_kept(method)
    if capabilities_of(method).merge == "none":
        raise NotApplicable("merge='none'")
    adapter = trained(case, method)
    model = adapter.model
    before = {name: tensor.clone() for name, tensor in base_state_dict(model).items()}
    beside = case.output(model)
    adapter.merge(untie=True)
    merged = case.output(model)
    with adapter.disabled():
        expect_same("disabled while merged", case.output(model), case.output(case.build()))
    expect_same("merged again after disabled", case.output(model), merged)
    adapter.unmerge()
    for name, tensor in base_state_dict(model).items():
        expect_same(f"the base's {name!r} after unmerge", tensor, before[name])
    expect_same("the output after unmerge", case.output(model), beside)
    adapter.merge(untie=True)
    adapter.detach(keep_merged=True)
    expect_same("the plain model that keeps the merge", case.output(model), merged)


def averages_as_declared(method: Method, case: Case) -> None:
    """The mean of two adapters' tensors is the mean of their weights exactly if linear_in_parameters says so."""
    require_weight_kind(method)
    declared = capabilities_of(method)
    if declared.input_dependent:
        raise NotApplicable("input_dependent=True: there is no single W′")
    one, two = (trained(case, method, seed=seed, steps=2 + seed) for seed in (0, 1))
    middle = attached(case, method)
    with torch.no_grad():
        for seed, adapter in enumerate((one, two)):
            _move_apart(adapter, seed)
        weights = [effective_parameters(adapter) for adapter in (one, two)]
        tensors = zip(middle.named_tensors(), one.named_tensors(), two.named_tensors(), strict=True)
        for (name, target, spec), (_, first, _), (_, second, _) in tensors:
            if not spec.trainable and not torch.equal(first, second):
                raise NotApplicable(f"the frozen {name!r} differs between adapters")
            target.copy_((first + second) / 2 if spec.trainable else first)
        means = {place: (weights[0][place] + weights[1][place]) / 2 for place in weights[0]}
        apart = max(
            float((value - means[place]).abs().max()) / _distance(weights[0][place], weights[1][place])
            for place, value in effective_parameters(middle).items()
        )
    linear = apart <= LINEAR
    if linear != declared.linear_in_parameters:
        raise ContractViolation(
            f"linear_in_parameters={declared.linear_in_parameters}, but the weights of the mean differ from the mean "
            f"of the weights by {apart:.2g} of the distance between the two"
        )


def _move_apart(adapter: Adapter, seed: int) -> None:
    """Change what the adapter trains by half its own size: near one start, everything smooth looks linear."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.named_parameters():
        size = float(parameter.float().abs().mean()) or 0.1
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=size / 2)


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest difference of two weights, not below a hundred times their rounding."""
    return max(float((first - second).abs().max()), 100 * torch.finfo(first.dtype).eps * float(first.abs().max()))
