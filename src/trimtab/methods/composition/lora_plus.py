"""LoRA+."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.kinds.composition import Composition, make_method
from trimtab.method import Capabilities, Method, Targets, setting


@dataclass(frozen=True)
class LoRAPlus(Composition):
    """LoRA+: Efficient Low Rank Adaptation of Large Models. Hayou et al. 2024, arXiv 2402.12354.

    LoRA whose B learns faster than A: `parameter_groups(lr)` takes `lr` for A and `lr_ratio` times that for B. The
    paper's ratios are 2⁴ to 2⁶, with a lower rate for A than LoRA has. Trainable: as LoRA.
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    lr_ratio: float = setting(16.0, "learning rate of B relative to A", above=0.0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=False)

    def parts(self) -> tuple[Method, ...]:
        settings = {name: value for name, value in vars(self).items() if name != "lr_ratio"}
        return (make_method("LoRA", {**settings, "b_lr_ratio": self.lr_ratio}),)
