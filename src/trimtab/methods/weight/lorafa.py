"""LoRA-FA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.adapter import Part
from trimtab.kinds.initial import kaiming_uniform
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting
from trimtab.quantized import at_least_single

_DAMPING = 1e-8  # on the diagonal of A·Aᵀ, as in peft


@dataclass(frozen=True)
class LoRAFA(WeightMethod):
    """LoRA-FA: LoRA with frozen A. Zhang et al. 2023, arXiv 2308.03303.

    ΔW = s·B·A with A (r, in) ~ U(−1/√in, 1/√in) frozen, B (out, r) = 0 trained, s = alpha/r, or alpha/√r: starts at the
    base. No input is kept for backward but A·x, r numbers for each token. A is drawn again from the seed on loading.
    `gradient_correction` (the paper's second version, eq. 9, and peft): before each step B's gradient g becomes
    g·(A·Aᵀ)⁻¹/s², with which the change of B·A is the nearest to that of full fine-tuning; it acts on the complete
    gradient, after any clipping, and needs `bind`. Without it, this is the first version. peft rounds the corrected
    gradient to bfloat16; this does not.
    Not defined on embeddings, where LoRA's A starts at zero. Trainable: r·out for each matrix.
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    rank_stabilized: bool = setting(False, "scale by 1/√rank instead of 1/rank (rsLoRA)")
    gradient_correction: bool = setting(True, "bring B's step as near to full fine-tuning as A allows")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True, requires_binding=True)

    def promises(self) -> Capabilities:
        return dataclasses.replace(self.capabilities, requires_binding=self.gradient_correction)

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("LoRAFA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = site.rank(self.rank)
        return {
            "A": frozen(*site.matrices(rank, site.in_features), stored="seed"),
            "B": Spec(site.matrices(site.out_features, rank)),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        kaiming_uniform(leaf.A, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.scale * (leaf.B @ leaf.A)

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.A, leaf.B, self.scale, dropout=self.dropout)

    def before_step(self, part: Part) -> None:
        for leaf in part.leaves if self.gradient_correction else ():
            gradient = leaf.B.grad
            if gradient is None:
                continue
            A = at_least_single(leaf.A)
            gram = A @ A.mT  # (*lead, r, r)
            gram.diagonal(dim1=-2, dim2=-1).add_(_DAMPING)
            gradient.copy_(at_least_single(gradient) @ torch.linalg.inv(gram) / self.scale**2)
