"""The (scaled) parallel adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite, feed_forward_of, parallel_site
from trimtab.kinds.bottleneck import (
    NOT_MERGEABLE,
    Activation,
    bottleneck,
    bottleneck_tensors,
    start_at_zero,
    start_normal,
)
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.structure import Structure
from trimtab.targets import resolve


@dataclass(frozen=True)
class ParallelAdapter(ActivationMethod):
    """Towards a Unified View of Parameter-Efficient Transfer Learning. He et al. 2021, arXiv 2110.04366.

    Beside the feed-forward part: FFN(x) + s·(W_up·relu(W_down·x + b_down) + b_up), where x is that part's own input
    (behind the norm in pre-norm models), W_down (m, d), W_up (d, m). `learn_scale` trains s, from `scale` on (the
    authors' learnable scale starts at 1). `layer_norm` puts a LayerNorm on x ("in") or on the scaled output ("out").
    Start "lora": W_up = 0, the base exactly; "bert": both N(0, 0.02²), not the base. Dropout acts in the bottleneck.

    The sum is formed at the part's output projection, or at the part where it is a module of its own; the authors
    form it behind the dropout that follows. Paper: m = 512, s = 4 for BART-large; m = 16, s = 2 for RoBERTa-base; s is
    tuned like a learning rate. Trainable: 2·d·m + d + m for each part, 1 with `learn_scale`, 2·d with `layer_norm`.
    """

    bottleneck: int = setting(512, "width m of the bottleneck", minimum=1)
    scale: float = setting(4.0, "factor s of the bottleneck's output", above=0.0)
    learn_scale: bool = setting(False, "train the factor s")
    start: Literal["lora", "bert"] = setting("lora", "initial matrices: up-projection zero, or both N(0, 0.02²)")
    layer_norm: Literal["none", "in", "out"] = setting("none", "place of a LayerNorm in the branch")
    activation: Activation = setting("relu", "activation function in the bottleneck")
    dropout: float = setting(0.0, "dropout inside the bottleneck", minimum=0.0, maximum=0.99)
    targets: Targets = setting("feed-forward", "feed-forward parts beside which a bottleneck stands")

    capabilities = Capabilities(starts_at_base="exact", merge="none", merge_reason=NOT_MERGEABLE)

    def promises(self) -> Capabilities:
        return self.capabilities if self.start == "lora" else replace(self.capabilities, starts_at_base="no")

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        parts = dict.fromkeys(feed_forward_of(structure, item) for item in resolve(structure, targets))
        return [parallel_site(structure, part) for part in parts]

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        specs = bottleneck_tensors(site, self.bottleneck)
        if self.learn_scale:
            specs["scale"] = Spec((1,), decay=False)
        if self.layer_norm != "none":
            specs["norm_weight"] = Spec((site.features,), decay=False)
            specs["norm_bias"] = Spec((site.features,), decay=False)
        return specs

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        if self.start == "lora":
            start_at_zero(leaf, generator)
        else:
            start_normal(leaf, 0.02, generator)
        if self.learn_scale:
            leaf.scale.fill_(self.scale)
        if self.layer_norm != "none":
            leaf.norm_weight.fill_(1.0)

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        assert source is not None
        x = self._normed(leaf, source) if self.layer_norm == "in" else source
        branch = bottleneck(leaf, x, self.activation, self.dropout) * (leaf.scale if self.learn_scale else self.scale)
        return hidden + (self._normed(leaf, branch) if self.layer_norm == "out" else branch)

    def _normed(self, leaf: ActivationLeaf, x: Tensor) -> Tensor:
        return F.layer_norm(x, (leaf.site.features,), leaf.norm_weight, leaf.norm_bias)
