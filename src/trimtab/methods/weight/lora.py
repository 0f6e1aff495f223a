"""LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.initial import lora_start, normal
from trimtab.kinds.layouts import EmbeddingLayout
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class LoRA(WeightMethod):
    """LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv 2106.09685.

    ΔW = s·B·A with A (r, in), B (out, r), s = alpha/r, or alpha/√r with `rank_stabilized` (rsLoRA, arXiv 2312.03732).
    A ~ U(−1/√in, 1/√in), B = 0: starts at the base. On an embedding A = 0 and B ~ N(0, 1) over (dim, r).
    `b_lr_ratio` multiplies the learning rate of B (LoRA+, arXiv 2402.12354; the paper recommends 16).
    Dropout acts on the input of the update. Trainable: r·(in + out) for each matrix; a convolution with g groups has
    g matrices of rank r/g; a stack of experts has one pair for each. The paper adapts query and value with alpha fixed
    to the first rank tried; alpha defaults to the rank here (s = 1).
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    rank_stabilized: bool = setting(False, "scale by 1/√rank instead of 1/rank (rsLoRA)")
    b_lr_ratio: float = setting(1.0, "learning rate of B relative to A (LoRA+)", above=0.0)
    initial: Literal["kaiming", "gaussian"] = setting("kaiming", "distribution of A: uniform, or N(0, 1/r²)")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=False)

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.rank)
        return {
            "A": Spec(site.matrices(rank, site.in_features)),
            "B": Spec(site.matrices(site.out_features, rank), lr_scale=self.b_lr_ratio),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        if self.initial == "gaussian" and not isinstance(leaf.site.layout, EmbeddingLayout):
            normal(leaf.A, 1.0 / self.rank, generator)
        else:
            lora_start(leaf.A, leaf.B, leaf.site.layout, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.scale * (leaf.B @ leaf.A)

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.A, leaf.B, self.scale, dropout=self.dropout)
