"""Sums of Kronecker products: from a matrix, and back to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kronecker_sum(sigma: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Return Σ_k σ_k·kron(U_k, V_k) (*lead, m·p, n·q) of σ (*lead, r), U (*lead, r, m, n) and V (*lead, r, p, q)."""
    with torch.autocast(sigma.device.type, enabled=False):  # a difference of two such sums must not be rounded first
        rearranged = (sigma.unsqueeze(-1) * U.flatten(-2)).mT @ V.flatten(-2)  # (*lead, m·n, p·q)
    blocks = rearranged.view(*sigma.shape[:-1], *U.shape[-2:], *V.shape[-2:]).transpose(-3, -2)  # (*lead, m, p, n, q)
    return blocks.reshape(*sigma.shape[:-1], U.shape[-2] * V.shape[-2], U.shape[-1] * V.shape[-1])


def rearranged(matrix: Tensor, m: int, n: int) -> Tensor:
    """Return R(W) (*lead, m·n, p·q) of W (*lead, m·p, n·q), which has rank one exactly for kron(U, V).

    Van Loan and Pitsianos 1993: the row of R is the place of a block, its column the place within the block.
    """
    lead, (rows, columns) = matrix.shape[:-2], matrix.shape[-2:]
    blocks = matrix.reshape(*lead, m, rows // m, n, columns // n).transpose(-3, -2)  # (*lead, m, n, p, q)
    return blocks.reshape(*lead, m * n, -1)


def kronecker_svd(matrix: Tensor, m: int, n: int, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ (*lead, r), U (*lead, r, m, n), V (*lead, r, p, q): the r leading terms of W (*lead, m·p, n·q).

    Their sum is the best approximation of W by r Kronecker products of these shapes; with all terms it is W.
    """
    p, q = matrix.shape[-2] // m, matrix.shape[-1] // n
    X, S, Yh = torch.linalg.svd(rearranged(matrix, m, n), full_matrices=False)
    lead = S.shape[:-1]
    U, V = X.mT[..., :terms, :].reshape(*lead, terms, m, n), Yh[..., :terms, :].reshape(*lead, terms, p, q)
    return S[..., :terms], U, V


def middle_divisor(size: int) -> int:
    """Return the largest divisor of `size` that is at most its square root; 1 for a prime."""
    return next(divisor for divisor in range(math.isqrt(size), 0, -1) if size % divisor == 0)
