"""Invariants of weights: the fast path against the reference, merging, averaging."""

from __future__ import annotations

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
    in_double,
    objective,
    optimizer_of,
    require_base_kept,
    require_weight_kind,
    train,
    trained,
)
from trimtab.contract.declarations import creates_bias, would_hold
from trimtab.contract.training import APPROXIMATE
from trimtab.errors import AttachError
from trimtab.guards import base_state_dict
from trimtab.kinds.weight import WeightLeaf, WeightMethod
from trimtab.merge import Edit
from trimtab.method import Method
from trimtab.quantized import dense_weight, is_packed

LINEAR = 0.01
"""The weights of a mean are the mean of the weights if they are this near, as a share of the weights' distance."""


def effective_parameters(adapter: Adapter) -> dict[tuple[str, str], Tensor]:
    """Return W′ (and b′) of every site by (path, parameter), recorded by autograd down to the adapter's parameters."""
    changed: dict[tuple[str, str], Tensor] = {}
    for part in adapter.parts:
        for leaf in part.leaves:
            assert isinstance(leaf, WeightLeaf)
            site, holder = leaf.site, leaf.holder
            stored = holder._parameters[site.parameter]
            assert stored is not None
            value = leaf.stored(leaf.method.weight(leaf, leaf.weight()))
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
    """Put plain tensors in the place of parameters, so that the model itself applies them.

    A quantised linear map makes room for a plain one.
    """
    for (path, name), value in values.items():
        module: Any = model.get_submodule(path)
        if is_packed(module, name):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.register_parameter("bias", module.bias)
            model.set_submodule(path, plain)
            module = plain
        stored = module._parameters[name]
        module._parameters[name] = value if stored is None else value.to(stored.dtype)


def require_plain_products(case: Case) -> None:
    """Leave out bases whose products are not those of their numbers: some round the inputs of a product too."""
    model = case.build()
    packed = {
        (path, name): dense_weight(module, name)
        for path, module in model.named_modules()
        for name in list(module._parameters)
        if is_packed(module, name)
    }
    expected = case.output(model)
    substitute(model, packed)
    if difference(case.output(model), expected) > case.rounding:
        raise NotApplicable("the base's own products are not those of its dequantised weights")


def fast_path_equals_reference(method: Method, case: Case) -> None:
    """Output and gradients beside the base equal those of the plain model with W′ (and b′) as its weights."""
    if capabilities_of(method).input_dependent:
        if would_hold(fast_path_equals_reference, method, case, input_dependent=False):
            raise ContractViolation("input_dependent=True, but the output is that of one W′ for every input")
        if not all(isinstance(part, WeightMethod) for part in method.parts()):
            raise ContractViolation("input_dependent=True says that W′ depends on the input, but no W′ is declared")
        raise NotApplicable("input_dependent=True: there is no single W′")
    require_weight_kind(method)
    require_plain_products(case)
    case, dtype = in_double(case)
    adapter = attach(
        case.build(), case.method(method), dtype=dtype, base_mode="eval", calibration=case.calibration(method)
    )
    train(case, adapter, optimizer_of(adapter), 3)
    fast = case.forward(adapter.model)
    fast_gradients = gradients(adapter, objective(fast))
    plain = case.build()
    with adapter.disabled():
        substitute(plain, effective_parameters(adapter))
    reference = case.forward(plain)
    near = ROUNDING if dtype is torch.float64 else case.derived
    expect_near("fast path against W′ in the plain model", fast.detach(), reference.detach(), near)
    expect_near_gradients("fast path against W′", fast_gradients, gradients(adapter, objective(reference)), 10.0 * near)


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
    created = bool(receipt.created) or creates_bias(method, case)
    if created and not declared.creates_bias:
        where = repr(receipt.created[0]) if receipt.created else "one where maps have none"
        raise ContractViolation(f"creates_bias=False, but merging created {where}")
    if declared.creates_bias and created is False:
        raise ContractViolation("creates_bias=True, but merging creates none where maps have none")
    right = apart <= case.derived if declared.merge == "exact" else case.derived < apart <= APPROXIMATE
    if not right:
        raise ContractViolation(
            f"merge={declared.merge!r}, but the merged output is {apart:.2g} of the largest output away from the "
            f"attached one (exact: at most {case.derived:.0e}, approximate: more, and at most {APPROXIMATE})"
        )


def _refuses_to_merge(method: Method, case: Case, reason: str) -> None:
    if capabilities_of(method).creates_bias:
        raise ContractViolation("creates_bias=True, but merge='none' creates nothing")
    if not reason:
        raise ContractViolation("merge='none' without a merge_reason")
    adapter = trained(case, method)
    beside = case.output(adapter.model)
    try:
        adapter.merge(untie=True)
    except AttachError as error:
        if not any(part.promises().merge_reason in str(error) for part in method.parts()):
            raise ContractViolation(f"the refusal to merge does not give the reason: {error}") from error
    else:
        raise ContractViolation("merge='none', but merging went through")
    edits = _edits(adapter)
    if not edits:
        return
    with adapter.disabled():
        substitute(adapter.model, {(edit.path, edit.parameter): edit.value for edit in edits})
        apart = difference(case.output(adapter.model), beside)
    if apart <= case.derived:
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
    """The mean of two adapters of one seed changes weights (or what leaves act on) by the mean of the two changes,
    exactly if linear_in_parameters says so."""
    declared = capabilities_of(method)
    one, two, middle = trained(case, method), trained(case, method), attached(case, method)
    for number, adapter in enumerate((one, two)):
        _scatter(adapter, number)
    with torch.no_grad():
        tensors = zip(middle.named_tensors(), one.named_tensors(), two.named_tensors(), strict=True)
        for (name, target, spec), (_, first, _), (_, second, _) in tensors:
            if not spec.trainable and spec.stored != "training":
                expect_same(f"the frozen {name!r} of two adapters of one seed", first, second)
            target.copy_((first + second) / 2 if spec.trainable else first)
        weights = all(isinstance(part, WeightMethod) for part in method.parts()) and not declared.input_dependent
        ones, twos, means = (_effects(adapter, case, middle, weights) for adapter in (one, two, middle))
        apart = max(
            float((means[place] - (ones[place] + twos[place]) / 2).abs().max()) / _distance(ones[place], twos[place])
            for place in means
        )
    linear = apart <= LINEAR
    if linear != declared.linear_in_parameters:
        raise ContractViolation(
            f"linear_in_parameters={declared.linear_in_parameters}, but the mean of two adapters differs from the mean "
            f"of what they do by {apart:.2g} of the distance between the two"
        )


def _scatter(adapter: Adapter, seed: int) -> None:
    """Move every trained number by about the size of its tensor: near a start that both share, everything is linear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in adapter.named_parameters():
            size = max(float(tensor.square().mean().sqrt()), 0.3) if tensor.numel() else 0.0
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor), alpha=size)


def _effects(adapter: Adapter, case: Case, caller: Adapter, weights: bool) -> dict[Any, Tensor]:
    """What an adapter makes of the base: its weights, or what its leaves return for the calls of `caller`'s."""
    if weights:
        return dict(effective_parameters(adapter))
    calls = calls_of(caller, case)
    return {
        (number, call): leaf(*args)
        for number, (leaf, theirs) in enumerate(zip(own_leaves(adapter), own_leaves(caller), strict=True))
        for call, args in enumerate(calls.get(theirs, ()))
    }


def own_leaves(adapter: Adapter) -> list[Any]:
    """Return the leaves that carry the adapter's sites."""
    return [leaf for part in adapter.parts for leaf in part.leaves]


def calls_of(adapter: Adapter, case: Case) -> dict[nn.Module, list[tuple[Any, ...]]]:
    """What each of the adapter's leaves is called with in one forward."""
    calls: dict[nn.Module, list[tuple[Any, ...]]] = {}
    leaves = own_leaves(adapter)
    hooks = [leaf.register_forward_pre_hook(lambda m, args: calls.setdefault(m, []).append(args)) for leaf in leaves]
    case.forward(adapter.model)
    for hook in hooks:
        hook.remove()
    return calls


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest difference of two weights, not below a hundred times their rounding."""
    return max(float((first - second).abs().max()), 100 * torch.finfo(first.dtype).eps * float(first.abs().max()))
