"""PiSSA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kinds.started import StartedLowRank
from trimtab.kinds.weight import WeightLeaf
from trimtab.method import Capabilities, setting


@dataclass(frozen=True)
class PiSSA(StartedLowRank):
    """PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models.

    Meng et al. 2024, arXiv 2404.02948. W = U·diag(S)·Vᵀ; A₀ = √(S_r/s)·V_rᵀ (r, in), B₀ = U_r·√(S_r/s) (out, r) hold
    the r leading singular values, and both are trained: ΔW = s·(B·A − B₀·A₀), s = alpha/r (1 by default, as in the
    paper). The official code and huggingface/peft write W − s·B₀·A₀ into the base, so that their adapter is wrong on
    the original model; here the base stays as it is and the adapter file holds both pairs. `power_iterations` takes
    the randomised decomposition of the paper's "fast SVD" (section 5.4) instead of the exact one.
    A convolution is decomposed as (out, in·kernel), each group and each expert of a stack by itself.
    Trainable: r·(in + out) for each matrix, LoRA's count.
    """

    power_iterations: int | None = setting(None, "power iterations of a randomised SVD; None: exact SVD", minimum=1)

    capabilities = Capabilities(starts_at_base="exact", merge="exact", per_sample_gradients=True)

    def start(self, leaf: WeightLeaf, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rank = leaf.A.shape[-2]
        if self.power_iterations is None:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
                U, S, V = torch.svd_lowrank(weight, q=rank, niter=self.power_iterations)
            Vh = V.mT
        root = (S[..., :rank] / self.scale).sqrt()
        return root.unsqueeze(-1) * Vh[..., :rank, :], U[..., :rank] * root.unsqueeze(-2)
