"""Houlsby's adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite
from trimtab.kinds.bottleneck import NOT_MERGEABLE, Activation, bottleneck, bottleneck_tensors
from trimtab.kinds.composition import make_method, weakest
from trimtab.kinds.initial import truncated_normal
from trimtab.method import Capabilities, Method, Spec, Targets, setting


@dataclass(frozen=True)
class HoulsbyAdapter(ActivationMethod):
    """Parameter-Efficient Transfer Learning for NLP. Houlsby et al. 2019, arXiv 1902.00751.

    After both sublayers of a block, y = LN(x + A(f)) with A(f) = f + W_up·act(W_down·f + b_down) + b_up, where f is the
    sublayer's output (d channels), W_down (m, d), W_up (d, m). In pre-norm models the sum has no LN; nothing else
    changes. Cross-attention is a sublayer too. A acts on the output projection, before the model's own dropout there.

    Initial: truncated normal of standard deviation 1e-3, biases zero: nearly the base. The paper's text says 1e-2; the
    default is the authors' code. Their activation function is GELU. The paper trains all norms of the model as well:
    `train_norms` adds LNTuning to the adapter, and the head, where it is new, is
    `Compose(HoulsbyAdapter(), FullTuning(targets="head"))`.
    Trainable: 2·d·m + d + m for each place, and 2·d for each LayerNorm.
    """

    bottleneck: int = setting(64, "width m of the bottleneck; the paper tries 8, 64 and 256", minimum=1)
    activation: Activation = setting("gelu", "activation function in the bottleneck")
    deviation: float = setting(1e-3, "standard deviation of the initial matrices", above=0.0, maximum=100.0)
    train_norms: bool = setting(True, "also train every norm of the model, as the paper does")
    targets: Targets = setting("attention-output | feed-forward", "modules whose output is adapted")

    capabilities = Capabilities(starts_at_base="approximate", merge="none", merge_reason=NOT_MERGEABLE)

    def parts(self) -> tuple[Method, ...]:
        if not self.train_norms:
            return (self,)
        return replace(self, train_norms=False), make_method("LNTuning", {"targets": "norm"})

    def promises(self) -> Capabilities:
        return weakest(self.parts()) if self.train_norms else self.capabilities

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        return bottleneck_tensors(site, self.bottleneck)

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        truncated_normal(leaf.down, self.deviation, generator)
        truncated_normal(leaf.up, self.deviation, generator)

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        return hidden + bottleneck(leaf, hidden, self.activation)
