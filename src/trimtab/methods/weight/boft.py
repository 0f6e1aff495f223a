"""BOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.blocks import block_count, cut
from trimtab.kinds.rotation import RotationMethod, cayley, rotate_blocks
from trimtab.kinds.weight import ParameterSite, WeightLeaf
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class BOFT(RotationMethod):
    """BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization. Liu et al. 2023, arXiv 2311.06243.

    W′ = s ⊙ (W·Rᵀ), y = s ⊙ (x·R)Wᵀ + bias, with s (out,) = 1 and R = R_m···R_1, R_i = P_i·D_i·P_iᵀ. D_i is
    block-diagonal of blocks (b, b), each the Cayley transform (I − Q)(I + Q)⁻¹ of Q = ½(X − Xᵀ), X = 0: orthogonal for
    every X, and starts at the base. P_i mixes neighbours at distance 2^(i−1): in groups of b·2^(i−1) inputs, chunks of
    b/2 are put in the order evens, odds; P_1 is the identity. With m factors an input reaches b·2^(m−1) others.
    Without a compiled CUDA extension peft silently has m = 1; here m is what was asked for. peft's dropout of blocks is
    not offered. A convolution rotates its patches (in·kernel), each group and expert by itself.
    No weight decay, which would pull towards the base or shrink it. Not defined on embeddings; b·2^(m−1) must divide
    the input width, and b must be even where m > 1.
    Trainable: m·in·b + out for each matrix, of which X's symmetric half does nothing.
    """

    block_size: int = setting(4, "width b of each block", minimum=2)
    butterfly_factors: int = setting(1, "number m of butterfly factors", minimum=1)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    def validate(self) -> None:
        if self.butterfly_factors > 1 and self.block_size % 2:
            raise SettingError(f"BOFT: with several factors, block_size={self.block_size} must be even.")

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        lead, b, m = site.layout.lead, self.block_size, self.butterfly_factors
        block_count("BOFT", site, site.in_features, b * 2 ** (m - 1))
        return {
            "X": Spec((*lead, m, site.in_features // b, b, b), decay=False),
            "s": Spec((*lead, site.out_features), decay=False),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        leaf.s.fill_(1.0)

    def rotate(self, leaf: WeightLeaf, rows: Tensor, back: bool = False) -> Tensor:
        blocks = cayley(0.5 * (leaf.X - leaf.X.mT))  # (*lead, m, in/b, b, b)
        order = range(self.butterfly_factors)
        for i in order if back else reversed(order):
            rows = self._shuffled(rows, 2, 2**i)  # · P_i
            rows = rotate_blocks(rows, blocks[..., i, :, :, :], back)
            rows = self._shuffled(rows, 2**i, 2)  # · P_iᵀ
        return rows

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return leaf.s.unsqueeze(-1) * super().weight(leaf, weight)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        target: Any = leaf.target
        rows = self.rotate(leaf, x.reshape(-1, x.shape[-1])).view(x.shape)
        if rows.dtype == target.weight.dtype:
            scaled = leaf.s * F.linear(rows, target.weight)
            return scaled if target.bias is None else scaled + target.bias
        base, change = F.linear(x, target.weight), F.linear((rows - x).to(target.weight.dtype), target.weight)
        update = ((leaf.s - 1.0) * base + leaf.s * change).to(base.dtype)
        return base + update if target.bias is None else base + target.bias + update

    def _shuffled(self, rows: Tensor, first: int, second: int) -> Tensor:
        """Within groups, exchange the order (first, second) of chunks of half a block."""
        if first == 1 or second == 1:
            return rows
        groups = cut(rows, -1, first, second, self.block_size // 2)
        return groups.transpose(-3, -2).flatten(-4)
