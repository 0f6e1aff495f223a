"""VeRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class VeRA(WeightMethod):
    """VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al. 2023, arXiv 2310.11454.

    ΔW = diag(b)·B·diag(d)·A. A (r, in) and B (out, r) are random, frozen and shared by all places, each of which uses
    the first in columns and out rows; trained are the vectors d (r,) = 0.1 and b (out,) = 0: starts at the base.
    A ~ U(±√(6/widest in)), B ~ U(±√(6/r)). There is no scale. The rank may exceed the layer, and costs r trained
    numbers only. The draw depends on all places together and on `projection_seed`, as peft's on its key; the file keeps
    a hash of A and B, and loading stops if they cannot be redrawn. d has no gradient before the first step. The vectors
    want a learning rate about ten times LoRA's. Not defined on embeddings.
    Trainable: out + r for each matrix; RoBERTa-base, query and value, r = 1024: 43,008.
    """

    rank: int = setting(256, "rows of A; costs one trained number each", minimum=1)
    d_initial: float = setting(0.1, "start of d", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    projection_seed: int | None = setting(None, "seed of A and B; None: from the adapter's seed", minimum=0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("VeRA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        lead = site.layout.lead
        return {"d": Spec((*lead, self.rank)), "b": Spec((*lead, site.out_features))}

    def shared(self, sites: list[ParameterSite]) -> dict[str, Spec]:
        rows, columns = max(site.out_features for site in sites), max(site.in_features for site in sites)
        return {"A": frozen(self.rank, columns, stored="seed"), "B": frozen(rows, self.rank, stored="seed")}

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        if self.projection_seed is not None:
            generator = torch.Generator().manual_seed(self.projection_seed)
        for name in ("A", "B"):
            bound = math.sqrt(6.0 / tensors[name].shape[-1])  # He et al. 2015, uniform, for the whole shared width
            tensors[name].copy_(torch.empty(tensors[name].shape).uniform_(-bound, bound, generator=generator))

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        leaf.d.fill_(self.d_initial)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.factors(leaf).delta()

    def factors(self, leaf: WeightLeaf) -> Factors:
        site = leaf.site
        A = leaf.shared("A")[:, : site.in_features].expand(site.matrices(self.rank, site.in_features))
        up = leaf.b.unsqueeze(-1) * leaf.shared("B")[: site.out_features]  # (*lead, out, r)
        return Factors(A, up, middle=leaf.d, dropout=self.dropout)
