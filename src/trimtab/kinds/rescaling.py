"""Scaling the rows of a map beside its bias, by one function that keeps its output alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kinds.transforms import transformed


def rescale(y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """Return y + (ratio − 1)·(y − bias) for y (..., out), ratio and bias (out,)."""
    if transformed():
        return _rescaled(y, ratio, bias)
    return _Rescaled.apply(y, ratio, bias)  # type: ignore[no-any-return,no-untyped-call]


def _rescaled(y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    return ((ratio - 1.0) * (y if bias is None else y - bias)).to(y.dtype).add_(y)


class _Rescaled(torch.autograd.Function):
    """Keeps its output, which the next operation often keeps too."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
        output = _rescaled(y, ratio, bias)
        ctx.save_for_backward(output, ratio, bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, ratio, bias = ctx.saved_tensors
        axes = tuple(range(grad.dim() - 1))
        scaled = (grad * (output if bias is None else output - bias)).sum(axes, dtype=ratio.dtype)
        grad_ratio = torch.where(ratio == 0.0, 0.0, scaled / ratio)  # zero only for rows of zeros, which never learn
        grad_bias = (grad * (1.0 - ratio)).sum(axes).to(grad.dtype) if ctx.needs_input_grad[2] else None
        return (grad * ratio).to(grad.dtype), grad_ratio, grad_bias
