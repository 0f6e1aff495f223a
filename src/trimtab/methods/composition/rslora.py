"""rsLoRA."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.kinds.composition import Composition, make_method
from trimtab.method import Capabilities, Method, Targets, setting


@dataclass(frozen=True)
class RsLoRA(Composition):
    """rsLoRA: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski 2023, arXiv 2312.03732.

    LoRA with s = alpha/√r, so that the size of an update does not fall as the rank grows; alpha defaults to the rank,
    s = √r. Trainable: as LoRA.
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=False)

    def parts(self) -> tuple[Method, ...]:
        return (make_method("LoRA", {**vars(self), "rank_stabilized": True}),)
