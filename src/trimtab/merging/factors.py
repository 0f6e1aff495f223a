"""ΔW of a module as two factors of a given rank: stacked and padded where methods give factors, else by SVD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import AdapterFileError
from trimtab.hooks import Leaf
from trimtab.kinds.weight import WeightLeaf, WeightMethod


@dataclass(frozen=True)
class Factored:
    """One weight's factors: down (*lead, r, in), up (*lead, out, r); squared norms of what they miss and of ΔW."""

    down: Tensor
    up: Tensor
    missed: float
    norm: float

    @property
    def error(self) -> float:
        """‖up·down − ΔW‖ / ‖ΔW‖."""
        return math.sqrt(self.missed / self.norm) if self.norm else 0.0


def errors_of(factors: Mapping[str, Factored]) -> tuple[float, str, float]:
    """Return ‖B·A − ΔW‖ / ‖ΔW‖ (Frobenius) over all places, the place where it is worst, and what it is there."""
    worst = max(factors, key=lambda place: factors[place].error)
    norm = math.fsum(each.norm for each in factors.values())
    relative = math.sqrt(math.fsum(each.missed for each in factors.values()) / norm) if norm else 0.0
    return relative, worst, factors[worst].error


def errors_text(relative: float, worst: str, error: float) -> str:
    """Return what `errors_of` found, for people."""
    return f"relative error {relative:.3g}, at worst {error:.3g} ({worst})"


def matrix_count(leaf: WeightLeaf) -> int:
    """Return among how many matrices the rank of a site is divided (the groups of a convolution)."""
    return math.prod(leaf.site.layout.lead)


def scaled_factors(leaf: WeightLeaf) -> tuple[Tensor, Tensor] | None:
    """Return ΔW as (down, up) with every scale folded into up, or None where the method does not give it so."""
    method = leaf.method
    additive = type(method).weight is WeightMethod.weight
    factors = method.factors(leaf) if additive else None
    if factors is None:
        return None
    up = factors.up if factors.middle is None else factors.up * factors.middle.unsqueeze(-2)
    return factors.down.detach(), (up if factors.scale == 1.0 else up * factors.scale).detach()


def why_no_change(leaf: Leaf) -> str | None:
    """Say why what a leaf does is no change ΔW of a weight alone; None where it is."""
    method = leaf.method
    if not isinstance(method, WeightMethod):
        return "it does not change weights"
    promised = method.promises()
    if promised.merge != "exact" or promised.input_dependent:
        return promised.merge_reason or "its change depends on the input"
    if not leaf.site.called:
        return None
    assert isinstance(leaf, WeightLeaf)
    bias = leaf.bias()
    new_bias = method.bias(leaf, bias)
    changes_bias = new_bias is not None and new_bias is not bias
    return f"it changes the bias of {leaf.site.path!r}" if changes_bias else None


def factored(leaves: Sequence[WeightLeaf], rank: int) -> Factored:
    """Return the factors of the summed change of one weight, of exactly `rank` for each of its matrices."""
    wanted = torch.stack([change_of(leaf) for leaf in leaves]).sum(0)
    pairs = [pair for leaf in leaves if (pair := scaled_factors(leaf)) is not None]
    return nearest(leaves[0].site.path, wanted, pairs if len(pairs) == len(leaves) else None, rank)


def nearest(path: str, wanted: Tensor, pairs: Sequence[tuple[Tensor, Tensor]] | None, rank: int) -> Factored:
    """Return factors of exactly `rank` for a change: the pairs (down, up) whose sum it is, if they fit, else by SVD."""
    if not bool(torch.isfinite(wanted).all()):
        raise AdapterFileError(f"{path!r} holds NaN or infinite numbers; nothing was written.")
    if pairs is not None and sum(down.shape[-2] for down, _ in pairs) <= rank:
        down, up = torch.cat([pair[0] for pair in pairs], -2), torch.cat([pair[1] for pair in pairs], -1)
    else:
        down, up = _best_factors(wanted, rank)
    down = F.pad(down, (0, 0, 0, rank - down.shape[-2]))
    up = F.pad(up, (0, rank - up.shape[-1]))
    missed = float((up.double() @ down.double() - wanted.double()).square().sum())
    return Factored(down.cpu(), up.cpu(), missed, float(wanted.double().square().sum()))


def change_of(leaf: WeightLeaf) -> Tensor:
    """Return ΔW (*lead, out, in) by the method's reference formula."""
    if type(leaf.method).weight is WeightMethod.weight:
        return leaf.method.delta(leaf)
    base = leaf.weight()
    base = base if base.dtype == torch.float64 else base.float()
    return leaf.method.weight(leaf, base) - base


def _best_factors(wanted: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (down, up) of the matrix of that rank nearest to `wanted` (*lead, out, in)."""
    precise = wanted if wanted.dtype == torch.float64 else wanted.float()
    left, values, right = torch.linalg.svd(precise, full_matrices=False)
    root = values[..., :rank].sqrt()
    down = root.unsqueeze(-1) * right[..., :rank, :]
    up = left[..., :rank] * root.unsqueeze(-2)
    return down.to(wanted.dtype), up.to(wanted.dtype)
