"""FacT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import SettingError, TargetError
from trimtab.kinds.initial import kaiming_uniform, uniform
from trimtab.kinds.layouts import ConvolutionLayout
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.structure import Structure


@dataclass(frozen=True)
class _Slice(ParameterSite):
    """A weight of outputs × inputs blocks of the common width d, whose first core is number `first` of all."""

    outputs: int = 1
    inputs: int = 1
    first: int = 0


@dataclass(frozen=True)
class FacT(WeightMethod):
    """FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer. Jie and Deng 2023, arXiv 2212.03145.

    All weights share U (r, d), uniform as in LoRA, and V (d, r) = 0, d the smallest width; every other width must be a
    multiple of it. A weight of a × b blocks of d × d (a fused projection has a = 3, a feed-forward part 4 and 1, or 1
    and 4) has ΔW = scale·(I_a ⊗ V)·Σ·(I_b ⊗ U): each block is scale·V·Σ_ij·U. Starts at the base.
    "tensor_train" (TT): Σ (a·r, b·r), uniform like a linear layer's, belongs to the weight. "tucker" (TK): the cores
    are slices of one tensor, Σ_jᵀ = C ×₃ P_j with C (r, r, r) and P (r, number of blocks) shared, Xavier-uniform, in
    the order of the model's modules. `compat="official"` has the authors' TK cores: those of a weight of four blocks
    are interleaved by a reshape and, where b = 4, not transposed. The same functions of other numbers.
    Dropout acts on the r numbers behind Σ. The scale is searched in 0.01 … 100 in the paper. Not defined on embeddings,
    convolutions and stacks. Trainable: TT 2·r·d + Σ a·b·r², TK 2·r·d + r³ + r·Σ a·b; ViT-B/16 with all linear maps:
    TT, r = 16: 61,440; TK, r = 32: 86,528; r = 16: 30,976.
    """

    rank: int = setting(16, "rank r of every block's core", minimum=1)
    form: Literal["tensor_train", "tucker"] = setting("tucker", "a core of its own for each weight, or slices of one")
    scale: float = setting(1.0, "factor of the update", above=0.0)
    dropout: float = setting(0.1, "dropout on the numbers behind the core", minimum=0.0, maximum=0.99)
    compat: Literal["paper", "official"] = setting("paper", "order of the cores of a part with four blocks")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("FacT", site)
        if isinstance(site.layout, ConvolutionLayout) or site.layout.lead:
            raise TargetError(f"FacT is not defined for {str(site)!r}, which is no single linear map; leave it out.")

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        found, cut, first = super().sites(structure, targets), [], 0
        width = min(min(site.in_features, site.out_features) for site in found)
        if self.rank > width:
            raise SettingError(f"FacT(rank={self.rank}) is larger than the smallest width {width}; use a smaller rank.")
        for site in found:
            outputs, inputs = site.out_features // width, site.in_features // width
            if (outputs * width, inputs * width) != (site.out_features, site.in_features):
                raise TargetError(
                    f"FacT cuts every weight into blocks of the smallest width, {width}; {str(site)!r} of shape "
                    f"{site.out_features}×{site.in_features} is no multiple. Leave it, or the narrow one, out."
                )
            cut.append(_Slice(**vars(site), outputs=outputs, inputs=inputs, first=first))
            first += outputs * inputs
        return list(cut)

    def tensors(self, site: Any) -> dict[str, Spec]:
        shape = (site.outputs * self.rank, site.inputs * self.rank)
        return {"core": Spec(shape)} if self.form == "tensor_train" else {}

    def shared(self, sites: list[Any]) -> dict[str, Spec]:
        r, width = self.rank, sites[0].in_features // sites[0].inputs
        specs = {"U": Spec((r, width)), "V": Spec((width, r))}
        if self.form == "tucker":
            specs |= {"C": Spec((r, r, r)), "P": Spec((r, sites[-1].first + sites[-1].outputs * sites[-1].inputs))}
        return specs

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        kaiming_uniform(tensors["U"], generator)
        if self.form == "tucker":
            r, columns = tensors["P"].shape
            uniform(tensors["C"], math.sqrt(6.0 / (2 * r * r)), generator)  # Xavier: fans r·r and r·r
            uniform(tensors["P"], math.sqrt(6.0 / (r + columns)), generator)

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        if self.form == "tensor_train":
            kaiming_uniform(leaf.core, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        site: Any = leaf.site
        left: Tensor = torch.block_diag(*[leaf.shared("V")] * site.outputs)  # type: ignore[no-untyped-call]
        right: Tensor = torch.block_diag(*[leaf.shared("U")] * site.inputs)  # type: ignore[no-untyped-call]
        return self.scale * left @ self._core(leaf) @ right

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        site: Any = leaf.site
        U, V, core = leaf.shared("U"), leaf.shared("V"), self.scale * self._core(leaf)
        parts = x.to(U.dtype).reshape(*x.shape[:-1], site.inputs, -1) @ U.mT  # (..., b, r)
        hidden = torch.dropout(parts.flatten(-2) @ core.mT, self.dropout, train=leaf.training)  # (..., a·r)
        return y + (hidden.view(*x.shape[:-1], site.outputs, -1) @ V.mT).flatten(-2).to(y.dtype)

    def _core(self, leaf: WeightLeaf) -> Tensor:
        """Return Σ (a·r, b·r)."""
        site: Any = leaf.site
        if self.form == "tensor_train":
            return leaf.core
        r, a, b = self.rank, site.outputs, site.inputs
        slices = leaf.shared("C") @ leaf.shared("P")[:, site.first : site.first + a * b]  # (r, r, a·b): Σ_jᵀ
        if self.compat == "official" and 4 in (a, b) and 1 in (a, b):
            flat = slices.reshape(r, 4 * r)
            return flat.mT if a == 4 else flat
        return slices.view(r, r, a, b).permute(2, 1, 3, 0).reshape(a * r, b * r)
