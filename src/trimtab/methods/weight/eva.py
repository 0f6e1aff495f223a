"""EVA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.calibration import require_linear, visit_inputs
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Batches, Capabilities, Spec, Targets, setting
from trimtab.quantized import at_least_single

if TYPE_CHECKING:
    from trimtab.adapter import Part


@dataclass(frozen=True)
class EVA(WeightMethod):
    """EVA: Explained Variance Adaptation. Paischer et al. 2024, arXiv 2410.07170.

    ΔW = s·B·A, s = alpha/r; the rows of A (R, in) are the principal components of the inputs of the module, B = 0:
    starts at the base. R = round(ρ·r) rows are prepared at each site; of all of them, the r·(number of sites) with the
    largest share of their module's variance stay, the others are zero in A and B for good (they get no gradient). So
    ranks go where the data vary; ρ = 1 keeps r everywhere. Padding does not count.
    Needs attach(…, calibration=Batches(data)). The components are those of all calibration inputs at once; the
    official code (ml-jku/EVA a5ac24b) and huggingface/peft approximate them batch by batch and stop when they hardly
    move. Trainable: at most round(ρ·r)·(in + out) for each matrix, r·(in + out) of them alive on average.
    """

    rank: int = setting(8, "average rank of the update", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    rho: float = setting(2.0, "largest rank of a site, relative to the average", minimum=1.0)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(
        starts_at_base="exact", merge="exact", per_sample_gradients=True, requires_calibration=True
    )

    def check_site(self, site: ParameterSite) -> None:
        require_linear("EVA", site)
        site.rank(self.rank)

    def _prepared(self, site: ParameterSite) -> int:
        return min(round(self.rho * self.rank), site.in_features, site.out_features)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, uniform = self._prepared(site), self.rho == 1.0  # a site may end with no rank at all
        return {
            "A": Spec(site.matrices(rank, site.in_features), reached=uniform),
            "B": Spec(site.matrices(site.out_features, rank), reached=uniform),
        }

    def calibrate(self, part: Part, batches: Batches) -> None:
        moments: dict[WeightLeaf, tuple[int, Tensor, Tensor]] = {}

        def add(leaf: WeightLeaf, x: Tensor) -> None:
            x = at_least_single(x)
            width = x.shape[1]
            count, total, squares = moments.get(leaf, (0, x.new_zeros(width), x.new_zeros(width, width)))
            moments[leaf] = (count + len(x), total + x.sum(0), squares + x.t() @ x)

        visit_inputs(part, batches, add, padding=False)
        shares = []
        for leaf in part.leaves:
            if leaf not in moments:
                raise SettingError(f"EVA: the calibration data never reached {str(leaf.site)!r}.")
            count, total, squares = moments[leaf]
            if count <= leaf.A.shape[-2] or not bool(torch.isfinite(squares).all()):
                raise SettingError(f"EVA: the calibration data gave {str(leaf.site)!r} {count} finite inputs, too few.")
            mean = total / count
            variances, components = torch.linalg.eigh(squares / count - torch.outer(mean, mean))
            leaf.A.copy_(components.flip(-1).t()[: leaf.A.shape[-2]])
            shares.append((variances.flip(-1) / variances.sum())[: leaf.A.shape[-2]])
        budget = self.rank * len(shares)
        least = torch.cat(shares).topk(min(budget, sum(map(len, shares)))).values.min()
        for leaf, share in zip(part.leaves, shares, strict=True):
            leaf.A[..., share < least, :] = 0.0

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return lora_scale(self.alpha, self.rank, rank_stabilized=False)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.scale * (leaf.B @ leaf.A)

    def factors(self, leaf: WeightLeaf) -> Factors:
        return Factors(leaf.A, leaf.B, self.scale, dropout=self.dropout)
