"""The fast path of every update of the form ΔW = scale · up · diag(middle) · down beside a linear map.

One autograd function computes the base product and the update: the scale acts on the r-wide side, results accumulate
in place, the input is kept by reference (in the base's dtype) and only if `down` learns, dropout keeps one bit each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.kinds.layouts import Layout

_STEPS = 1 << 16


@dataclass(frozen=True)
class Factors:
    """ΔW = scale · up · diag(middle) · down, with down (*lead, r, in), up (*lead, out, r), middle (r,) or None."""

    down: Tensor
    up: Tensor
    scale: float = 1.0
    middle: Tensor | None = None
    dropout: float = 0.0

    def delta(self) -> Tensor:
        """Return ΔW (*lead, out, in)."""
        down = self.down if self.middle is None else self.middle.unsqueeze(-1) * self.down
        return self.scale * (self.up @ down)


def add_update(layout: Layout, module: nn.Module, x: Tensor, y: Tensor, factors: Factors, training: bool) -> Tensor:
    """Return y + ΔW·x in plain operations, for every layout; computed in the factors' dtype, returned in y's."""
    if x.is_floating_point():
        x = F.dropout(x.to(factors.down.dtype), factors.dropout, training)
    hidden = layout.down(module, x, factors.down)
    if factors.middle is not None:
        hidden = hidden * layout.channels(factors.middle, hidden)
    return y + (layout.up(hidden * factors.scale, factors.up)).to(y.dtype)


def linear_with_update(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, training: bool) -> Tensor:
    """Return x Wᵀ + bias + ΔW·x by one autograd function; x (..., in), weight (out, in)."""
    bits, keep = None, 1.0
    if training and factors.dropout > 0.0:
        bits, keep = random_bits(x.numel(), factors.dropout, x.device)
    scale = factors.scale / keep
    return _LinearWithUpdate.apply(x, weight, bias, factors.down, factors.middle, factors.up, scale, bits)  # type: ignore[no-any-return,no-untyped-call]


def random_bits(count: int, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """Draw `count` keep-decisions packed eight to a byte; returns (bytes, probability of keeping).

    The probability is exact in steps of 2⁻¹⁶, and the returned value is the one used.
    """
    kept = round((1.0 - dropout) * _STEPS)
    columns = -(-count // 8)
    words = torch.empty(2 * columns, dtype=torch.int64, device=device).random_(-(2**63), None)
    decisions = (words.view(torch.int16).view(8, columns) < kept - _STEPS // 2).to(torch.uint8)
    packed = decisions[0]
    for place in range(1, 8):
        packed = packed | (decisions[place] << place)
    return packed, kept / _STEPS


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """Return the decisions as zeros and ones in the shape and dtype of `like`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    decisions = (packed.unsqueeze(0) >> places) & 1
    return decisions.view(-1)[: like.numel()].view(like.shape).to(like.dtype)


class _LinearWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        middle: Tensor | None,
        up: Tensor,
        scale: float,
        bits: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        dropped = (rows if bits is None else rows * unpack_bits(bits, rows)).to(down.dtype)
        hidden = dropped @ down.t()  # (tokens, r)
        scaled = hidden if middle is None else hidden * middle
        _accumulate(y, scaled, up.t(), scale)
        _, _, _, down_learns, middle_learns, up_learns, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            rows if down_learns else None,
            weight,
            down,
            middle,
            up,
            hidden if up_learns or middle_learns else None,
            bits,
        )
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, middle, up, hidden, bits = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        wide = grad.to(up.dtype)
        inner = (wide @ up) * ctx.scale  # (tokens, r)
        grad_up = grad_middle = grad_down = grad_x = None
        if needs[5]:
            grad_up = (wide.t() @ (hidden if middle is None else hidden * middle)).mul_(ctx.scale)
        if needs[4]:
            grad_middle = (hidden * inner).sum(0)
        if middle is not None:
            inner = inner * middle
        mask = None if bits is None else unpack_bits(bits, grad.new_empty(grad.shape[0], down.shape[1]))
        if needs[3]:
            grad_down = inner.t() @ (rows if mask is None else rows * mask).to(down.dtype)
        if needs[0]:
            grad_x = grad @ weight
            if mask is None:
                _accumulate(grad_x, inner, down, 1.0)
            else:
                grad_x.addcmul_((inner @ down).to(grad_x.dtype), mask)
            grad_x = grad_x.view(ctx.shape)
        grad_weight = grad.t() @ rows if needs[1] else None
        grad_bias = grad.sum(0) if needs[2] else None
        return grad_x, grad_weight, grad_bias, grad_down, grad_middle, grad_up, None, None


def _accumulate(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """into += scale · left @ right, in place, without a full-width temporary where the dtypes agree."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_((left @ right).to(into.dtype), alpha=scale)
