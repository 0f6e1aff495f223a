"""DoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kinds.initial import lora_start
from trimtab.kinds.lowrank import add_update, lora_scale
from trimtab.kinds.rescaling import rescale
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, reference_update
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class DoRA(WeightMethod):
    """DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al. 2024, arXiv 2402.09353.

    W′ = m ⊙ (W + s·B·A) / ‖W + s·B·A‖, where m (out,) scales rows and ‖·‖ (out,) is the norm of each row over the
    inputs; m starts at ‖W‖, A and B as in LoRA: starts at the base. The norm is a constant for the gradient (section
    4.3), and the bias is not rescaled. ‖W‖² is kept, so that the norm needs no dense update:
    ‖W + s·B·A‖² = ‖W‖² + 2s·rowsum((W·Aᵀ) ∘ B) + s²·rowsum((B·A·Aᵀ) ∘ B).
    Dropout acts on the input of all that is added to the base's output, (m/‖·‖ − 1)·W·x included, as in the authors'
    code; it costs a second base product. Each group of a convolution and each expert of a stack has its own A, B, m;
    on an embedding, rows are the dimensions of the vectors. m is exempt from weight decay, which would shrink the base.
    Trainable: r·(in + out) + out for each matrix.
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the change", minimum=0.0, maximum=0.99)
    rank_stabilized: bool = setting(False, "scale by 1/√rank instead of 1/rank (rsLoRA)")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, rows = site.rank(self.rank), (*site.layout.lead, site.out_features)
        return {
            "A": Spec(site.matrices(rank, site.in_features)),
            "B": Spec(site.matrices(site.out_features, rank)),
            "magnitude": Spec(rows, decay=False),
            "squared_norm": frozen(*rows, stored="derived"),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        lora_start(leaf.A, leaf.B, leaf.site.layout, generator)
        leaf.squared_norm.copy_(leaf.weight().to(leaf.magnitude.dtype).square().sum(-1))
        leaf.magnitude.copy_(leaf.squared_norm.sqrt())

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.scale * (leaf.B @ leaf.A)

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        changed = weight + self.delta(leaf)
        return _ratio(leaf, changed.detach().square().sum(-1)).unsqueeze(-1) * changed

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.A, leaf.B, self.scale)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        if leaf.training and self.dropout > 0.0:
            return self.unfused(leaf, x)
        return self._rescaled(leaf, super().fused(leaf, x))

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        layout, factors = leaf.site.layout, self.factors(leaf)
        if not (leaf.training and self.dropout > 0.0 and x.is_floating_point()):
            return self._rescaled(leaf, add_update(layout, leaf.target, x, y, factors, training=False))
        dropped = torch.dropout(x.to(leaf.A.dtype), self.dropout, train=True)
        product = reference_update(leaf, dropped, leaf.weight().to(leaf.A.dtype))
        changed = add_update(layout, leaf.target, dropped, product, factors, training=False)
        ratio = layout.channels(_ratio(leaf, self._squared_norm(leaf)), changed)
        return y + (ratio * changed - product).to(y.dtype)

    def _rescaled(self, leaf: WeightLeaf, y: Tensor) -> Tensor:
        """Scale all of an output but its bias; written as a difference, so that the start is the base exactly."""
        axis, ratio = leaf.site.layout.axis, _ratio(leaf, self._squared_norm(leaf)).flatten()
        return rescale(y.movedim(axis, -1), ratio, leaf.bias()).movedim(-1, axis)

    def _squared_norm(self, leaf: WeightLeaf) -> Tensor:
        A, B = leaf.A, leaf.B
        with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
            cross = ((A @ leaf.weight().to(A.dtype).mT).mT * B).sum(-1)  # thin factor first: several times faster
            gram = ((B @ (A @ A.mT)) * B).sum(-1)  # (out, r) · (r, r)
            squared: Tensor = leaf.squared_norm + 2.0 * self.scale * cross + self.scale**2 * gram
        return squared


def _ratio(leaf: WeightLeaf, squared_norm: Tensor) -> Tensor:
    """Return m/‖·‖ (*lead, out); a row of zeros stays one instead of becoming 0/0."""
    return leaf.magnitude / squared_norm.clamp_min(torch.finfo(squared_norm.dtype).tiny).sqrt()
