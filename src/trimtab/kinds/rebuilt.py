"""A linear map with a weight that is made from small tensors: made again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kinds.weight import WeightLeaf

Rebuild = Callable[..., Tensor]


def linear_with_rebuilt_weight(x: Tensor, bias: Tensor | None, rebuild: Rebuild, *tensors: Tensor) -> Tensor:
    """Return x W′ᵀ + bias with W′ (out, in) = rebuild(*tensors); x (..., in).

    Backward keeps x and `tensors` alone; W′ and its gradient exist for one layer at a time. `rebuild` is made of
    differentiable operations and draws nothing. A compiler decides by itself what to keep, so there it is all plain.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, rebuild(*tensors).to(x.dtype), bias)
    return _LinearWithRebuiltWeight.apply(x, bias, rebuild, *tensors)  # type: ignore[no-any-return,no-untyped-call]


def fused_by_rebuilding(leaf: WeightLeaf, x: Tensor, rebuild: Rebuild, *tensors: Tensor) -> Tensor:
    """Return the output of a plain linear map under W′ = rebuild(W, *tensors), for `WeightMethod.fused`.

    Where the base is coarser than the adapter, W′ would be rounded to it: there the update runs beside the base.
    """
    target: Any = leaf.target
    if not target.weight.dtype == x.dtype == tensors[0].dtype:
        return leaf.method.unfused(leaf, x)
    return linear_with_rebuilt_weight(x, target.bias, rebuild, target.weight, *tensors)


class _LinearWithRebuiltWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, rebuild: Rebuild, *tensors: Tensor) -> Tensor:
        ctx.rebuild = rebuild
        ctx.save_for_backward(x, *tensors)
        return F.linear(x, rebuild(*tensors).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, needs_bias, _, *needs = ctx.needs_input_grad
        again = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
        with torch.enable_grad():
            weight = ctx.rebuild(*again)
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grads: list[Tensor | None] = [None] * len(needs)
        grad_x = (rows @ weight.detach().to(grad.dtype)).view(x.shape) if needs_x else None
        if any(needs):
            learning = [tensor for tensor in again if tensor.requires_grad]
            grad_weight = (rows.t() @ x.reshape(len(rows), -1)).to(weight.dtype)
            found = iter(torch.autograd.grad(weight, learning, grad_weight))
            grads = [next(found) if need else None for need in needs]
        return grad_x, rows.sum(0) if needs_bias else None, None, *grads
