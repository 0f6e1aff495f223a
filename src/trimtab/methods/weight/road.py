"""RoAd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import SettingError, TargetError
from trimtab.kinds.blocks import block_count, cut
from trimtab.kinds.layouts import ConvolutionLayout
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class RoAd(WeightMethod):
    """RoAd: 3-in-1: 2D Rotary Adaptation. Liao and Monz 2024, arXiv 2409.00119.

    W′ = R·W, bias′ = R·bias: pairs of outputs are rotated and scaled, y_i′ = p_i·y_i − q_i·y_j for the first of a pair
    and p_j·y_j + q_j·y_i for the second, p = α·cos θ, q = α·sin θ, with θ = 0 and α = 1: starts at the base. Pairs are
    (i, i + g/2) within groups of g outputs. `variant` 1 has one θ and α for each pair, 2 for each output, 4 for each
    entry of the pair's matrix. It acts on the output elementwise and costs no product. Where a weight is only read (the
    projection inside nn.MultiheadAttention, stacked experts), its bias stays. No weight decay.
    Not defined on convolutions; g must divide out. Trainable: out, 2·out or 4·out for each matrix.
    """

    variant: int = setting(1, "numbers for each pair: 1 shared, 2 by output, 4 by entry", choices=(1, 2, 4))
    group_size: int = setting(64, "outputs g within which pairs are formed; even", minimum=2)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    def validate(self) -> None:
        if self.group_size % 2:
            raise SettingError(f"RoAd(group_size={self.group_size}): outputs are rotated in pairs; take an even size.")

    def check_site(self, site: ParameterSite) -> None:
        if isinstance(site.layout, ConvolutionLayout):
            raise TargetError(f"RoAd is not defined for the convolution {site.path!r}; leave it out of the targets.")
        block_count("RoAd", site, site.out_features, self.group_size)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        spec = Spec((*site.layout.lead, site.out_features * self.variant // 2), decay=False)
        return {"theta": spec, "alpha": spec}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        leaf.alpha.fill_(1.0)

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return self._rotated(leaf, weight.mT).mT

    def delta(self, leaf: WeightLeaf) -> Tensor:
        weight = leaf.weight()
        return self.weight(leaf, weight) - weight

    def bias(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self._rotated(leaf, bias)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        return self._rotated(leaf, y).to(y.dtype)

    def _rotated(self, leaf: WeightLeaf, rows: Tensor) -> Tensor:
        """Rotate the last axis (out); with leading matrices, rows (*lead, any, out)."""
        p, q = (factor.unsqueeze(-2) if leaf.site.layout.lead else factor for factor in self._factors(leaf))
        first, second = cut(rows, -1, 2, self.group_size // 2).unbind(-2)
        turned = torch.stack((-second, first), dim=-2).flatten(-3)
        return rows * p + turned * q

    def _factors(self, leaf: WeightLeaf) -> tuple[Tensor, Tensor]:
        """Return p and q (*lead, out)."""
        half = self.group_size // 2
        shape = {1: (-1, 1, half), 2: (-1, 1, 2 * half), 4: (-1, 2, 2 * half)}[self.variant]
        theta, alpha = cut(leaf.theta, *shape), cut(leaf.alpha, *shape)  # (*lead, groups, kinds, …)
        of_p, of_q = slice(0, 1), slice(-1, None)
        p, q = alpha[..., of_p, :] * theta[..., of_p, :].cos(), alpha[..., of_q, :] * theta[..., of_q, :].sin()
        if self.variant == 1:  # both of a pair
            p, q = p.expand(*p.shape[:-2], 2, half), q.expand(*q.shape[:-2], 2, half)
        return p.flatten(-3), q.flatten(-3)
