"""VB-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.blocks import block_count
from trimtab.kinds.initial import normal, uniform
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class VBLoRA(WeightMethod):
    """VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks. Li et al. 2024, arXiv 2405.15179.

    ΔW = B·A, where the rows of A (r, in) and the columns of B (out, r) are cut into pieces of v numbers, and every
    piece is a mixture of k of the h vectors of one bank (h, v) that all places share: softmax over the k largest of its
    h logits. Trained are the bank ~ U(±`bank_bound`) and all logits ~ N(0, `logit_deviation`²).
    It does not start at the base: neither A nor B is zero (ΔW is of size √r·bank_bound²/3). A file keeps all logits, so
    that training can go on; the paper's counts of what must be stored are of the k chosen ones alone.
    in and out must be multiples of v. Not defined on embeddings.
    Trainable: h·v once, and r·h·(in + out)/v for each matrix.
    """

    rank: int = setting(4, "rank of the update", minimum=1)
    vectors: int = setting(256, "number h of vectors in the bank", minimum=2)
    vector_length: int = setting(256, "length v of each vector; must divide in and out of every layer", minimum=1)
    top_k: int = setting(2, "number k of vectors mixed in each piece", minimum=2)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    bank_bound: float = setting(0.02, "bound of the bank's uniform start", above=0.0)
    logit_deviation: float = setting(0.1, "standard deviation of the logits at the start", above=0.0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="approximate", merge="exact")

    def validate(self) -> None:
        if self.top_k > self.vectors:
            raise SettingError(f"VBLoRA: top_k={self.top_k} is more than the bank's vectors={self.vectors}.")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("VBLoRA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, length = site.rank(self.rank), self.vector_length
        pieces_in, pieces_out = (
            block_count("VBLoRA", site, width, length) for width in (site.in_features, site.out_features)
        )
        lead = site.layout.lead
        return {
            "logits_A": Spec((*lead, rank, pieces_in, self.vectors)),
            "logits_B": Spec((*lead, pieces_out, rank, self.vectors)),
        }

    def shared(self, sites: list[ParameterSite]) -> dict[str, Spec]:
        return {"bank": Spec((self.vectors, self.vector_length))}

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        uniform(tensors["bank"], self.bank_bound, generator)

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        for logits in (leaf.logits_A, leaf.logits_B):
            normal(logits, self.logit_deviation, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.factors(leaf).delta()

    def factors(self, leaf: WeightLeaf) -> Factors:
        A = self._mixture(leaf, leaf.logits_A).flatten(-2)  # (*lead, r, in)
        B = self._mixture(leaf, leaf.logits_B).mT.flatten(-3, -2)  # (*lead, out/v, r, v) as (*lead, out, r)
        return Factors(A, B, dropout=self.dropout)

    def _mixture(self, leaf: WeightLeaf, logits: Tensor) -> Tensor:
        """Return Σ softmax(top-k logits)·vectors: (..., h) → (..., v)."""
        largest, chosen = logits.topk(self.top_k, dim=-1)
        return (largest.softmax(-1).unsqueeze(-1) * leaf.shared("bank")[chosen]).sum(-2)
