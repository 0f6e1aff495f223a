"""DeLoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.initial import kaiming_uniform
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting

_LEAST_NORM = 1e-4  # below which a vector is not normalised further, as in peft


@dataclass(frozen=True)
class DeLoRA(WeightMethod):
    """DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation. Bini et al. 2025, arXiv 2503.18225.

    ΔW = B·diag(λ/(r·‖a_i‖·‖b_i‖))·A·diag(‖w_j‖), with a_i the rows of A (r, in) and b_i the columns of B (out, r): r
    directions of equal strength λ/r, so that ‖ΔW·diag(‖w_j‖)⁻¹‖_F ≤ λ. ‖w_j‖ are the norms of W's input columns, and
    λ is one trained number. A ~ U(−1/√in, 1/√in), B = 0: starts at the base, as in peft (norms are at least 10⁻⁴ there,
    so that the first steps leave zero; the paper starts with B random and takes the start off the base instead).
    Dropout acts on the input of the update. λ is exempt from weight decay. Not defined on embeddings.
    Trainable: r·(in + out) + 1 for each matrix.
    """

    rank: int = setting(8, "rank of the update", minimum=1)
    strength: float = setting(15.0, "start of λ", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("DeLoRA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, lead = site.rank(self.rank), site.layout.lead
        return {
            "A": Spec(site.matrices(rank, site.in_features)),
            "B": Spec(site.matrices(site.out_features, rank)),
            "strength": Spec((*lead, 1), decay=False),
            "norm": frozen(*lead, site.in_features, stored="derived"),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        kaiming_uniform(leaf.A, generator)
        leaf.strength.fill_(self.strength)
        if leaf.norm.dtype == torch.float16:
            raise SettingError("DeLoRA starts at lengths of 10⁻⁸, which float16 cannot hold; use float32 or bfloat16.")
        leaf.norm.copy_(torch.linalg.vector_norm(leaf.weight().to(leaf.norm.dtype), dim=-2))

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.factors(leaf).delta()

    def factors(self, leaf: WeightLeaf) -> Factors:
        lengths = torch.linalg.vector_norm(leaf.A, dim=-1).clamp_min(_LEAST_NORM)
        lengths = lengths * torch.linalg.vector_norm(leaf.B, dim=-2).clamp_min(_LEAST_NORM)  # (*lead, r)
        middle = leaf.strength / leaf.A.shape[-2] / lengths
        return Factors(leaf.A * leaf.norm.unsqueeze(-2), leaf.B, middle=middle, dropout=self.dropout)
