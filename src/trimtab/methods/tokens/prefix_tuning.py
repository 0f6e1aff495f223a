"""Prefix tuning."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.initial import normal, uniform
from trimtab.kinds.tokens import AttentionCall, AttentionLeaf, AttentionMethod, AttentionSite
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class PrefixTuning(AttentionMethod):
    """Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang 2021, arXiv 2101.00190.

    At every attention K ← [P_k; K] and V ← [P_v; V], with P_k, P_v (l, width of all key heads); the prefix is not
    multiplied by the projections, carries no position, and is visible to every query. The positions of the real
    tokens do not move (huggingface/peft and the original move them by l, which learned and rotary positions see: pass
    position_ids that start at l for their numbers). T5's bias by distance is zero towards the prefix (peft's is not).
    Never starts at the base: even zero keys take softmax mass.

    Direct tables start at N(0, deviation²) (arXiv 2110.04366). With `hidden` h the tables come from a network as in the
    paper (h = 512, or 800): a table T (l, w) for all attentions, tanh(T·inᵀ + b) (l, h), and one linear map from h for
    each P_k and P_v, all with PyTorch's own start; w is the width of the first attention's keys. Saving keeps the
    tables alone and names plain PrefixTuning; a training checkpoint keeps the network. The original has one network
    for each of encoder, decoder and cross-attention.
    Trainable: 2·l·width for each attention; with `hidden` l·w + (w + 1)·h + 2·(h + 1)·width for each attention.
    """

    length: int = setting(30, "number of prefix positions", minimum=1)
    deviation: float = setting(0.02, "standard deviation of the initial direct tables", minimum=0.0, maximum=100.0)
    hidden: int | None = setting(None, "width of the network that makes the tables; None: direct tables", minimum=1)
    targets: Targets = setting("attention-core", "attentions to prepend to")

    capabilities = Capabilities(
        starts_at_base="no",
        merge="none",
        merge_reason="added keys and values have no weight to be folded into",
    )

    def tensors(self, site: AttentionSite) -> dict[str, Spec]:
        widths = {"key": site.key_features, "value": site.value_features}
        if self.hidden is None:
            return {name: Spec((self.length, width), decay=False) for name, width in widths.items()}
        weights = {f"{name}_weight": Spec((w, self.hidden), stored="training") for name, w in widths.items()}
        return weights | {f"{name}_bias": Spec((w,), stored="training", decay=False) for name, w in widths.items()}

    def shared(self, sites: list[AttentionSite]) -> dict[str, Spec]:
        if self.hidden is None:
            return {}
        width = sites[0].key_features
        return {
            "table": Spec((self.length, width), stored="training", decay=False),
            "inner_weight": Spec((self.hidden, width), stored="training"),
            "inner_bias": Spec((self.hidden,), stored="training", decay=False),
        }

    def initialise_shared(
        self, sites: list[AttentionSite], tensors: dict[str, Tensor], generator: torch.Generator
    ) -> None:
        if self.hidden is not None:
            normal(tensors["table"], 1.0, generator)
            bound = 1.0 / math.sqrt(tensors["table"].shape[1])
            uniform(tensors["inner_weight"], bound, generator)
            uniform(tensors["inner_bias"], bound, generator)

    def initialise(self, leaf: AttentionLeaf, generator: torch.Generator) -> None:
        for tensor in leaf.parameters(recurse=False):
            if self.hidden is None:
                normal(tensor, self.deviation, generator)
            else:
                uniform(tensor, 1.0 / math.sqrt(self.hidden), generator)

    def prefix(self, leaf: AttentionLeaf) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v, (l, width) each."""
        if self.hidden is None:
            return leaf.key, leaf.value
        inner = torch.tanh(F.linear(leaf.shared("table"), leaf.shared("inner_weight"), leaf.shared("inner_bias")))
        return F.linear(inner, leaf.key_weight, leaf.key_bias), F.linear(inner, leaf.value_weight, leaf.value_bias)

    def exported(self) -> PrefixTuning:
        return self if self.hidden is None else dataclasses.replace(self, hidden=None)

    def export(self, leaf: AttentionLeaf) -> dict[str, Tensor]:
        key, value = self.prefix(leaf)
        return {"key": key, "value": value}

    def attend(self, leaf: AttentionLeaf, call: AttentionCall) -> Tensor:
        return call.prepend(*self.prefix(leaf)).run()
