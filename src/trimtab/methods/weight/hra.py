"""HRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.initial import kaiming_uniform
from trimtab.kinds.rotation import RotationMethod
from trimtab.kinds.weight import ParameterSite, WeightLeaf
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class HRA(RotationMethod):
    """HRA: Householder Reflection Adaptation. Yuan et al. 2024, arXiv 2405.17484.

    W′ = W·H₁···H_r, H_i = I − 2·u_i·u_iᵀ/‖u_i‖², with U = (u_1 … u_r) (in, r), each vector drawn once and used for two
    neighbouring reflections, which undo each other: starts at the base. So r must be even (peft goes on).
    The product is I − U·T·Uᵀ with T⁻¹ = the part of UᵀU above its diagonal plus half its diagonal (the compact form of
    reflections, equal for every U): two thin products instead of r one after the other.
    The length of u_i means nothing. A convolution reflects its patches (in·kernel), each group and expert by itself.
    The paper's orthogonality penalty, and peft's `apply_GS`, which orthogonalises the equal vectors of this start into
    noise, are not offered. Not defined on embeddings. Trainable: r·in for each matrix.
    """

    rank: int = setting(8, "number of reflections; even", minimum=2)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    def validate(self) -> None:
        if self.rank % 2:
            raise SettingError(
                f"HRA(rank={self.rank}): reflections start in pairs that undo each other; take an even rank."
            )

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        return {"U": Spec(site.matrices(site.in_features, self.rank), decay=False)}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        half = leaf.U[..., ::2].clone()
        kaiming_uniform(half, generator)
        leaf.U.copy_(half.repeat_interleave(2, dim=-1))

    def rotate(self, leaf: WeightLeaf, rows: Tensor, back: bool = False) -> Tensor:
        wide = torch.promote_types(rows.dtype, leaf.U.dtype)
        U, rows = leaf.U.to(wide), rows.to(wide)
        gram = U.mT @ U
        inverse = gram.triu(1) + torch.diag_embed(0.5 * gram.diagonal(dim1=-2, dim2=-1))
        identity = torch.eye(self.rank, device=U.device, dtype=wide)
        T = torch.linalg.solve_triangular(inverse, identity.expand_as(inverse), upper=True)
        # R is the transpose of the product of reflections: y = W·H₁···H_r·x.
        reflected: Tensor = rows - ((rows @ U) @ (T if back else T.mT)) @ U.mT
        return reflected
