"""DiffuseKronA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.errors import TargetError
from trimtab.kinds.initial import normal
from trimtab.kinds.layouts import ConvolutionLayout
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class DiffuseKronA(WeightMethod):
    """DiffuseKronA: Kronecker adapters for personalised diffusion models. Marjit et al. 2024, arXiv 2402.17412.

    ΔW = scale·kron(A, B) with A (a₁, a₂) ~ N(0, 1/a₁²), B (b₁, b₂) = 0, out = a₁·b₁, in = a₂·b₂: starts at the base.
    The product is never formed beside a linear map: kron(A, B)·x = A·X·Bᵀ with X (a₂, b₂) = x reshaped. On a
    convolution B carries the kernel, (b₁, b₂, *kernel), and a₂·b₂ are the input channels of a group; each group and
    each expert of a stack has factors of its own. `layout="official"` is what the authors' code computes:
    ΔW[p·a₁ + q, :] = kron(A, B)[q·b₁ + p, :], the outputs in another order; the two exchange no weights. Its A is
    stored transposed as `down`, its B as `up`; its `network_alpha` raises. No dropout. rank(ΔW) = rank(A)·rank(B).
    The authors adapt query, key, value and output of a U-Net's attentions with (a₁, a₂) = (64, 8); the table of the
    paper fits a₁·a₂ = 256. Recipe: AdamW, learning rate 1e-3, weight decay 1e-2. Not defined on embeddings.
    Trainable: a₁·a₂ + (out/a₁)·(in/a₂) for each matrix; SDXL's U-Net with (64, 4): 3,874,560.
    """

    out_factor: int = setting(64, "rows a₁ of A; divides the outputs", minimum=1)
    in_factor: int = setting(4, "columns a₂ of A; divides the inputs (a convolution's channels)", minimum=1)
    scale: float = setting(1.0, "factor of the update", above=0.0)
    layout: Literal["paper", "official"] = setting("paper", "order of the outputs")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", per_sample_gradients=True)

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("DiffuseKronA", site)
        channels = site.shape[1] if isinstance(site.layout, ConvolutionLayout) else site.in_features
        if site.out_features % self.out_factor or channels % self.in_factor:
            raise TargetError(
                f"DiffuseKronA: A of {self.out_factor} × {self.in_factor} does not divide {str(site)!r} with "
                f"{site.out_features} outputs and {channels} inputs; choose divisors of these, or leave it out."
            )

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rows, columns = site.out_features // self.out_factor, site.in_features // self.in_factor
        return {"A": Spec(site.matrices(self.out_factor, self.in_factor)), "B": Spec(site.matrices(rows, columns))}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        normal(leaf.A, 1.0 / self.out_factor, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        A, B = leaf.A[..., :, None, :, None], leaf.B[..., None, :, None, :]
        product = self.scale * A * B  # (*lead, a₁, b₁, a₂, b₂)
        product = product if self.layout == "paper" else product.transpose(-4, -3)
        return product.reshape(*leaf.A.shape[:-2], leaf.site.out_features, leaf.site.in_features)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        if leaf.site.layout.lead:
            return y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype)
        x = x.to(leaf.A.dtype)
        if isinstance(leaf.site.layout, ConvolutionLayout):
            return y + self._convolve(leaf, x).to(y.dtype)
        inner = x.reshape(*x.shape[:-1], self.in_factor, -1) @ (self.scale * leaf.B).mT  # (..., a₂, b₁)
        return y + self._joined(inner.mT @ leaf.A.mT).to(y.dtype)

    def _convolve(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        """B as a convolution of each of the a₂ parts of the channels, then A across the parts."""
        target: Any = leaf.target
        batch, kernel = x.shape[0], target.weight.shape[2:]
        B = (self.scale * leaf.B).view(leaf.B.shape[0], -1, *kernel)  # (b₁, b₂, *kernel)
        inner = target._conv_forward(x.reshape(batch * self.in_factor, -1, *x.shape[2:]), B, None)
        places = inner.shape[2:]
        inner = inner.reshape(batch, self.in_factor, -1)  # (batch, a₂, b₁·places)
        mixed: Tensor = (leaf.A @ inner).view(batch, self.out_factor, -1, *places)  # (batch, a₁, b₁, *places)
        mixed = mixed if self.layout == "paper" else mixed.transpose(1, 2)
        return mixed.reshape(batch, -1, *places)

    def _joined(self, product: Tensor) -> Tensor:
        """Return (..., out) of (..., b₁, a₁), which is the official order as it stands."""
        return (product.mT if self.layout == "paper" else product).flatten(-2)
