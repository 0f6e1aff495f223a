"""OFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.blocks import block_count
from trimtab.kinds.rotation import RotationMethod, cayley, rotate_blocks
from trimtab.kinds.weight import ParameterSite, WeightLeaf
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class OFT(RotationMethod):
    """OFT: Orthogonal Finetuning. Qiu et al. 2023, arXiv 2306.07280; on the input as in OFTv2, arXiv 2506.19847.

    y = base(x·R), W′ = W·Rᵀ, with R (in, in) block-diagonal of blocks (b, b), each made from the b(b−1)/2 numbers above
    the diagonal of a skew-symmetric Q = 0: starts at the base. `rotation`: "neumann" (OFTv2, the default of peft) sums
    the series of (I + Q)(I − Q)⁻¹ over `terms` terms, I + 2Q + … + 2Qᵗ⁻² + Qᵗ⁻¹: nearly orthogonal while Q is small;
    "cayley" is (I − Q)(I + Q)⁻¹, orthogonal for every Q, and the transpose of what the series tends to: numbers trained
    for one mean nothing to the other. `shared_block` uses one block for all. The constrained variant (COFT), and
    dropout of blocks, which peft never applies to linear layers, are not offered. A convolution rotates its patches
    (in·kernel), each group and expert by itself; peft's folds overlapping patches together there and is another map.
    No weight decay, which would pull towards the base. Not defined on embeddings; b must divide the input width.
    Trainable: in·(b − 1)/2 for each matrix, or b(b − 1)/2 with a shared block.
    """

    block_size: int = setting(32, "width b of each block; must divide the input width", minimum=2)
    rotation: Literal["neumann", "cayley"] = setting("neumann", "truncated series, or exactly orthogonal")
    terms: int = setting(5, "terms of the series", minimum=4)
    shared_block: bool = setting(False, "use one block for the whole input")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        count = block_count("OFT", site, site.in_features, self.block_size)
        numbers = self.block_size * (self.block_size - 1) // 2
        return {"Q": Spec((*site.layout.lead, 1 if self.shared_block else count, numbers), decay=False)}

    def rotate(self, leaf: WeightLeaf, rows: Tensor, back: bool = False) -> Tensor:
        blocks = self._blocks(leaf.Q)
        count = leaf.site.in_features // self.block_size
        return rotate_blocks(rows, blocks.expand(*blocks.shape[:-3], count, *blocks.shape[-2:]), back)

    def _blocks(self, numbers: Tensor) -> Tensor:
        """Return R's blocks (*lead, count, b, b) from the numbers above each diagonal, row by row."""
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1, device=numbers.device)
        upper = numbers.new_zeros(*numbers.shape[:-1], self.block_size, self.block_size)
        upper[..., rows, columns] = numbers
        skew = upper - upper.mT
        return cayley(skew) if self.rotation == "cayley" else _series(skew, self.terms)


def _series(skew: Tensor, terms: int) -> Tensor:
    """Return I + 2Q + … + 2Qᵗ⁻² + Qᵗ⁻¹, as peft sums it."""
    total = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype) + 2.0 * skew
    power = skew
    for _ in range(terms - 3):
        power = power @ skew
        total = total + 2.0 * power
    return total + power @ skew
