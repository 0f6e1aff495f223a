"""The invariant of per-sample gradients: those that differential privacy clips, one for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.adapter import Adapter
from trimtab.contract.case import (
    Case,
    ContractViolation,
    NotApplicable,
    attached,
    capabilities_of,
    expect_near_gradients,
    gradients,
    objective,
    plain_attention,
    trained,
)
from trimtab.method import Method

Rows = dict[str, Tensor]  # by parameter, the gradients of each row: (batch, *shape)
Calls = list[tuple[tuple[Any, ...], Tensor]]  # of one leaf: what it was called with, and its output


def gives_gradients_of_each_row(method: Method, case: Case) -> None:
    """Per-sample gradients equal those of the rows one by one, by every way that is open, exactly if declared.

    One way maps `torch.func.grad` over the rows of the whole model; it is open where the base alone can be mapped. The
    other is that of engines that hook modules: each leaf is differentiated again for each row of what it was called
    with; it is open where every trained tensor lies in a leaf that is called with the rows of the batch.
    """
    declared = capabilities_of(method).per_sample_gradients
    with plain_attention(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be mapped
        adapter = trained(case, method)
        rows = range(len(next(iter(case.inputs.values()))))
        each = [gradients(adapter, objective(case.forward(adapter.model, _row(case.inputs, row)))) for row in rows]
        expected = {name: torch.stack([found[name] for found in each]) for name in each[0]}
        ways: dict[str, Callable[[], Rows]] = {}
        if _base_can_be_mapped(case):
            ways["mapped over the model"] = partial(_by_mapping, adapter, case)
        if (calls := _calls_by_rows(method, case)) is not None:
            ways["mapped over each leaf"] = partial(_by_leaves, *calls)
        if not ways:
            raise NotApplicable("the model cannot be mapped over rows, nor is every leaf called with rows")
        broken = [found for what, way in ways.items() if (found := _difference(what, way, expected, case))]
    if declared and broken:
        raise ContractViolation(f"per_sample_gradients=True, but {broken[0]}")
    if not declared and not broken:
        raise ContractViolation(f"per_sample_gradients=False, but they are right ({', '.join(ways)})")


def _row(inputs: Any, row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in inputs.items()}


def _difference(what: str, way: Callable[[], Rows], expected: Rows, case: Case) -> str | None:
    """What is wrong with the gradients of one way, or None."""
    try:
        expect_near_gradients(what, way(), expected, 10.0 * case.derived)
    except ContractViolation as violation:
        return str(violation)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _loss(model: nn.Module, case: Case, values: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
    single = {name: value.unsqueeze(0) for name, value in row.items()}
    return objective(case.primary(functional_call(model, values, (), single)))


def _base_can_be_mapped(case: Case) -> bool:
    model = case.build().requires_grad_(False)
    try:
        vmap(partial(_loss, model, case, {}))(dict(case.inputs))
    except Exception:  # noqa: BLE001 - whatever stops the base alone is no fault of the method
        return False
    return True


def _by_mapping(adapter: Adapter, case: Case) -> Rows:
    model = adapter.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {name: names[id(p)] for name, p in adapter.named_parameters() if p.requires_grad}
    values = {full: model.get_parameter(full).detach() for full in own.values()}
    found = vmap(grad(partial(_loss, model, case)), in_dims=(None, 0))(values, dict(case.inputs))
    return {name: found[full] for name, full in own.items()}


def _record(adapter: Adapter, case: Case, count: int) -> tuple[dict[nn.Module, Calls], Tensor]:
    """What every leaf is called with in one forward of the first rows, and the sum of the rows' losses."""
    calls: dict[nn.Module, Calls] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(module, []).append((args, output))

    handles = [leaf.register_forward_hook(keep) for leaf in adapter.leaves()]
    output = case.forward(adapter.model, {name: value[:count] for name, value in case.inputs.items()})
    for handle in handles:
        handle.remove()
    return calls, objective(output) * count


def _calls_by_rows(method: Method, case: Case) -> tuple[Adapter, dict[nn.Module, Calls], Tensor] | None:
    """The calls of an adapter's leaves, or None where a trained tensor's are not made with the rows of the batch."""
    adapter = trained(case, method)
    size = len(next(iter(case.inputs.values())))
    fewer, _ = _record(attached(case, method), case, size - 1)
    calls, loss = _record(adapter, case, size)
    leaves = [leaf for leaf in adapter.leaves() if any(p.requires_grad for p in leaf.parameters(recurse=False))]
    inside = {id(parameter) for leaf in leaves for parameter in leaf.parameters(recurse=False)}
    if any(id(parameter) not in inside for _, parameter in adapter.named_parameters() if parameter.requires_grad):
        return None
    seen = [_leading(found) for found in calls.values()], [_leading(found) for found in fewer.values()]
    return (
        (adapter, calls, loss) if all(s == {size} for s in seen[0]) and all(s == {size - 1} for s in seen[1]) else None
    )


def _leading(calls: Calls) -> set[int | None]:
    """The first axes of everything that a leaf was called with and returned; None for what is no tensor."""
    return {
        len(value) if isinstance(value, Tensor) and value.dim() else None
        for args, output in calls
        for value in (*args, output)
        if value is not None
    }


def _by_leaves(adapter: Adapter, calls: dict[nn.Module, Calls], loss: Tensor) -> Rows:
    """Differentiate each call of each leaf once more for each row; calls of one leaf add up."""
    made = [(leaf, args, output) for leaf, found in calls.items() for args, output in found if output.requires_grad]
    at_output = torch.autograd.grad(loss, [output for _, _, output in made])
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    rows: Rows = {}
    for (leaf, args, _), gradient in zip(made, at_output, strict=True):
        own = {name: p.detach() for name, p in leaf.named_parameters() if p.requires_grad}
        fixed = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        axes = tuple(0 if isinstance(value, Tensor) else None for value in fixed)
        found = vmap(partial(_pull, leaf, own), in_dims=(0, axes))(gradient, fixed)
        for name, value in found.items():
            key = names[id(leaf.get_parameter(name))]
            rows[key] = rows[key] + value if key in rows else value
    return rows


def _pull(leaf: nn.Module, own: dict[str, Tensor], gradient: Tensor, row: tuple[Any, ...]) -> dict[str, Tensor]:
    single = tuple(value.unsqueeze(0) if isinstance(value, Tensor) else value for value in row)
    back = vjp(lambda values: functional_call(leaf, values, single)[0], own)[1]
    return back(gradient)[0]  # type: ignore[no-any-return]
