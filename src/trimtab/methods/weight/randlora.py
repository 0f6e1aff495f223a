"""RandLoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.kinds.random_bases import linear_with_random_bases, scaled_basis
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class RandLoRA(WeightMethod):
    """RandLoRA: Full-rank parameter-efficient fine-tuning of large models. Albert et al. 2025, arXiv 2502.00987.

    ΔW = s·Σ_b B_b·Λ_b·A·Γ_b over n = ⌈small/r⌉ bases: full rank. A (r, small) and B (large, n, r) are random, frozen
    and shared by all places, each of which uses its slice; small and large are the smaller and larger of in and out.
    Trained are the diagonals Λ (r, n) = 0 and Γ (n, small) = 1/max(n, small): starts at the base. Where out < in the
    product is transposed. The more rank, the fewer bases and the fewer trained numbers: n·(r + small) for each
    matrix; RoBERTa-base, query and value, rank 64: 239,616. Γ has no gradient before the first step.
    As in all published code, column (b, k) of B meets row (k, b) of the scaled A in flattened order, which is the sum
    above with B's columns permuted: equal in distribution, and needed to exchange weights.
    `convention`: s = alpha/(r·√n) with alpha = 2r ("authors": their peft fork and NLG code), or alpha/r with
    alpha = 20r ("peft"): far apart, hence never guessed. `bases` "sparse" and "very_sparse" draw −1, 0, 1 with
    P(≠0) = 1/3, 1/√small. The draw depends on all places together and on `projection_seed` as peft's on its key;
    values are those of bfloat16. The file keeps a hash of A and B, and loading stops if they cannot be redrawn.
    """

    rank: int = setting(32, "rank of each base; the number of bases falls with it", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: as the convention has it", above=0.0)
    convention: Literal["authors", "peft"] = setting("authors", "scale alpha/(rank·√n) or alpha/rank")
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    bases: Literal["dense", "sparse", "very_sparse"] = setting("dense", "distribution of the random bases")
    projection_seed: int | None = setting(None, "seed of the bases; None: from the adapter's seed", minimum=0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def scale(self, site: ParameterSite) -> float:
        """Return the factor s at one place."""
        alpha = (2.0 if self.convention == "authors" else 20.0) * self.rank if self.alpha is None else self.alpha
        return alpha / self.rank / (math.sqrt(self._count(site)) if self.convention == "authors" else 1.0)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        count, small = self._count(site), min(site.in_features, site.out_features)
        return {"Lambda": Spec(site.matrices(self.rank, count)), "Gamma": Spec(site.matrices(count, small))}

    def shared(self, sites: list[ParameterSite]) -> dict[str, Spec]:
        widths = max(site.out_features for site in sites), max(site.in_features for site in sites)
        small, large = min(widths), max(widths)
        shape_of_b = (large, -(-small // self.rank), self.rank)
        return {"A": frozen(self.rank, small, stored="seed"), "B": frozen(*shape_of_b, stored="seed")}

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        if self.projection_seed is not None:
            generator = torch.Generator().manual_seed(self.projection_seed)
        (rank, small), (large, count, _) = tensors["A"].shape, tensors["B"].shape
        if self.bases == "dense":
            A = _kaiming((rank, 1, small), generator)
            B = torch.cat([_kaiming((large, 1, rank), generator) for _ in range(count)], dim=1)
        else:
            sparsity = 3.0 if self.bases == "sparse" else math.sqrt(small)
            A, B = (_signs(shape, sparsity, generator) for shape in ((rank, 1, small), (large, count, rank)))
        tensors["A"].copy_((A / A.std())[:, 0])
        tensors["B"].copy_(B / B.std())

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        leaf.Gamma.fill_(1.0 / max(leaf.Gamma.shape[-2:]))

    def delta(self, leaf: WeightLeaf) -> Tensor:
        A, B = self._slices(leaf)
        basis = leaf.Lambda.unsqueeze(-1) * A.unsqueeze(-2) * leaf.Gamma.unsqueeze(-3)  # (*lead, r, n, small)
        product = self.scale(leaf.site) * (B @ basis.flatten(-3, -2))  # (*lead, large, small)
        return product if leaf.site.out_features >= leaf.site.in_features else product.mT

    def factors(self, leaf: WeightLeaf) -> Factors:
        A, B = self._slices(leaf)
        basis = scaled_basis(A, leaf.Lambda, leaf.Gamma)
        B = B.expand(*basis.shape[:-2], *B.shape)
        tall = leaf.site.out_features >= leaf.site.in_features
        down, up = (basis, B) if tall else (B.mT, basis.mT)
        return Factors(down, up, self.scale(leaf.site), dropout=self.dropout)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        target: Any = leaf.target
        if (leaf.training and self.dropout > 0.0) or not target.weight.dtype == x.dtype == leaf.Lambda.dtype:
            return super().fused(leaf, x)
        A, B = self._slices(leaf)
        scale = self.scale(leaf.site)
        return linear_with_random_bases(x, target.weight, target.bias, A, B, leaf.Lambda, leaf.Gamma, scale)

    def _count(self, site: ParameterSite) -> int:
        return -(-min(site.in_features, site.out_features) // self.rank)

    def _slices(self, leaf: WeightLeaf) -> tuple[Tensor, Tensor]:
        """Return this place's A (r, small) and B (large, n·r), both as views."""
        small, large = sorted((leaf.site.in_features, leaf.site.out_features))
        columns = self._count(leaf.site) * self.rank
        return leaf.shared("A")[:, :small], leaf.shared("B").flatten(1)[:large, :columns]


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    draw, edge = torch.rand(shape, generator=generator), 1.0 / (2.0 * sparsity)
    return (draw > 1.0 - edge).float() - (draw < edge).float()
