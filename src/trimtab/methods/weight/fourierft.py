"""FourierFT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.blocks import cut
from trimtab.kinds.dense import linear_with_dense_update
from trimtab.kinds.initial import normal
from trimtab.kinds.layouts import index_dtype
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class FourierFT(WeightMethod):
    """FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao et al. 2024, arXiv 2405.03003.

    ΔW = s·Re(IDFT₂(F)), where F (out, in) is zero but for n entries at random places; these n numbers are trained. The
    places are drawn once for each shape of weight and shared by all weights of that shape; they are saved.
    `initial="normal"` (paper, peft): entries ~ N(0, 1), so that it does not start at the base; "zero" does.
    s is large, since the transform divides by in·out: the paper has 100 to 300. It is dense: W + ΔW is formed once for
    each step, and no product of activations is added. A convolution is transformed as (out, in·kernel), each group and
    expert by itself. The paper's bias towards a frequency is not offered. Not defined on embeddings.
    Trainable: n for each matrix; RoBERTa-base, query and value, n = 1000: 24,000.
    """

    frequencies: int = setting(1000, "number n of trained entries of each spectrum", minimum=1)
    scale: float = setting(150.0, "factor s of the update", above=0.0)
    initial: Literal["normal", "zero"] = setting("normal", "start of the entries: N(0, 1), or zero (the base)")
    location_seed: int | None = setting(None, "seed of the places; None: from the adapter's seed", minimum=0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="no", merge="exact", linear_in_parameters=True)

    def promises(self) -> Capabilities:
        return dataclasses.replace(self.capabilities, starts_at_base="no" if self.initial == "normal" else "exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("FourierFT", site)
        if self.frequencies > site.in_features * site.out_features:
            raise SettingError(
                f"FourierFT(frequencies={self.frequencies}): {str(site)!r} of shape {site.out_features}×"
                f"{site.in_features} has fewer numbers; use fewer, or leave this layer out of the targets."
            )

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        return {"spectrum": Spec((*site.layout.lead, self.frequencies))}

    def shared(self, sites: list[ParameterSite]) -> dict[str, Spec]:
        sizes = {_places(site): site.in_features * site.out_features for site in sites}
        return {
            name: frozen(self.frequencies, stored="always", dtype=index_dtype(size))
            for name, size in sorted(sizes.items())
        }

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        sizes = {_places(site): site.in_features * site.out_features for site in sites}
        for name, places in tensors.items():
            if self.location_seed is not None:
                generator = torch.Generator().manual_seed(self.location_seed)
            places.copy_(torch.randperm(sizes[name], generator=generator)[: self.frequencies])

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        if self.initial == "normal":
            normal(leaf.spectrum, 1.0, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        spectrum = leaf.spectrum.to(torch.promote_types(leaf.spectrum.dtype, torch.float32))
        rows, columns = leaf.site.out_features, leaf.site.in_features
        places = leaf.shared(_places(leaf.site)).long()
        whole = spectrum.new_zeros(*leaf.site.layout.lead, rows * columns).index_copy(-1, places, spectrum)
        update: Tensor = self.scale * torch.fft.ifft2(cut(whole, rows, columns)).real
        return update

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        return linear_with_dense_update(leaf, x, self.delta(leaf))


def _places(site: ParameterSite) -> str:
    """Name the places that all weights of this shape share."""
    return f"places_{site.out_features}x{site.in_features}"
