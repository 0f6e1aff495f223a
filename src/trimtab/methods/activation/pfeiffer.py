"""Pfeiffer's adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import SettingError, TargetError
from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite, feed_forward_of, hidden_width
from trimtab.kinds.bottleneck import NOT_MERGEABLE, Activation, bottleneck, bottleneck_tensors, start_normal
from trimtab.kinds.placement import norm_behind
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.structure import FeedForward, Structure, is_norm
from trimtab.targets import resolve


@dataclass(frozen=True)
class PfeifferAdapter(ActivationMethod):
    """AdapterFusion: Non-Destructive Task Composition for Transfer Learning (its single adapter).

    Pfeiffer et al. 2020, arXiv 2005.00247; code: adapter-hub/adapters. One bottleneck for each block, behind the
    feed-forward part. With f its output, x its residual and s = f + x, the block's own frozen LN is used twice:
    u = LN(s), y = LN(s + W_up·relu(W_down·u + b_down) + b_up), W_down (m, d), W_up (d, m). Pre-norm blocks have no LN
    there: y = s + W_up·relu(W_down·s + b_down) + b_up, at the block's output. Which of the two holds is read off the
    structure; `norm` states it where that fails, and a norm that runs before its feed-forward part stops the forward.

    Initial N(0, 0.02²), biases zero: not the base. m = d // reduction_factor, or `bottleneck`. The paper's `leave_out`
    is a range of blocks: targets="feed-forward[0:6]". Trainable: 2·d·m + d + m for each block (BERT-base, m = 48:
    894,528).
    """

    reduction_factor: int = setting(16, "hidden width over bottleneck width", minimum=1)
    bottleneck: int | None = setting(None, "width m of the bottleneck; None: by the reduction factor", minimum=1)
    activation: Activation = setting("relu", "activation function in the bottleneck")
    deviation: float = setting(0.02, "standard deviation of the initial matrices", above=0.0, maximum=100.0)
    norm: Literal["detect", "post", "pre"] = setting("detect", "whether the block's last norm follows the residual sum")
    targets: Targets = setting("feed-forward", "feed-forward parts behind which a bottleneck stands")

    capabilities = Capabilities(starts_at_base="approximate", merge="none", merge_reason=NOT_MERGEABLE)

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        parts = dict.fromkeys(feed_forward_of(structure, item) for item in resolve(structure, targets))
        return [self._site(structure, part) for part in parts]

    def _site(self, structure: Structure, part: FeedForward) -> ActivationSite:
        norm = norm_behind(structure, part) if self.norm == "detect" else None
        if self.norm == "post":
            norms = [path for path, module in structure.within(part.block).items() if is_norm(module)]
            if not norms:
                raise TargetError(
                    f"PfeifferAdapter(norm='post'): the block {part.block!r} has no norm; use norm='pre'."
                )
            norm = norms[-1]
        width = hidden_width(structure, part)
        if norm is None:
            return ActivationSite(part.block, "output", width)
        return ActivationSite(norm, "twice", width, source=part.outputs[-1] if part.outputs else part.sink)

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        width = site.features // self.reduction_factor if self.bottleneck is None else self.bottleneck
        if width < 1:
            raise SettingError(
                f"PfeifferAdapter(reduction_factor={self.reduction_factor}) leaves no bottleneck at {str(site)!r} of "
                f"width {site.features}; use at most {site.features}, or state bottleneck=…"
            )
        return bottleneck_tensors(site, width)

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        start_normal(leaf, self.deviation, generator)

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        behind_norm = source if leaf.site.side == "twice" else hidden
        assert behind_norm is not None
        return hidden + bottleneck(leaf, behind_norm, self.activation)
