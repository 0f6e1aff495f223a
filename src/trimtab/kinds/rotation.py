"""Rotations of a weight's input: W′ = W·Rᵀ, y = base(x·R), for methods that build R from small blocks or vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.blocks import cut
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.quantized import at_least_single


@dataclass(frozen=True)
class RotationMethod(WeightMethod):
    """A method that rotates the input of a weight. Give `rotate`."""

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding(type(self).__name__, site)

    def rotate(self, leaf: WeightLeaf, rows: Tensor, back: bool = False) -> Tensor:
        """Return rows·R, or rows·Rᵀ to rotate back; rows (*lead, any, in)."""
        raise NotImplementedError

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # W′ − W is small beside W
            return self.rotate(leaf, weight, back=True)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        weight = leaf.weight()
        return self.weight(leaf, weight) - weight

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        target: Any = leaf.target
        rows = self.rotate(leaf, x.reshape(-1, x.shape[-1])).view(x.shape)
        if rows.dtype == target.weight.dtype:
            return F.linear(rows, target.weight, target.bias)
        # Rounded to the weight's precision, a small rotation would be lost; its change of the input is not.
        change = (rows - x).to(target.weight.dtype)
        return F.linear(x, target.weight, target.bias) + F.linear(change, target.weight)


def rotate_blocks(rows: Tensor, blocks: Tensor, back: bool) -> Tensor:
    """Return rows·R, or rows·Rᵀ, of a block-diagonal R; rows (*lead, any, in), blocks (*lead, in/b, b, b)."""
    wide = torch.promote_types(rows.dtype, blocks.dtype)
    blocks = (blocks.mT if back else blocks).to(wide)
    split = cut(rows.to(wide), -1, blocks.shape[-1])  # (*lead, any, in/b, b)
    rotated: Tensor = torch.einsum("...onk,...nkc->...onc", split, blocks)
    return rotated.flatten(-2)


def cayley(skew: Tensor) -> Tensor:
    """Return (I − Q)(I + Q)⁻¹ for skew-symmetric Q (..., b, b): orthogonal, and I at Q = 0."""
    exact = at_least_single(skew)  # half precision has no solver
    identity = torch.eye(skew.shape[-1], device=skew.device, dtype=exact.dtype).expand_as(exact)
    rotation: Tensor = torch.linalg.solve(identity + exact, identity - exact, left=False)
    return rotation.to(skew.dtype)
