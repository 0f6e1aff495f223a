"""Prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.initial import normal, uniform
from trimtab.kinds.prompt import PromptLeaf, PromptMethod, PromptSite
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import dense_weight


@dataclass(frozen=True)
class PromptTuning(PromptMethod):
    """The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al. 2021, arXiv 2104.08691.

    A prompt P (l, d) stands in front of the input embeddings; mask and labels grow with it, outputs for single tokens
    come without it. In a row padded on the left it stands in front of the padding, as in huggingface/peft, and so far
    from the tokens: pad a decoder's training batch on the right, or pass position_ids (generate makes its own).
    The paper uses l = 100 and a learning rate of 0.3 with Adafactor. Initial: rows of the embedding table drawn at
    random ("vocabulary", the paper's better choice), U(−0.5, 0.5) ("uniform"; the published code draws from [0, 0.5)),
    or N(0, 1) ("normal", huggingface/peft's RANDOM). Trainable: l·d.
    """

    length: int = setting(20, "number of virtual tokens", minimum=1)
    initial: Literal["vocabulary", "uniform", "normal"] = setting("vocabulary", "where the prompt starts")
    targets: Targets = setting("embedding", "the embedding table of the input tokens")

    capabilities = Capabilities(
        starts_at_base="no",
        merge="none",
        merge_reason="added tokens have no weight to be folded into",
        linear_in_parameters=True,
        routable=False,
    )

    @property
    def prompt_length(self) -> int:
        return self.length

    def tensors(self, site: PromptSite) -> dict[str, Spec]:
        return {"P": Spec((self.length, site.features), decay=False)}

    def initialise(self, leaf: PromptLeaf, generator: torch.Generator) -> None:
        if self.initial == "vocabulary":
            rows = torch.randint(leaf.site.vocabulary, (self.length,), generator=generator)
            leaf.P.copy_(dense_weight(leaf.root.get_submodule(leaf.site.embedding))[rows])
        elif self.initial == "uniform":
            uniform(leaf.P, 0.5, generator)
        else:
            normal(leaf.P, 1.0, generator)

    def prompt(self, leaf: PromptLeaf) -> Tensor:
        return leaf.P
