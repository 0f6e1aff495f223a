"""HUT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.rebuilt import fused_by_rebuilding
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class HUT(WeightMethod):
    """HUT: Hadamard Updated Transformation. Zhang, Zhou and Chen 2024, arXiv 2409.13501.

    W′[j, i] = (1 + γ_j)·(1 + A[i, j // (out/r)])·(1 + B[i mod r, j])·W[j, i] and b′ = b + β with A (in, r), B (r, out),
    γ and β (out,), all zero at the start: starts at the base. The paper's factors are 1 plus these; held like this,
    weight decay pulls to the base. There is no official code; "(M_A·1)ʳ ⊙ W ⊙ (1·M_B)ʳ" is read as a reshape: each
    input has r segments of outputs, each output r classes of inputs ("segments"). Only this reading makes r a number of
    parameters that the cost of forming W′ does not depend on, as the paper claims. `expansion="rank1"` is the other
    one, one factor for each input and output whatever r says. HyperAdapt (arXiv 2509.18629) is
    HUT(rank=1, scale_shift=False). γ does not scale the base's bias; merging creates a bias where β needs one, so where
    a weight is only read (experts, nn.MultiheadAttention) there is no β. A weight that is zero stays zero.
    For r = 1 the input and output are scaled; otherwise W′ is formed in each forward and again in backward.
    r must divide in and out. A convolution is seen as (out, in·kernel); not defined on embeddings.
    Trainable: r·(in + out) + 2·out; RoBERTa-large, query and value, r = 8: 884,736.
    """

    rank: int = setting(8, "number r of segments", minimum=1)
    expansion: Literal["segments", "rank1"] = setting("segments", "how the factors grow to the size of the weight")
    scale_shift: bool = setting(True, "scale γ and shift β of the outputs")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False, creates_bias=True)

    def promises(self) -> Capabilities:
        return replace(self.capabilities, creates_bias=self.scale_shift)

    @property
    def segments(self) -> int:
        """Number of segments in effect."""
        return self.rank if self.expansion == "segments" else 1

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("HUT", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        r, lead = self.segments, site.layout.lead
        if site.in_features % r or site.out_features % r:
            raise SettingError(
                f"HUT(rank={r}): {r} segments do not divide {str(site)!r} of shape {site.out_features}×"
                f"{site.in_features}; use a common divisor of both, or leave this layer out of the targets."
            )
        specs = {"A": Spec(site.matrices(site.in_features, r)), "B": Spec(site.matrices(r, site.out_features))}
        if self.scale_shift:
            specs["gamma"] = Spec((*lead, site.out_features))
        if self._shifts(site):
            specs["beta"] = Spec((*lead, site.out_features))
        return specs

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return _changed(weight, leaf.A, leaf.B, *self._gamma(leaf))

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return _mask(leaf.A, leaf.B, *self._gamma(leaf)) * leaf.weight()

    def bias(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor | None:
        if not self._shifts(leaf.site):
            return bias
        shift = leaf.beta.flatten()
        return shift if bias is None else bias + shift

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        target: Any = leaf.target
        if self.segments > 1:
            return self._shifted(leaf, fused_by_rebuilding(leaf, x, _changed, leaf.A, leaf.B, *self._gamma(leaf)))
        if not target.weight.dtype == x.dtype == leaf.A.dtype:
            return self.unfused(leaf, x)
        scale = 1.0 + leaf.B.squeeze(0)  # (out,)
        scale = scale * (1.0 + leaf.gamma) if self.scale_shift else scale
        output = F.linear(x + x * leaf.A.squeeze(1), target.weight) * scale
        return self._shifted(leaf, output if target.bias is None else output + target.bias)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        return self._shifted(leaf, y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype))

    def _shifted(self, leaf: WeightLeaf, y: Tensor) -> Tensor:
        return y + leaf.site.layout.channels(leaf.beta.flatten(), y).to(y.dtype) if self._shifts(leaf.site) else y

    def _shifts(self, site: ParameterSite) -> bool:
        return self.scale_shift and site.called

    def _gamma(self, leaf: WeightLeaf) -> tuple[Tensor, ...]:
        return (leaf.gamma,) if self.scale_shift else ()


def _mask(A: Tensor, B: Tensor, *gamma: Tensor) -> Tensor:
    """Return (1 + γ)·(1 + A)·(1 + B) − 1 spread over (*lead, out, in)."""
    lead, inputs, r, outputs = A.shape[:-2], A.shape[-2], A.shape[-1], B.shape[-1]
    segments = (1.0 + A).mT.reshape(*lead, r, 1, inputs)  # (*lead, segment of outputs, –, in)
    outer = (1.0 + B).mT  # (*lead, out, class of inputs)
    for scale in gamma:
        outer = outer * (1.0 + scale).unsqueeze(-1)
    classes = outer.reshape(*lead, r, outputs // r, 1, r).expand(*lead, r, outputs // r, inputs // r, r)
    return (segments * classes.reshape(*lead, r, outputs // r, inputs) - 1.0).reshape(*lead, outputs, inputs)


def _changed(weight: Tensor, A: Tensor, B: Tensor, *gamma: Tensor) -> Tensor:
    return weight + _mask(A, B, *gamma) * weight
