"""SVFit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.spectrum import SpectralSite, spectral_site, terms_for_energy
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Spec, Targets, frozen, setting
from trimtab.structure import Structure


@dataclass(frozen=True)
class SVFit(WeightMethod):
    """SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values.

    Sun et al. 2024, arXiv 2409.05926. W = U·diag(S)·Vᵀ once, in float32; only the r leading singular values s are
    trained: ΔW = U_r·diag(s − S_r)·V_rᵀ with U_r (out, r), V_rᵀ (r, in). This is the paper's split into W_r and a
    frozen rest in the form that never touches the base: the start is the base exactly, also on a quantised one.
    Nothing keeps s positive or sorted. Both bases are frozen and are saved with s: singular vectors of near-equal
    values differ between machines, and s means something only with its own. At full rank they double the weight's
    memory. s is exempt from weight decay, which would shrink the base.
    `rank` None trains the whole spectrum (r = min(in, out), the reading of the paper's "16 times fewer than LoRA" on
    square layers); `energy` instead takes the smallest r with Σ_{i≤r} S_i² ≥ energy·Σ S_i² for each weight.
    A convolution is decomposed as (out, in·kernel), each group and each expert of a stack by itself.
    Trainable: r for each matrix. RoBERTa-base, query and value, full: 18,432. No official code is known.
    """

    rank: int | None = setting(None, "number of leading singular values; None: all of them", minimum=1)
    energy: float | None = setting(None, "share of Σ S² to cover instead of a rank", above=0.0, maximum=1.0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True)

    def validate(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise SettingError(f"SVFit takes rank={self.rank} or energy={self.energy}, not both; leave one out.")

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        found = super().sites(structure, targets)
        if (energy := self.energy) is None:
            return found
        asked = f"SVFit(energy={energy})"
        choose = partial(terms_for_energy, energy=energy)
        return [spectral_site(structure, site, asked, lambda weight: weight, choose) for site in found]

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        if isinstance(site, SpectralSite):
            rank = site.terms
        else:
            rank = min(site.in_features, site.out_features) if self.rank is None else site.rank(self.rank)
        return {
            "s": Spec((*site.layout.lead, rank), decay=False),
            "start": frozen(*site.layout.lead, rank, stored="always"),
            "U": frozen(*site.matrices(site.out_features, rank), stored="always"),
            "Vh": frozen(*site.matrices(rank, site.in_features), stored="always"),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        precision = torch.promote_types(leaf.s.dtype, torch.float32)
        U, S, Vh = torch.linalg.svd(leaf.weight().to(precision), full_matrices=False)
        rank = leaf.s.shape[-1]
        leaf.U.copy_(U[..., :rank])
        leaf.Vh.copy_(Vh[..., :rank, :])
        leaf.start.copy_(S[..., :rank])
        leaf.s.copy_(leaf.start)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return leaf.U @ ((leaf.s - leaf.start).unsqueeze(-1) * leaf.Vh)

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.Vh, leaf.U, middle=leaf.s - leaf.start)
