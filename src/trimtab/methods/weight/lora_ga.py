"""LoRA-GA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.kinds.calibration import weight_gradients
from trimtab.kinds.started import StartedLowRank, set_start
from trimtab.kinds.weight import ParameterSite
from trimtab.method import Batches, Capabilities, setting

if TYPE_CHECKING:
    from trimtab.adapter import Part


@dataclass(frozen=True)
class LoRAGA(StartedLowRank):
    """LoRA-GA: Low-Rank Adaptation with Gradient Approximation. Wang et al. 2024, arXiv 2407.05000.

    G = ∂L/∂W (out, in) of the base, averaged over the calibration batches, = U·diag(S)·Vᵀ; A₀ = c·V_I (r, in) and
    B₀ = c·U_J (out, r) with c = out^¼/√γ take different ones of its 2r leading directions, so that the first step of
    LoRA is the best approximation of one step of full fine-tuning: I = 1…r, J = r+1…2r for "ArB2r" (the paper's),
    I = r+1…2r, J = 1…r for "A2rBr", I = 2, 4, …, J = 1, 3, … for "ArBr". ΔW = s·(B·A − B₀·A₀); the paper's
    s = alpha/√r is `rank_stabilized`. `start_scale`: "stable" is c above, "unit" c = 1, "gradient" c = 1/s.
    Needs attach(…, calibration=Batches(data, loss)). The gradients are taken in evaluation mode (the official code,
    Outsider565/LoRA-GA 89af7de, leaves dropout on) and decomposed exactly (there: torch.svd_lowrank). huggingface/peft
    multiplies B₀ by S_J and leaves A₀ unscaled, which is not the paper's start: `compat="peft"`. Where a weight is
    stored transposed, it also takes the inputs for `out` in c; this does not.
    Trainable: r·(in + out) for each matrix, LoRA's count; r at most half of the smaller side.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = setting("ArB2r", "which directions A and B take")
    start_scale: Literal["stable", "unit", "gradient"] = setting("stable", "size of the start")
    gamma: float = setting(16.0, "γ of the stable size", above=0.0)
    compat: Literal["paper", "peft"] = setting("paper", "start of the paper, or of huggingface/peft")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", quantized_base=False, requires_calibration=True)

    def check_site(self, site: ParameterSite) -> None:
        super().check_site(site)
        site.rank(2 * self.rank)  # both pairs of directions exist

    def calibrate(self, part: Part, batches: Batches) -> None:
        for leaf, gradient in zip(part.leaves, weight_gradients(part, batches), strict=True):
            U, S, Vh = torch.linalg.svd(
                gradient.to(torch.promote_types(gradient.dtype, torch.float32)), full_matrices=False
            )
            set_start(leaf, *self._directions(U, S, Vh, leaf.A.shape[-2]))

    def _directions(self, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return (A₀, B₀)."""
        first, second, odd, even = (slice(0, rank), slice(rank, 2 * rank), slice(0, 2 * rank, 2), slice(1, 2 * rank, 2))
        down, up = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (even, odd)}[self.direction]
        A, B, out_features = Vh[..., down, :], U[..., up], U.shape[-2]
        size = {
            "stable": out_features**0.25 / self.gamma**0.5,
            "unit": 1.0,
            "gradient": 1.0 / self.scale,
        }[self.start_scale]
        if self.compat == "peft":
            B = B * S[..., up].unsqueeze(-2)
            return (A * size if self.start_scale == "gradient" else A), B * size
        return A * size, B * size
