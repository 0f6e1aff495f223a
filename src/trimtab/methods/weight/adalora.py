"""AdaLoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapter import Part
from trimtab.errors import SettingError, TrainingError
from trimtab.kinds.importance import importance, importance_specs, measure_importance
from trimtab.kinds.initial import normal
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class AdaLoRA(WeightMethod):
    """AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al. 2023, arXiv 2303.10512.

    ΔW = alpha/(r₀ + 10⁻⁵)·B·diag(E)·A with A (r₀, in), E (r₀,), B (out, r₀); E = 0, A and B ~ N(0, 0.02²): starts at
    the base. It begins with r₀ triplets for each matrix and ends with r on average, the best of all matrices. A triplet
    scores the importance (`kinds.importance`, β) of its E plus the means over its row of A and column of B, measured
    after each optimizer step t of T (from 0) until T − final. From warmup to T − final the budget falls with the cube
    of the remaining share; every `interval` steps all triplets beyond it get E = 0, and may grow back. At T − final the
    choice is made for good (there also off the interval, as in peft), and applied after every step. Nothing is resized;
    pruned triplets are zeros in the file. Penalty: orthogonality · mean over all A and B of ‖A·Aᵀ − I‖_F, ‖Bᵀ·B − I‖_F,
    not squared, as in the authors' code (the paper squares and sums). The paper's warmup is 8-17 % and its final phase
    40-60 % of the run. Trainable: r₀·(in + out + 1) for each matrix; DeBERTaV3-base, six linear maps for each block,
    r₀ = 12: 1,991,520.
    """

    rank: int = setting(8, "rank kept at the end, on average", minimum=1)
    initial_rank: int | None = setting(None, "rank r₀ at the start; None: 1.5 times the rank", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the initial rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    warmup_steps: int | None = setting(None, "steps before pruning; None: a tenth of the run", minimum=0)
    final_steps: int | None = setting(None, "steps with the final choice; None: half of the run", minimum=1)
    interval: int = setting(10, "steps from one pruning to the next", minimum=1)
    smoothing: float = setting(0.85, "β of both averages", above=0.0, maximum=0.9999)
    orthogonality: float = setting(0.1, "weight of the penalty; 0: none", minimum=0.0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", requires_binding=True)

    @property
    def start_rank(self) -> int:
        """The rank r₀ of every matrix during training."""
        return -(-3 * self.rank // 2) if self.initial_rank is None else self.initial_rank

    def validate(self) -> None:
        if self.start_rank < self.rank:
            raise SettingError(f"AdaLoRA: initial_rank={self.initial_rank} is below rank={self.rank}.")

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.start_rank)
        row = (*site.layout.lead, rank)
        shapes = {"A": site.matrices(rank, site.in_features), "E": row, "B": site.matrices(site.out_features, rank)}
        specs = {name: Spec(shape) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            specs |= importance_specs(name, shape)
        return specs | {"kept": frozen(*row, stored="training", dtype=torch.float32)}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        for factor in (leaf.A, leaf.B):
            normal(factor, 0.02, generator)
        leaf.kept.fill_(1.0)

    def factors(self, leaf: WeightLeaf) -> Factors:
        alpha = float(self.start_rank) if self.alpha is None else self.alpha
        return Factors(leaf.A, leaf.B, alpha / (self.start_rank + 1e-5), middle=leaf.E, dropout=self.dropout)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.factors(leaf).delta()

    def penalty(self, part: Part) -> Tensor | None:
        if self.orthogonality == 0.0:
            return None
        factors = [factor for leaf in part.leaves for factor in (leaf.A, leaf.B.mT)]  # rows are the r₀ vectors
        grams = [rows @ rows.mT - torch.eye(rows.shape[-2], device=rows.device, dtype=rows.dtype) for rows in factors]
        norms = torch.cat([torch.linalg.matrix_norm(gram).flatten().to(grams[0].device) for gram in grams])
        return self.orthogonality * norms.mean()

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Return the last step (from 0) of the warmup, and the step from which the choice is fixed."""
        warmup = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        return warmup, total_steps - (max(1, total_steps // 2) if self.final_steps is None else self.final_steps)

    def check_schedule(self, total_steps: int) -> None:
        warmup, fixed = self.phases(total_steps)
        if warmup >= fixed:
            raise TrainingError(
                f"AdaLoRA: after warmup_steps={warmup} and before final_steps={total_steps - fixed}, none of the "
                f"{total_steps} steps is left to allocate ranks in; lower one of them, or train longer."
            )

    def after_step(self, part: Part, step: int, total_steps: int) -> None:
        warmup, fixed = self.phases(total_steps)
        for leaf in part.leaves if step < fixed else ():
            for name in ("A", "E", "B"):
                measure_importance(leaf, name, self.smoothing)
        chooses = step == fixed or (warmup < step < fixed and step % self.interval == 0)
        if chooses:
            self._choose(part, 1 - (step - warmup) / (fixed - warmup))
        for leaf in part.leaves if chooses or step > fixed else ():
            leaf.E.mul_(leaf.kept)

    def _choose(self, part: Part, remaining: float) -> None:
        """Keep the best triplets of all matrices; at a tie with the best that goes, all go."""
        scores = [
            importance(leaf, "E") + (importance(leaf, "A").mean(-1) + importance(leaf, "B").mean(-2))
            for leaf in part.leaves
        ]  # (*lead, r₀) each
        everything = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        start, end = len(everything), len(everything) * self.rank // self.start_rank
        removed = start - int((start - end) * remaining**3 + end)
        threshold = float(everything.kthvalue(removed).values) if removed else -torch.inf
        for leaf, score in zip(part.leaves, scores, strict=True):
            leaf.kept.copy_(score > threshold)
