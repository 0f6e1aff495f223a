"""Low-rank updates that start from factors of the weight itself: ΔW = s·(B·A − B₀·A₀), which is zero at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.hooks import Leaf
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Spec, Targets, frozen, setting
from trimtab.quantized import at_least_single


@dataclass(frozen=True)
class StartedLowRank(WeightMethod):
    """A low-rank update with a start of its own. Give `start`.

    The published form subtracts s·B₀·A₀ from the base and adds s·B·A. Here the base stays: its product is joined by
    that of both differences, which is exactly zero at the start. A₀ and B₀ are saved with A and B: factors of a weight
    differ between machines, and from a quantised copy they are other ones altogether. Dropout acts on the input of the
    difference, so that its expectation stays at the base (huggingface/peft drops the input of s·B·A alone).
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    rank_stabilized: bool = setting(False, "scale by 1/√rank instead of 1/rank (rsLoRA)")
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    targets: Targets = setting("all-linear", "places to adapt")

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding(type(self).__name__, site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.rank)
        down, up = site.matrices(rank, site.in_features), site.matrices(site.out_features, rank)
        return {
            "A": Spec(down),
            "B": Spec(up),
            "A_start": frozen(*down, stored="always"),
            "B_start": frozen(*up, stored="always"),
        }

    def start(self, leaf: WeightLeaf, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Return (A₀, B₀), (*lead, r, in) and (*lead, out, r), from the weight (*lead, out, in) in float32 or more.

        s·B₀·A₀ is the part of the weight that is trained: divide by `scale` where the method says so. None: the start
        comes from calibration data.
        """
        return None

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        start = self.start(leaf, at_least_single(leaf.weight()), generator)
        if start is not None:
            set_start(leaf, *start)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.scale * (leaf.B @ leaf.A - leaf.B_start @ leaf.A_start)

    def factors(self, leaf: WeightLeaf) -> Factors:
        # B·A − B₀·A₀ = (B − B₀)·A + B₀·(A − A₀): one product of rank 2r whose two parts are zero at the start.
        down = torch.cat([leaf.A, leaf.A - leaf.A_start], dim=-2)
        up = torch.cat([leaf.B - leaf.B_start, leaf.B_start], dim=-1)
        return Factors(down, up, self.scale, dropout=self.dropout)


def set_start(leaf: Leaf, down: Tensor, up: Tensor) -> None:
    """Set A and B, and the start that their product is measured from."""
    for name, value in (("A", down), ("B", up)):
        getattr(leaf, name).copy_(value)
        getattr(leaf, f"{name}_start").copy_(getattr(leaf, name))  # as rounded
