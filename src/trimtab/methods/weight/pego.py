"""PEGO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimtab.adapter import Part
from trimtab.kinds.initial import lora_start
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import at_least_single


@dataclass(frozen=True)
class PEGO(WeightMethod):
    """PEGO: Parameter-Efficient Group with Orthogonal Regularization. Hu et al. 2024, arXiv 2407.15085.

    N LoRAs side by side at each weight, ΔW = Σ_i B_i·A_i with A_i (r, in) uniform as in LoRA and B_i (out, r) = 0, no
    scale: starts at the base. As a function that is one LoRA of rank N·r, and is held as one: group i owns rows
    i·r … (i+1)·r of A and those columns of B. The grouping acts through the penalty, summed over all weights:
    λ·(Σ_i ‖W·ΔW_iᵀ‖₁ + Σ_{i<j} ‖ΔW_i·ΔW_jᵀ‖₁), ‖·‖₁ the sum of absolute entries: the rows of each update orthogonal to
    those of the frozen W (preserve) and of the other updates (diversify). Thin products first: (W·A_iᵀ)·B_iᵀ and
    B_i·(A_i·A_jᵀ)·B_jᵀ, in at least float32, where half precision would overflow. With W of full rank exact
    orthogonality leaves ΔW = 0, so λ trades fit for preservation. λ of the paper belongs to the sum over out² entries
    (768 wide); `reduction="mean"` divides by entries and weights for other widths. Paper: N = 4 (2 on PACS), r = 4,
    λ = 1e-3, query and value; the authors' code has the defaults 1, 1 and 0.1. No dropout.
    Trainable: N·r·(in + out) for each matrix; ViT-B/16, query and value, N = 4, r = 4: 589,824.
    """

    groups: int = setting(4, "number N of LoRAs at each weight", minimum=1)
    rank: int = setting(4, "rank r of each of them", minimum=1)
    orthogonality: float = setting(1e-3, "weight λ of the penalty; 0: none", minimum=0.0)
    reduction: Literal["sum", "mean"] = setting("sum", "how the penalty goes over entries and weights")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", per_sample_gradients=True, requires_binding=True)

    def promises(self) -> Capabilities:
        return replace(self.capabilities, requires_binding=self.orthogonality > 0.0)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.rank * self.groups)
        return {"A": Spec(site.matrices(rank, site.in_features)), "B": Spec(site.matrices(site.out_features, rank))}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        lora_start(leaf.A, leaf.B, leaf.site.layout, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return leaf.B @ leaf.A

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.A, leaf.B)

    def penalty(self, part: Part) -> Tensor | None:
        if self.orthogonality == 0.0:
            return None
        values = [self._overlap(leaf) for leaf in part.leaves if isinstance(leaf, WeightLeaf)]
        total = torch.stack([value.to(values[0].device) for value in values]).sum()
        return self.orthogonality * (total if self.reduction == "sum" else total / len(values))

    def _overlap(self, leaf: WeightLeaf) -> Tensor:
        """Return Σ_i ‖W·ΔW_iᵀ‖₁ + Σ_{i<j} ‖ΔW_i·ΔW_jᵀ‖₁ at one place, of sums or means of absolute entries."""
        downs = at_least_single(leaf.A).chunk(self.groups, dim=-2)  # (*lead, r, in) each
        ups = at_least_single(leaf.B).chunk(self.groups, dim=-1)  # (*lead, out, r) each
        weight = leaf.weight().to(downs[0].dtype)
        overlap = weight.new_zeros(())
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            overlap = overlap + self._absolute((weight @ down.mT) @ up.mT)
            for other_down, other_up in zip(downs[:i], ups[:i], strict=True):
                overlap = overlap + self._absolute((other_up @ (other_down @ down.mT)) @ up.mT)
        return overlap

    def _absolute(self, product: Tensor) -> Tensor:
        return product.abs().sum() if self.reduction == "sum" else product.abs().mean()
