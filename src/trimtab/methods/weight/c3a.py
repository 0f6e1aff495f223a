"""C³A."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.kinds.blocks import block_count
from trimtab.kinds.dense import linear_with_dense_update
from trimtab.kinds.initial import normal, uniform
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class C3A(WeightMethod):
    """C³A: Parameter-Efficient Fine-Tuning via Circular Convolution. Chen et al. 2024, arXiv 2407.19342.

    ΔW = C/in, where every block (b, b) of C (out, in) is circulant, C[j, k] = w[(k − j) mod b], of one trained kernel
    w (b,): the same map as peft's products of Fourier transforms. `initial="xavier"` (paper, peft) draws w
    ~ U(±√(6/(in + out))), "kaiming" U(±1/√in), "gaussian" N(0, 1): none of them starts at the base; "zero" does.
    W + ΔW is formed once for each step, and no product of activations is added. A convolution is (out, in·kernel),
    each group and expert by itself. Not defined on embeddings; b must divide in and out.
    Trainable: in·out/b for each matrix.
    """

    block_size: int = setting(256, "width b of the circulant blocks; must divide both widths", minimum=1)
    initial: Literal["xavier", "kaiming", "gaussian", "zero"] = setting("xavier", "start of the kernels")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="no", merge="exact", linear_in_parameters=True)

    def promises(self) -> Capabilities:
        return dataclasses.replace(self.capabilities, starts_at_base="exact" if self.initial == "zero" else "no")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("C3A", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        shape = [block_count("C3A", site, width, self.block_size) for width in (site.out_features, site.in_features)]
        return {"kernel": Spec((*site.layout.lead, *shape, self.block_size))}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        inputs, outputs = leaf.site.in_features, leaf.site.out_features
        if self.initial == "xavier":
            uniform(leaf.kernel, math.sqrt(6.0 / (inputs + outputs)), generator)
        elif self.initial == "kaiming":
            uniform(leaf.kernel, math.sqrt(1.0 / inputs), generator)
        elif self.initial == "gaussian":
            normal(leaf.kernel, 1.0, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        positions = torch.arange(self.block_size, device=leaf.kernel.device)
        turns = (positions - positions.unsqueeze(1)) % self.block_size  # (b, b): (k − j) mod b
        blocks = leaf.kernel[..., turns].transpose(-3, -2)  # (*lead, out/b, b, in/b, b)
        return blocks.flatten(-2).flatten(-3, -2) / leaf.site.in_features

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        return linear_with_dense_update(leaf, x, self.delta(leaf))
