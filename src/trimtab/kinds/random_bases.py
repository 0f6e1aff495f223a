"""RandLoRA's products: random bases scaled by two diagonals, rebuilt in backward instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kinds.transforms import transformed


def scaled_basis(A: Tensor, Lambda: Tensor, Gamma: Tensor) -> Tensor:
    """Return the rows A[k] · Λ[k, b] ∘ Γ[b] in the order (k, b): (*lead, r·n, small).

    A (r, small) is frozen, Λ (*lead, r, n) and Γ (*lead, n, small) learn. Backward keeps these three alone.
    """
    if transformed():
        return _basis(A, Lambda, Gamma)
    return _ScaledBasis.apply(A, Lambda, Gamma)  # type: ignore[no-any-return,no-untyped-call]


def linear_with_random_bases(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, Lambda: Tensor, Gamma: Tensor, scale: float
) -> Tensor:
    """Return x Wᵀ + bias + scale·ΔW·x; x (..., in), W (out, in), B (large, n·r), all of one dtype.

    ΔW = B·basis where out ≥ in, else its transpose. Only x and the parameters are kept for backward. With many rows,
    W + scale·ΔW is formed once for all; with few, x goes through the factors.
    """
    return _LinearWithRandomBases.apply(x, weight, bias, A, B, Lambda, Gamma, scale)  # type: ignore[no-any-return,no-untyped-call]


def _basis(A: Tensor, Lambda: Tensor, Gamma: Tensor) -> Tensor:
    return (Lambda.unsqueeze(-1) * A.unsqueeze(-2) * Gamma.unsqueeze(-3)).flatten(-3, -2)  # (*lead, r·n, small)


def _diagonals_gradient(grad: Tensor, A: Tensor, Lambda: Tensor, Gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of Λ and Γ from that of the basis."""
    weighted = grad.view(*Lambda.shape, -1) * A.unsqueeze(-2)  # (*lead, r, n, small)
    grad_lambda = torch.einsum("...kbj,...bj->...kb", weighted, Gamma)
    grad_gamma = torch.einsum("...kbj,...kb->...bj", weighted, Lambda)
    return grad_lambda, grad_gamma


class _ScaledBasis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, Lambda: Tensor, Gamma: Tensor) -> Tensor:
        ctx.save_for_backward(A, Lambda, Gamma)
        return _basis(A, Lambda, Gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_diagonals_gradient(grad, *ctx.saved_tensors)


class _LinearWithRandomBases(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        Lambda: Tensor,
        Gamma: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        down, up = _factors(weight, B, _basis(A, Lambda, Gamma))
        ctx.save_for_backward(rows, weight, A, B, Lambda, Gamma)
        ctx.scale, ctx.shape = scale, x.shape
        ctx.dense = rows.shape[0] * sum(weight.shape) > weight.numel()
        if ctx.dense:
            weight = torch.addmm(weight, up, down, alpha=scale)
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        if not ctx.dense:
            y.addmm_(rows @ down.t(), up.t(), alpha=scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B, Lambda, Gamma = ctx.saved_tensors
        needs, scale = ctx.needs_input_grad, ctx.scale
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        down, up = _factors(weight, B, _basis(A, Lambda, Gamma))
        grad_x = grad_weight = grad_lambda = grad_gamma = None
        if needs[1] or ctx.dense:
            grad_weight = grad.t() @ rows  # (out, in)
        if needs[0] and ctx.dense:
            grad_x = (grad @ torch.addmm(weight, up, down, alpha=scale)).view(ctx.shape)
        elif needs[0]:
            grad_x = (grad @ weight).addmm_(grad @ up, down, alpha=scale).view(ctx.shape)
        if needs[5] or needs[6]:
            if weight.shape[0] >= weight.shape[1]:  # the basis is `down`, (r·n, in)
                basis = (grad @ up).t() @ rows if grad_weight is None else up.t() @ grad_weight
            else:  # the basis is `up` transposed, (r·n, out)
                basis = (rows @ down.t()).t() @ grad if grad_weight is None else down @ grad_weight.t()
            grad_lambda, grad_gamma = _diagonals_gradient(basis.mul_(scale), A, Lambda, Gamma)
        grad_bias = grad.sum(0) if needs[2] else None
        return grad_x, grad_weight if needs[1] else None, grad_bias, None, None, grad_lambda, grad_gamma, None


def _factors(weight: Tensor, B: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return (down, up) of ΔW = up·down: (r·n, in) and (out, r·n)."""
    return (basis, B) if weight.shape[0] >= weight.shape[1] else (B.t(), basis.t())
