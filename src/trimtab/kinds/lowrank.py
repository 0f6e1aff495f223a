"""The fast path of every update of the form ΔW = scale · up · diag(middle) · down beside a linear map.

One autograd function computes the base product and the update: the scale acts on the r-wide side, results accumulate
in place, the input is kept by reference (in the base's dtype) and only if `down` learns, dropout keeps one bit each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.kinds.layouts import Layout

_STEPS = 1 << 16
_SHARING = 16  # words whose lower digits are drawn together
_LOWEST_BITS = 0x0101010101010101  # of each of the eight bytes of a word


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


def lora_scale(alpha: float | None, rank: int, rank_stabilized: bool) -> float:
    """Return LoRA's factor alpha/r, or alpha/√r (arXiv 2312.03732, eq. 3); alpha None means alpha = r."""
    return (float(rank) if alpha is None else alpha) / (math.sqrt(rank) if rank_stabilized else rank)


def add_update(layout: Layout, module: nn.Module, x: Tensor, y: Tensor, factors: Factors, training: bool) -> Tensor:
    """Return y + ΔW·x in plain operations, for every layout; computed in the factors' dtype, returned in y's."""
    if x.is_floating_point():
        x = x.to(factors.down.dtype)
        x = F.dropout(x, factors.dropout) if training and factors.dropout > 0.0 else x
    hidden = layout.down(module, x, factors.down)
    if factors.middle is not None:
        hidden = hidden * layout.channels(factors.middle, hidden)
    if factors.scale != 1.0:
        hidden = hidden * factors.scale
    return y + layout.up(hidden, factors.up).to(y.dtype)


def linear_with_update(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, training: bool) -> Tensor:
    """Return x Wᵀ + bias + ΔW·x by one autograd function; x (..., in), weight (out, in)."""
    bits, keep = None, 1.0
    if training and factors.dropout > 0.0:
        bits, keep = random_bits(x.numel(), factors.dropout, x.device)
    scale = factors.scale / keep
    return _LinearWithUpdate.apply(x, weight, bias, factors.down, factors.middle, factors.up, scale, bits)  # type: ignore[no-any-return,no-untyped-call]


def random_bits(count: int, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """Draw `count` keep-decisions packed 64 to a word; returns (words, probability of keeping).

    The probability is exact in steps of 2⁻¹⁶, and the returned value is the one used. Each decision compares sixteen
    random bits with the binary digits of that probability, 64 at a time: from the last digit up, "or" where the digit
    is one, "and" where it is zero. The lower eight digits, which decide once in 256 times, are drawn once for sixteen
    words: two decisions that share them are dependent with probability 2⁻¹⁶.
    """
    kept = min(round((1.0 - dropout) * _STEPS), _STEPS - 1)
    groups = -(-count // (64 * _SHARING))
    random = torch.randint(-(2**63), 2**63 - 1, (8, _SHARING + 1, groups), device=device)
    words = torch.zeros(groups, dtype=torch.int64, device=device)
    for place, row in enumerate((*random[:, 0].unbind(), *random[:, 1:].unbind())):
        words = words | row if kept >> place & 1 else words & row
    return words.view(-1), kept / _STEPS


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """Return the decisions as zeros and ones in the shape and dtype of `like`."""
    places = torch.arange(8, device=packed.device).unsqueeze(1)
    decisions = (packed >> places).bitwise_and_(_LOWEST_BITS).view(torch.uint8)  # each word's bytes, bit by bit
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
        y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        dropped = rows if bits is None else unpack_bits(bits, rows).mul_(rows)
        hidden = torch.mm(down, dropped.to(down.dtype).t())  # (r, tokens); thin factors first are several times faster
        accumulate(y, (hidden if middle is None else hidden * middle.unsqueeze(1)).t(), up.t(), scale)
        _, weight_learns, _, down_learns, middle_learns, up_learns, *_ = ctx.needs_input_grad
        kept = hidden if up_learns or middle_learns else None
        ctx.save_for_backward(rows if down_learns or weight_learns else None, weight, down, middle, up, kept, bits)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, middle, up, hidden, bits = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        wide = grad.to(up.dtype)
        inner = torch.mm(up.t(), wide.t()).mul_(ctx.scale)  # (r, tokens)
        grad_up = grad_middle = grad_down = grad_x = None
        if needs[5]:
            scaled = hidden if middle is None else hidden * middle.unsqueeze(1)
            grad_up = torch.mm(scaled, wide).mul_(ctx.scale).t()
        if needs[4]:
            grad_middle = (hidden * inner).sum(1)
        inner = inner if middle is None else inner * middle.unsqueeze(1)
        mask = None if bits is None else unpack_bits(bits, grad.new_empty(grad.shape[0], down.shape[1]))
        if needs[3]:
            grad_down = torch.mm(inner, (rows if mask is None else rows * mask).to(down.dtype))
        if needs[0]:
            grad_x = torch.mm(grad, weight)
            if mask is None:
                accumulate(grad_x, inner.t(), down, 1.0)
            else:
                grad_x.addcmul_(torch.mm(inner.t(), down).to(grad_x.dtype), mask)
            grad_x = grad_x.view(ctx.shape)
        grad_weight = torch.mm(grad.t(), rows) if needs[1] else None
        grad_bias = grad.sum(0) if needs[2] else None
        return grad_x, grad_weight, grad_bias, grad_down, grad_middle, grad_up, None, None


def accumulate(into: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """into += scale · left @ right, in place, without a full-width temporary where the dtypes agree."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_((left @ right).to(into.dtype), alpha=scale)
