"""SSF."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite
from trimtab.kinds.initial import normal
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import at_least_single


@dataclass(frozen=True)
class SSF(ActivationMethod):
    """Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning. Lian et al. 2022, arXiv 2210.08823.

    Behind every linear map, convolution and norm of a frozen network: y ← γ ⊙ y + β, γ and β (C,) along the channel
    axis of the module's type (the authors' code guesses it from the sizes, and errs on a map of width C). Kept as
    γ − 1, which also small changes survive; never decayed, as in the authors' code. Merged into weight and bias, which
    is created where there is none; norms without a bias (RMSNorm) get no shift, since nothing could hold it.

    Initial γ ~ N(1, 0.02²), β ~ N(0, 0.02²) as in the authors' code, so it does not start at the base;
    `deviation=0` starts there exactly. `Compose(SSF(), FullTuning(targets="head"))` trains a new head with it.
    The query, key and value projection inside nn.MultiheadAttention is never called, and refused.
    Trainable: 2·C for each place (C for RMSNorm); ViT-B/16 205,824.
    """

    deviation: float = setting(
        0.02, "standard deviation of γ − 1 and β; 0: the base itself", minimum=0.0, maximum=100.0
    )
    targets: Targets = setting("operation", "modules whose output is scaled and shifted")

    capabilities = Capabilities(
        starts_at_base="no",
        merge="exact",
        linear_in_parameters=True,
        additive=False,
        creates_bias=True,
    )

    def promises(self) -> Capabilities:
        return replace(self.capabilities, starts_at_base="no" if self.deviation else "exact")

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        names = ("scale_change", "shift") if site.holds_shift else ("scale_change",)
        return {name: Spec((site.features,), decay=False) for name in names}

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        normal(leaf.scale_change, self.deviation, generator)
        if leaf.site.holds_shift:
            normal(leaf.shift, self.deviation, generator)

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        scaled = hidden * (1.0 + leaf.channels(leaf.scale_change, hidden))
        return scaled + leaf.channels(leaf.shift, hidden) if leaf.site.holds_shift else scaled

    def fold(self, leaf: ActivationLeaf) -> tuple[Tensor, Tensor | None]:
        return 1.0 + at_least_single(leaf.scale_change), at_least_single(leaf.shift) if leaf.site.holds_shift else None
