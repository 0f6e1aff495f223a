"""HiRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.dense import linear_with_dense_update
from trimtab.kinds.initial import lora_start, normal
from trimtab.kinds.layouts import EmbeddingLayout
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class HiRA(WeightMethod):
    """HiRA: Parameter-Efficient Hadamard High-Rank Adaptation. Huang et al. 2025, ICLR.

    W′ = W + W ∘ (B·A) with A (r, in), B (out, r): an update of high rank. A ~ U(−1/√in, 1/√in), B = 0, on an embedding
    A = 0 and B ~ N(0, 1): starts at the base. There is no scale. It is dense: W′ is formed once for each step, and no
    product of activations is added, unless there is dropout, which acts on the input of the update; an embedding scales
    the rows it looks up. A convolution is (out, in·kernel), each group and expert by itself.
    Where W is zero it stays zero. Trainable: r·(in + out) for each matrix.
    """

    rank: int = setting(32, "rank of the factor", minimum=1)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    initial: Literal["kaiming", "gaussian"] = setting("kaiming", "distribution of A: uniform, or N(0, 1/r²)")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.rank)
        return {"A": Spec(site.matrices(rank, site.in_features)), "B": Spec(site.matrices(site.out_features, rank))}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        if self.initial == "gaussian" and not isinstance(leaf.site.layout, EmbeddingLayout):
            normal(leaf.A, 1.0 / self.rank, generator)
        else:
            lora_start(leaf.A, leaf.B, leaf.site.layout, generator)

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return weight + weight * (leaf.B @ leaf.A)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return leaf.weight() * (leaf.B @ leaf.A)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        if leaf.training and self.dropout > 0.0:
            return self.unfused(leaf, x)
        return linear_with_dense_update(leaf, x, self.delta(leaf))

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        layout, target = leaf.site.layout, leaf.target
        if isinstance(layout, EmbeddingLayout):
            scale = layout.up(layout.down(target, x, leaf.A), leaf.B)
            return y + (layout.down(target, x, leaf.weight()) * scale).to(y.dtype)
        if leaf.training and self.dropout > 0.0:
            x = torch.dropout(x.to(leaf.A.dtype), self.dropout, train=True)
        return y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype)
