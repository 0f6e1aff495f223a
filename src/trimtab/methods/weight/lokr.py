"""LoKr."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.blocks import cut
from trimtab.kinds.initial import kaiming_uniform
from trimtab.kinds.layouts import ConvolutionLayout
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class LoKr(WeightMethod):
    """LoKr: low-rank Kronecker product (KronA, LyCORIS). Edalati et al. 2022, arXiv 2212.10650.

    ΔW = s·W₁ ⊗ W₂, s = alpha/r, with W₁ (l, m), W₂ (k, n), l·k = out, m·n = in. Every width is split into two: the pair
    of the smallest sum, or, with `factor`, `factor` and the rest where it divides, else at most `factor`. W₂ = B₂·A₂
    with B₂ (k, r), A₂ (r, n) where r < max(k, n)/2; W₁ only with `decompose_both`, by the same rule. `zero="first"`
    (peft): W₁ or B₁ = 0; "second" (LyCORIS): W₂ or A₂ = 0; all others uniform within 1/√columns: starts at the base.
    W₁ ⊗ W₂ is never formed on linear layers: x as (m, n) goes through W₂ along n, then through W₁ along m.
    On a convolution the channels are split and the kernel belongs to W₂; each group and expert by itself. LyCORIS'
    Tucker form of kernels is not offered. Not defined on embeddings.
    LyCORIS has s = 1 where both factors are whole, which is what alpha=None gives everywhere.
    Trainable: |W₁| + |W₂|, where a decomposed one counts r·(rows + columns), for each matrix.
    """

    rank: int = setting(8, "rank of the decomposed factors", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank (s = 1)", above=0.0)
    factor: int | None = setting(None, "first number of each split; None: as square as possible", minimum=1)
    decompose_both: bool = setting(False, "decompose W₁ too where that is smaller")
    zero: Literal["first", "second"] = setting("first", "the factor that starts at zero")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("LoKr", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        kernel = 1
        if isinstance(site.layout, ConvolutionLayout):
            kernel = site.in_features // site.shape[1]
        (l, k), (m, n) = (split_width(width, self.factor) for width in (site.out_features, site.in_features // kernel))  # noqa: E741
        whole = not (self.decompose_both and self.rank < max(l, m) / 2)
        first = {"W1": (l, m)} if whole else {"B1": (l, self.rank), "A1": (self.rank, m)}
        whole = not self.rank < max(k, n) / 2
        second = {"W2": (k, n * kernel)} if whole else {"B2": (k, self.rank), "A2": (self.rank, n * kernel)}
        return {name: Spec(site.matrices(*shape)) for name, shape in (first | second).items()}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        zeros = ("W1", "B1") if self.zero == "first" else ("W2", "A2")
        for name in self.tensors(leaf.site):
            if name not in zeros:
                kaiming_uniform(getattr(leaf, name), generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        first, second = (self._factor(leaf, place) for place in ("1", "2"))
        product = torch.einsum("...lm,...kn->...lkmn", first, second)
        return self._scale * product.flatten(-4, -3).flatten(-2)  # (*lead, out, in)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(leaf.site.layout, ConvolutionLayout):
            return y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype)
        first, second = (self._factor(leaf, place) for place in ("1", "2"))
        split_input = cut(x.to(first.dtype), first.shape[-1], -1)  # (..., m, n)
        hidden = F.linear(split_input, self._scale * second)  # (..., m, k)
        return y + (first @ hidden).flatten(-2).to(y.dtype)  # (..., l, k) as (..., out)

    @property
    def _scale(self) -> float:
        return lora_scale(self.alpha, self.rank, rank_stabilized=False)

    def _factor(self, leaf: WeightLeaf, place: Literal["1", "2"]) -> Tensor:
        if f"W{place}" in self.tensors(leaf.site):
            return getattr(leaf, f"W{place}")  # type: ignore[no-any-return]
        return getattr(leaf, f"B{place}") @ getattr(leaf, f"A{place}")  # type: ignore[no-any-return]


def split_width(width: int, factor: int | None) -> tuple[int, int]:
    """Return two numbers of product `width`, the first at most the second unless `factor` divides `width`.

    None: of the smallest sum. Else (factor, rest) where it divides, or the largest divisor that is at most `factor`.
    """
    if factor is not None and width % factor == 0:
        return factor, width // factor
    limit = math.isqrt(width) if factor is None else min(factor, math.isqrt(width))
    first = next(divisor for divisor in range(limit, 0, -1) if width % divisor == 0)
    return first, width // first
