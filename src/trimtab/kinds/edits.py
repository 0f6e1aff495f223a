"""How a scale and shift folds into the layer at whose side it acts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.errors import AttachError
from trimtab.kinds.layouts import layout_of
from trimtab.merge import Edit
from trimtab.quantized import at_least_single, dense_weight
from trimtab.structure import is_norm


def affine_edits(
    module: nn.Module, path: str, side: Literal["input", "output"], scale: Tensor | None, shift: Tensor | None
) -> list[Edit]:
    """Fold h′ = scale ⊙ h + shift at one side of a module into its weight and bias, at least in float32."""
    if isinstance(module, nn.MultiheadAttention) and side == "output":
        return _fold_map(module.out_proj, f"{path}.out_proj", side, scale, shift)
    weight = module._parameters.get("weight")
    if weight is None:
        raise AttachError(f"{path!r} ({type(module).__name__}) has no weight into which a scale and shift could fold.")
    if is_norm(module):
        return _fold_norm(module, path, side, weight, scale, shift)
    if isinstance(module, nn.Embedding):
        table = at_least_single(dense_weight(module))
        table = table if scale is None else table * scale
        return [Edit(module, path, "weight", table if shift is None else table + shift)]
    return _fold_map(module, path, side, scale, shift)


def input_edits(module: nn.Module, path: str, change: Tensor, shift: Tensor) -> list[Edit]:
    """Fold h′ = h + change·h + shift at the input of a linear map: W′ = W + W·change, b′ = b + W·shift.

    `change` (in, in), `shift` (in,); computed at least in float32. A bias is created where there is none.
    """
    layout, stored, bias = layout_of(path, module, None), dense_weight(module), module._parameters["bias"]
    weight = at_least_single(layout.matrix(stored))  # (out, in)
    moved = weight @ shift.to(weight.dtype)
    changed = layout.stored(weight + weight @ change.to(weight.dtype), stored)
    new_bias = moved if bias is None else at_least_single(bias) + moved
    return [Edit(module, path, "weight", changed), Edit(module, path, "bias", new_bias)]


def _fold_norm(
    module: nn.Module, path: str, side: str, weight: Tensor, scale: Tensor | None, shift: Tensor | None
) -> list[Edit]:
    if side != "output":
        raise AttachError(f"a change of the norm's input at {path!r} cannot be folded.")
    bias = module._parameters.get("bias")
    if shift is not None and "bias" not in module._parameters:
        raise AttachError(f"the norm {path!r} has no bias, so a shift cannot be folded; keep the adapter attached.")
    scale = torch.ones_like(weight, dtype=torch.float32) if scale is None else scale
    edits = [Edit(module, path, "weight", at_least_single(weight) * scale)]
    base = torch.zeros_like(scale) if bias is None else at_least_single(bias)
    if bias is not None or shift is not None:
        edits.append(Edit(module, path, "bias", base * scale + (0.0 if shift is None else shift)))
    return edits


def _fold_map(module: nn.Module, path: str, side: str, scale: Tensor | None, shift: Tensor | None) -> list[Edit]:
    layout = layout_of(path, module, None)
    stored = dense_weight(module)
    matrix = at_least_single(layout.matrix(stored))  # (*lead, out, in)
    bias = module._parameters.get("bias")
    edits, base = [], None if bias is None else at_least_single(bias)
    if side == "input":
        if layout.axis != -1:
            raise AttachError(f"a change of the convolution's input at {path!r} cannot be folded.")
        if shift is not None:
            base = matrix @ shift if base is None else base + matrix @ shift
        matrix = matrix if scale is None else matrix * scale
    else:
        if scale is not None:
            matrix = matrix * scale.view(*layout.lead, layout.out_features, 1)
            base = None if base is None else base * scale
        base = base if shift is None else shift if base is None else base + shift
    if scale is not None:
        edits.append(Edit(module, path, "weight", layout.stored(matrix, stored)))
    if base is not None and (bias is None or not torch.equal(base, at_least_single(bias))):
        edits.append(Edit(module, path, "bias", base))
    return edits
