"""LoLDU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.initial import normal, uniform
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, frozen, setting

_PIVOT = 1e-6  # share of the largest pivot below which a row of U is not divided by its own


@dataclass(frozen=True)
class LoLDU(WeightMethod):
    """LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition. Shi et al. 2024, arXiv 2410.13618.

    W = P·L·diag(d)·U once, by LU with partial pivoting in at least float32: L (out, k) unit lower and U (k, in) unit
    upper triangular, P a permutation of the rows (kept inside L, never as a matrix), k = min(out, in). The first r
    entries z of the diagonal are trained: ΔW = s·P·L_r·diag(z − z₀)·U_r, s = alpha/r. A row of U whose pivot is (near)
    zero stays undivided, with d = 1. Triangular factors are not orthogonal, and the first r are not the most important
    ones: the choice is that of the pivoting. Nothing of z₀ enters the function, whatever `initial` says.
    `compat="official"`: where `initial` is "ones" or "zeros", the authors' residual is built with d_r and not with z₀,
    so the model does not start at the base. Their dropout setting is never applied. `train_scale` trains s as well:
    ΔW = P·L_r·diag(s·z − s₀·z₀)·U_r. L, U and z₀ are saved, since a tie of two pivots may be resolved otherwise
    elsewhere; z is exempt from weight decay. A convolution is decomposed as (out, in·kernel), an embedding transposed.
    The authors' alpha is 1 with ranks of 256 to 768, which divides the gradient by the rank; alpha is the rank here.
    Trainable: r for each matrix, one more with `train_scale`. LLaMA2-7B, query and value, r = 256: 16,384.
    """

    rank: int | None = setting(None, "number of trained diagonal entries; None: all of them", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank (s = 1)", above=0.0)
    initial: Literal["lu", "uniform", "normal", "constant", "ones", "zeros"] = setting(
        "lu", "z₀: the diagonal d_r itself, U(±|mean|/2), N(mean, deviation²) or the mean of d_r, ones, or zeros"
    )
    train_scale: bool = setting(False, "train the factor s as well")
    compat: Literal["paper", "official"] = setting("paper", "start at the base, or where the authors' code starts")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True)

    def promises(self) -> Capabilities:
        start: Literal["exact", "no"] = "no" if self._starts_elsewhere else "exact"
        return replace(self.capabilities, starts_at_base=start, linear_in_parameters=not self.train_scale)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = min(site.in_features, site.out_features) if self.rank is None else site.rank(self.rank)
        diagonal, single = (*site.layout.lead, rank), (*site.layout.lead, 1)
        specs = {
            "z": Spec(diagonal, decay=False),
            "start": frozen(*diagonal, stored="always"),  # s₀·z₀
            "L": frozen(*site.matrices(site.out_features, rank), stored="always"),
            "U": frozen(*site.matrices(rank, site.in_features), stored="always"),
        }
        return specs | ({"scale": Spec(single, decay=False)} if self.train_scale else {})

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        rank, precision = leaf.z.shape[-1], torch.promote_types(leaf.z.dtype, torch.float32)
        permutation, lower, upper = torch.linalg.lu(leaf.weight().to(precision))
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        small = diagonal.abs() <= _PIVOT * diagonal.abs().amax(-1, keepdim=True)
        diagonal = torch.where(small, 1.0, diagonal)
        leaf.L.copy_((permutation @ lower)[..., :rank])
        leaf.U.copy_((upper / diagonal.unsqueeze(-1))[..., :rank, :])
        self._fill(leaf.z, diagonal[..., :rank], generator)
        leaf.start.copy_(diagonal[..., :rank] if self._starts_elsewhere else leaf.z)
        leaf.start.mul_(self._scale(leaf.site))
        if self.train_scale:
            leaf.scale.fill_(self._scale(leaf.site))

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return leaf.L @ (self._middle(leaf).unsqueeze(-1) * leaf.U)

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.U, leaf.L, middle=self._middle(leaf))

    def _middle(self, leaf: WeightLeaf) -> Tensor:
        """Return s·z − s₀·z₀ (*lead, r)."""
        scale = leaf.scale if self.train_scale else self._scale(leaf.site)
        return scale * leaf.z - leaf.start

    def _scale(self, site: ParameterSite) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (min(site.in_features, site.out_features) if self.rank is None else self.rank)

    @property
    def _starts_elsewhere(self) -> bool:
        return self.compat == "official" and self.initial in ("ones", "zeros")

    def _fill(self, z: Tensor, diagonal: Tensor, generator: torch.Generator) -> None:
        """Fill z (*lead, r) with its start."""
        mean = diagonal.mean(-1, keepdim=True)
        if self.initial == "lu":
            z.copy_(diagonal)
        elif self.initial == "uniform":
            uniform(z, 0.5, generator)
            z.mul_(mean.abs())
        elif self.initial == "normal":
            normal(z, 1.0, generator)
            z.mul_(diagonal.std(-1, keepdim=True) if z.shape[-1] > 1 else 0.0).add_(mean)
        else:
            z.copy_(mean.expand_as(z) if self.initial == "constant" else torch.full_like(z, self.initial == "ones"))
