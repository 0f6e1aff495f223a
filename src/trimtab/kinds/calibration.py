"""What the base does on calibration data: moments of the inputs of targeted modules, and gradients of their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import SettingError, TargetError
from trimtab.hooks import keeping_modes
from trimtab.kinds.activation import first_tensor
from trimtab.kinds.layouts import Layout, TransposedLayout
from trimtab.kinds.weight import ParameterSite, WeightLeaf
from trimtab.method import Batches, Method
from trimtab.quantized import is_packed

if TYPE_CHECKING:
    from trimtab.adapter import Part


def starts_from_data(method: Method) -> bool:
    """Say whether a method, or a part of it, takes calibration data."""
    return any(part.promises().requires_calibration for part in method.parts())


def visit_inputs(
    part: Part, batches: Batches, visit: Callable[[WeightLeaf, Tensor], None], *, padding: bool = True
) -> None:
    """Run the base, in evaluation mode, on every batch; `visit` gets each leaf with its module's input (tokens, in).

    The part's sites have passed `require_linear`. Without `padding`, tokens that the batch's own `attention_mask`
    (rows, tokens) leaves out are left out here too.
    """
    handles, model = [], part.adapter.model
    kept: list[Tensor | None] = [None]
    for leaf in part.leaves:

        def observe(module: nn.Module, args: Any, kwargs: Any, leaf: Any = leaf) -> None:
            x = first_tensor(args, kwargs)
            assert x is not None
            rows = x.detach().reshape(-1, x.shape[-1])
            mask = kept[0]
            visit(leaf, rows if mask is None or mask.numel() != len(rows) else rows[mask.reshape(-1)])

        handles.append(leaf.target.register_forward_pre_hook(observe, with_kwargs=True))
    try:
        with keeping_modes(model), torch.no_grad():
            model.eval()
            for batch in _each(batches):
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) and not padding else None
                kept[0] = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def weight_gradients(part: Part, batches: Batches) -> list[Tensor]:
    """Return each leaf's ∂L/∂W (*lead, out, in), averaged over the batches; the base keeps no gradient afterwards."""
    if batches.loss is None:
        raise SettingError(f"{type(part.method).__name__} needs the loss of a batch: calibration=Batches(data, loss).")
    model, leaves = part.adapter.model, _called_leaves(part)
    for leaf in leaves:
        if is_packed(leaf.holder, leaf.site.parameter):
            raise SettingError(
                f"{type(part.method).__name__} starts from the gradients of the weights, and {str(leaf.site)!r} is "
                f"stored quantised, so that it has none; load the base in full precision."
            )
    weights: list[Any] = [leaf.holder._parameters[leaf.site.parameter] for leaf in leaves]
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    with keeping_modes(model), _recording(weights):
        model.eval()
        for batch in _each(batches):
            count += 1
            for total, gradient in zip(sums, torch.autograd.grad(batches.loss(model, batch), weights), strict=True):
                total.add_(gradient)
    return [leaf.site.layout.matrix(total / count) for leaf, total in zip(leaves, sums, strict=True)]


@contextlib.contextmanager
def _recording(weights: list[Tensor]) -> Iterator[None]:
    """Gradients of these tensors of the base exist inside the `with` alone."""
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)


def require_linear(method: str, site: ParameterSite) -> None:
    """Refuse a weight whose input is no row of channels; raises TargetError."""
    if type(site.layout) not in (Layout, TransposedLayout) or site.layout.lead or not site.called:
        raise TargetError(
            f"{method} looks at the inputs of linear maps, and {str(site)!r} is the weight of none that is called; "
            f"leave it out of the targets."
        )


def _called_leaves(part: Part) -> list[WeightLeaf]:
    """Return the part's leaves, all beside the call of a linear map; raises SettingError for a weight only read."""
    leaves = [leaf for leaf in part.leaves if isinstance(leaf, WeightLeaf)]
    unseen = next((leaf for leaf in leaves if not leaf.site.called), None)
    if unseen is not None:
        raise SettingError(
            f"{type(part.method).__name__} looks at the inputs of its modules, and {str(unseen.site)!r} is a weight "
            f"that {type(unseen.target).__name__} reads by itself; leave it out of the targets."
        )
    return leaves


def _each(batches: Batches) -> Iterator[Any]:
    empty = True
    for batch in batches.data:
        empty = False
        yield batch
    if empty:
        raise SettingError("the calibration data are empty; pass an iterable of batches that can be gone through.")


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)
