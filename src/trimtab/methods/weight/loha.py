"""LoHa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.dense import linear_with_dense_update
from trimtab.kinds.initial import kaiming_uniform, normal
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class LoHa(WeightMethod):
    """LoHa: low-rank Hadamard product (FedPara). Hyeon-Woo et al. 2021, arXiv 2108.06098.

    ΔW = s·(B₁·A₁) ∘ (B₂·A₂) with A (r, in), B (out, r), s = alpha/r: rank up to r². A₂ = 0, all others uniform within
    1/√columns (FedPara's He start as peft has it), or `initial="normal"`: B₂ = 0, A₁ and A₂ ~ N(0, 1), B₁ ~ N(0, 0.1²)
    (LyCORIS). Both start at the base. The product is dense: W + ΔW is formed once for each step, and no product of
    activations is added. Convolutions are (out, in·kernel), each group and each expert of a stack by itself; LyCORIS'
    Tucker form of kernels is not offered. Not defined on embeddings. Trainable: 2r·(in + out) for each matrix.
    """

    rank: int = setting(8, "rank of each of the two factors", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    initial: Literal["kaiming", "normal"] = setting("kaiming", "start of peft (A₂ = 0), or of LyCORIS (B₂ = 0)")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("LoHa", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.rank)
        down, up = Spec(site.matrices(rank, site.in_features)), Spec(site.matrices(site.out_features, rank))
        return {"A1": down, "B1": up, "A2": down, "B2": up}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        if self.initial == "kaiming":
            for factor in (leaf.B1, leaf.A1, leaf.B2):
                kaiming_uniform(factor, generator)
            return
        for factor, deviation in ((leaf.B1, 0.1), (leaf.A1, 1.0), (leaf.A2, 1.0)):
            normal(factor, deviation, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        scale = lora_scale(self.alpha, self.rank, rank_stabilized=False)
        return scale * (leaf.B1 @ leaf.A1) * (leaf.B2 @ leaf.A2)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        return linear_with_dense_update(leaf, x, self.delta(leaf))
