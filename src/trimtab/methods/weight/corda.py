"""CorDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.calibration import require_linear, visit_inputs
from trimtab.kinds.started import StartedLowRank, set_start
from trimtab.kinds.weight import ParameterSite, WeightLeaf
from trimtab.method import Batches, Capabilities, setting
from trimtab.quantized import at_least_single

if TYPE_CHECKING:
    from trimtab.adapter import Part

_LARGEST_ERROR = 0.05  # of C·C⁻¹ against the identity, as a whole


@dataclass(frozen=True)
class CorDA(StartedLowRank):
    """CorDA: Context-Oriented Decomposition Adaptation of Large Language Models. Yang et al. 2024, arXiv 2406.05223.

    C = XᵀX (in, in) of the inputs X of a module, each batch divided by |max X|, averaged over the calibration
    batches; W·C = U·diag(S)·Vᵀ; A₀ = √(S/s)·VᵀC⁻¹ (r, in), B₀ = U·√(S/s) (out, r); ΔW = s·(B·A − B₀·A₀). "instruction"
    (the paper's instruction-previewed mode, data of the new task) trains the r leading components, "knowledge" (the
    knowledge-preserved mode, data whose answers are to be kept) the r last ones. C gets 0.01 of its mean diagonal
    added to its diagonal, doubled until C·C⁻¹ is within 0.05 of the identity, as in the official code
    (iboing/CorDA baffb03). Needs attach(…, calibration=Batches(data)).
    Trainable: r·(in + out) for each matrix, LoRA's count.
    """

    components: Literal["instruction", "knowledge"] = setting(
        "instruction", "train the leading, or the last components"
    )

    capabilities = Capabilities(
        starts_at_base="exact", merge="exact", per_sample_gradients=True, requires_calibration=True
    )

    def check_site(self, site: ParameterSite) -> None:
        require_linear("CorDA", site)

    def calibrate(self, part: Part, batches: Batches) -> None:
        sums: dict[WeightLeaf, Tensor] = {}
        counts: dict[WeightLeaf, int] = {}

        def add(leaf: WeightLeaf, x: Tensor) -> None:
            x = at_least_single(x)
            x = x / x.max().abs()
            sums[leaf] = x.t() @ x + sums.get(leaf, torch.zeros(()))
            counts[leaf] = counts.get(leaf, 0) + 1

        visit_inputs(part, batches, add)
        for leaf in part.leaves:
            if leaf not in sums or not bool(torch.isfinite(sums[leaf]).all()):
                raise SettingError(f"CorDA: the calibration data gave {str(leaf.site)!r} no finite inputs.")
            set_start(leaf, *self._components(leaf, sums[leaf] / counts[leaf]))

    def _components(self, leaf: WeightLeaf, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return (A₀, B₀)."""
        damped, inverse = _inverted(covariance)
        U, S, Vh = torch.linalg.svd(at_least_single(leaf.weight()) @ damped, full_matrices=False)
        rank = leaf.A.shape[-2]
        chosen = slice(0, rank) if self.components == "instruction" else slice(S.shape[-1] - rank, None)
        root = (S[chosen] / self.scale).sqrt()
        return root.unsqueeze(-1) * (Vh[chosen] @ inverse), U[:, chosen] * root


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return C with enough on its diagonal to be inverted, and its inverse."""
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    damping, mean = 0.01, covariance.diagonal().mean()
    while damping < 1e6:
        damped = covariance + identity * mean * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < _LARGEST_ERROR:
            return damped, inverse
        damping *= 2
    raise SettingError("CorDA: the covariance of the inputs cannot be inverted; calibrate with more varied data.")
