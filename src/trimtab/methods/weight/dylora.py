"""DyLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.adapter import Adapter, Part
from trimtab.errors import AttachError, SettingError
from trimtab.hooks import Leaf
from trimtab.kinds.initial import lora_start
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class DyLoRA(WeightMethod):
    """DyLoRA: Dynamic Search-Free Low-Rank Adaptation. Valipour et al. 2022, arXiv 2210.07558.

    LoRA whose first b rows of A (r, in) and columns of B (out, r) form a LoRA of rank b for every b from `lowest` to r:
    ΔW_b = (alpha/b)·B[:, :b]·A[:b]. Each optimizer step trains one b, drawn uniformly from the step's number, so that
    a resumed run and several processes draw the same; all weights share it. `update="last"` is the paper's frozen
    variant, which trains row and column b alone. In evaluation, and merged, the adapter has rank r unless
    `DyLoRA.use_rank(adapter, b)` says otherwise; the choice is saved with it. The scale is the authors' code's (both
    factors times √(r/b), then alpha/r). Start as LoRA: the base. alpha defaults to r. Dropout acts on the input.
    A convolution with groups is refused, as r would be cut. Trainable: r·(in + out) for each matrix.
    """

    rank: int = setting(8, "largest rank r", minimum=1)
    lowest: int = setting(1, "smallest rank that is trained", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    update: Literal["all", "last"] = setting("all", "what a step of rank b trains: the first b, or number b alone")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", requires_binding=True)

    def validate(self) -> None:
        if self.lowest > self.rank:
            raise SettingError(f"DyLoRA(lowest={self.lowest}) is larger than rank={self.rank}.")

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        if site.rank(self.rank) != self.rank:
            raise SettingError(f"DyLoRA cannot cut its ranks over the groups of {str(site)!r}; leave it out.")
        down, up = site.matrices(self.rank, site.in_features), site.matrices(site.out_features, self.rank)
        # Row b learns only after column b has left zero, in another step of the same b.
        return {"A": Spec(down, reached=self.update == "all"), "B": Spec(up, reached=True)}

    def shared(self, sites: list[ParameterSite]) -> dict[str, Spec]:
        return {
            "weights": frozen(self.rank, stored="always"),  # alpha/b for the first b, else zero: in evaluation
            "training_weights": frozen(self.rank, stored="training"),
        }

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        tensors["weights"].copy_(self._weights(self.rank))
        tensors["training_weights"].copy_(self._weights(self.drawn(0)))

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        lora_start(leaf.A, leaf.B, leaf.site.layout, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.factors(leaf).delta()

    def factors(self, leaf: WeightLeaf) -> Factors:
        if not _learns(leaf):
            return Factors(leaf.A, leaf.B, middle=leaf.shared("weights"))
        weights, A, B = leaf.shared("training_weights"), leaf.A, leaf.B
        if self.update == "last":
            last = self._last(weights)
            A, B = torch.where(last.unsqueeze(-1), A, A.detach()), torch.where(last, B, B.detach())
        return Factors(A, B, middle=weights, dropout=self.dropout)

    def before_merge(self, part: Part) -> None:
        if any(_learns(leaf) for leaf in part.leaves):
            raise AttachError("DyLoRA is merged at the rank chosen for evaluation: call model.eval() first.")

    def after_step(self, part: Part, step: int, total_steps: int) -> None:
        part.shared("training_weights").copy_(self._weights(self.drawn(step + 1)))

    def drawn(self, step: int) -> int:
        """Return the rank b that optimizer step `step` (from 0) trains."""
        generator = torch.Generator().manual_seed(step)
        return int(torch.randint(self.lowest, self.rank + 1, (), generator=generator))

    @staticmethod
    def use_rank(adapter: Adapter, rank: int) -> None:
        """Evaluate, merge and save the adapter at one of its ranks; raises SettingError for another one."""
        for part in adapter.parts:
            method = part.method
            if not isinstance(method, DyLoRA) or not method.lowest <= rank <= method.rank:
                raise SettingError(f"rank {rank} was not trained by {method!r}.")
            with torch.no_grad():
                part.shared("weights").copy_(method._weights(rank))

    def _weights(self, rank: int) -> Tensor:
        alpha = float(self.rank) if self.alpha is None else self.alpha
        return (torch.arange(self.rank) < rank) * (alpha / rank)

    def _last(self, weights: Tensor) -> Tensor:
        """Return True at the last weight that is not zero (r,)."""
        places = torch.arange(self.rank, device=weights.device)
        return places == (weights > 0.0).sum() - 1


def _learns(leaf: Leaf) -> bool:
    """Say whether this forward trains the adapter, at the rank of the step."""
    return leaf.training and leaf.A.requires_grad
