"""KaSA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimtab.adapter import Part
from trimtab.errors import SettingError
from trimtab.hooks import Leaf
from trimtab.kinds.initial import kaiming_uniform, normal
from trimtab.kinds.lowrank import add_update, lora_scale
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting
from trimtab.quantized import at_least_single


@dataclass(frozen=True)
class KaSA(WeightMethod):
    """KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models. Wang et al. 2025, arXiv 2412.06071.

    W′ = W − U_t·diag(S_t)·V_tᵀ + s·B·diag(d)·A: the r smallest singular components of W are dropped (t), so the model
    does NOT start at the base, and an update with a diagonal d (r,) ~ N(0, 1) between A (r, in), uniform as in LoRA,
    and B (out, r) = 0 is trained; s = alpha/r, alpha = 2r as in the authors' runs. The dropped part is kept as frozen
    factors and subtracted, where the authors overwrite the base: disabling and detaching give the base back. A second
    adapter at the same place is refused: it would drop the same components twice, or adapt weights it never saw.
    Penalty: reduction over matrices of β·Σd² + γ·(‖BᵀB − I‖_F + ‖AAᵀ − I‖_F) (equations 9 to 11). β and γ belong to the
    mean, which the authors take; huggingface/peft sums. `compat="official"` has the authors' code: it drops the values
    behind in − r (so none of a layer with out ≤ in − r), and takes BBᵀ and AᵀA in the penalty, whose norms cannot
    come below √(out − r) and √(in − r). Dropout acts on the input of A. Paper: β 1e-4 to 1, γ 1e-5 to 1 by
    task, learning rate 3e-4 to 5e-4. Trainable: r·(in + out + 1) a matrix; RoBERTa-base, q and v, r = 8: 295,104.
    """

    rank: int = setting(8, "rank of the update, and number of dropped singular components", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: twice the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    rank_stabilized: bool = setting(False, "scale by 1/√rank instead of 1/rank (rsLoRA)")
    beta: float = setting(1e-4, "weight β of Σd² in the penalty", minimum=0.0)
    gamma: float = setting(1e-3, "weight γ of the orthogonality of A and B in the penalty", minimum=0.0)
    reduction: Literal["mean", "sum"] = setting("mean", "how the penalty goes over the matrices")
    compat: Literal["paper", "official"] = setting("paper", "truncation and penalty of the paper, or of its code")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="no", merge="exact", additive=False, requires_binding=True)

    def promises(self) -> Capabilities:
        return replace(self.capabilities, requires_binding=self.beta > 0.0 or self.gamma > 0.0)

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return lora_scale(2.0 * self.rank if self.alpha is None else self.alpha, self.rank, self.rank_stabilized)

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("KaSA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, dropped, lead = site.rank(self.rank), self._dropped(site), site.layout.lead
        if rank == min(site.in_features, site.out_features):
            raise SettingError(f"KaSA(rank={self.rank}) would drop every singular value of {str(site)!r}; use less.")
        return {
            "A": Spec(site.matrices(rank, site.in_features)),
            "B": Spec(site.matrices(site.out_features, rank)),
            "diagonal": Spec((*lead, rank)),
            "tail_down": frozen(*site.matrices(dropped, site.in_features), stored="always"),
            "tail_up": frozen(*site.matrices(site.out_features, dropped), stored="always"),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        kaiming_uniform(leaf.A, generator)
        normal(leaf.diagonal, 1.0, generator)
        U, S, Vh = torch.linalg.svd(at_least_single(leaf.weight()), full_matrices=False)
        kept = S.shape[-1] - self._dropped(leaf.site)
        leaf.tail_down.copy_(Vh[..., kept:, :])
        leaf.tail_up.copy_(U[..., kept:] * S[..., None, kept:])

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.scale * (leaf.B * leaf.diagonal.unsqueeze(-2)) @ leaf.A - leaf.tail_up @ leaf.tail_down

    def factors(self, leaf: WeightLeaf) -> Factors:
        down = torch.cat([leaf.A, leaf.tail_down], dim=-2)
        up = torch.cat([self.scale * leaf.diagonal.unsqueeze(-2) * leaf.B, -leaf.tail_up], dim=-1)
        return Factors(down, up)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        if leaf.training and self.dropout > 0.0:
            return self.unfused(leaf, x)
        return super().fused(leaf, x)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        if not (leaf.training and self.dropout > 0.0):
            return super().forward(leaf, x, y)
        layout, tail = leaf.site.layout, Factors(leaf.tail_down, leaf.tail_up, -1.0)
        dropping = Factors(leaf.A, leaf.B, self.scale, leaf.diagonal, self.dropout)
        y = add_update(layout, leaf.target, x, y, tail, training=False)
        return add_update(layout, leaf.target, x, y, dropping, training=True)

    def penalty(self, part: Part) -> Tensor | None:
        if self.beta == self.gamma == 0.0:
            return None
        values = torch.cat([self._penalty_at(leaf).flatten().to(part.leaves[0].A.device) for leaf in part.leaves])
        return values.mean() if self.reduction == "mean" else values.sum()

    def _penalty_at(self, leaf: Leaf) -> Tensor:
        A, B = at_least_single(leaf.A), at_least_single(leaf.B)
        spectrum: Tensor = at_least_single(leaf.diagonal).square().sum(-1)
        return self.beta * spectrum + self.gamma * (self._deviation(A) + self._deviation(B.mT))

    def _deviation(self, rows: Tensor) -> Tensor:
        """Return ‖M·Mᵀ − I‖_F of rows M (*lead, r, n); official: ‖MᵀM − I‖_F = √(‖M·Mᵀ − I‖_F² + n − r)."""
        rank, width = rows.shape[-2:]
        norm: Tensor = torch.linalg.matrix_norm(rows @ rows.mT - torch.eye(rank, device=rows.device, dtype=rows.dtype))
        return norm if self.compat == "paper" else (norm.square() + (width - rank)).sqrt()

    def _dropped(self, site: ParameterSite) -> int:
        rank, smaller = site.layout.rank(self.rank), min(site.in_features, site.out_features)
        return rank if self.compat == "paper" else max(0, smaller - (site.in_features - rank))
