"""OLoRA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kinds.started import StartedLowRank
from trimtab.kinds.weight import WeightLeaf
from trimtab.method import Capabilities


@dataclass(frozen=True)
class OLoRA(StartedLowRank):
    """OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Büyükakyüz 2024, arXiv 2406.01775.

    W = Q·R; B₀ = Q_r (out, r), orthonormal columns, and A₀ = R_r (r, in), the first r columns and rows; both are
    trained: ΔW = s·(B·A − B₀·A₀). The paper and huggingface/peft subtract s·B₀·A₀ from the base, whatever s is; here
    the base stays and the adapter file holds both pairs. A convolution is decomposed as (out, in·kernel), each group
    and each expert of a stack by itself. Trainable: r·(in + out) for each matrix, LoRA's count.
    """

    capabilities = Capabilities(starts_at_base="exact", merge="exact", per_sample_gradients=True)

    def start(self, leaf: WeightLeaf, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rank = leaf.A.shape[-2]
        Q, R = torch.linalg.qr(weight)
        return R[..., :rank, :], Q[..., :rank]
