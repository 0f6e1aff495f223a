"""Prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kinds.initial import normal
from trimtab.kinds.tokens import AttentionCall, AttentionLeaf, AttentionMethod, AttentionSite
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class PrefixTuning(AttentionMethod):
    """Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang 2021, arXiv 2101.00190.

    At every attention K ← [P_k; K] and V ← [P_v; V], with P_k, P_v (l, width of all key heads); the prefix is not
    multiplied by the projections, carries no position, and is visible to every query. The positions of the real
    tokens do not move (huggingface/peft and the original move them by l, which learned and rotary positions see: pass
    position_ids that start at l for their numbers). T5's bias by distance is zero towards the prefix (peft's is not).
    Initial N(0, deviation²), the direct tables of arXiv 2110.04366. Never starts at the base: even zero keys take
    softmax mass. Trainable: 2·l·width for each attention.
    """

    length: int = setting(30, "number of prefix positions", minimum=1)
    deviation: float = setting(0.02, "standard deviation of the initial tables", minimum=0.0)
    targets: Targets = setting("attention-core", "attentions to prepend to")

    capabilities = Capabilities(
        starts_at_base="no",
        merge="none",
        merge_reason="added keys and values have no weight to be folded into",
        linear_in_parameters=True,
        routable=False,
    )

    def tensors(self, site: AttentionSite) -> dict[str, Spec]:
        return {
            "key": Spec((self.length, site.key_features), decay=False),
            "value": Spec((self.length, site.value_features), decay=False),
        }

    def initialise(self, leaf: AttentionLeaf, generator: torch.Generator) -> None:
        normal(leaf.key, self.deviation, generator)
        normal(leaf.value, self.deviation, generator)

    def attend(self, leaf: AttentionLeaf, call: AttentionCall) -> Tensor:
        return call.prepend(leaf.key, leaf.value).run()
