"""The mix-and-match adapter."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.kinds.composition import Composition, make_method
from trimtab.method import Capabilities, Method, setting


@dataclass(frozen=True)
class MAM(Composition):
    """MAM adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He et al. 2021, arXiv 2110.04366.

    Prefix tuning with few positions l at every attention, and the scaled parallel adapter of width m beside every
    feed-forward part. Does not start at the base: a prefix always takes softmax mass. Paper: l = 30, m = 512, s = 4 for
    BART-large; l = m = 16, s = 2 for RoBERTa-base. The authors train the prefix through an MLP that is dropped
    afterwards; here its tables are trained directly (their `prefix_nomlp`).
    Trainable: 2·l·d for each attention, 2·d·m + d + m for each feed-forward part; BART-large 27,377,664 without the
    adapters' biases, which add 36,864.
    """

    prefix_length: int = setting(30, "number l of prefix positions at every attention", minimum=1)
    bottleneck: int = setting(512, "width m of the parallel adapter", minimum=1)
    scale: float = setting(4.0, "factor s of the parallel adapter", above=0.0)
    dropout: float = setting(0.0, "dropout inside the bottleneck", minimum=0.0, maximum=0.99)

    capabilities = Capabilities(
        starts_at_base="no",
        merge="none",
        merge_reason="added keys and values, and a bottleneck's activation function, cannot be folded into weights",
    )

    def parts(self) -> tuple[Method, ...]:
        branch = {"bottleneck": self.bottleneck, "scale": self.scale, "dropout": self.dropout}
        return make_method("PrefixTuning", {"length": self.prefix_length}), make_method("ParallelAdapter", branch)
