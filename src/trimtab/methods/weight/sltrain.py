"""SLTrain."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.initial import kaiming_uniform, uniform
from trimtab.kinds.layouts import index_dtype
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.rebuilt import fused_by_rebuilding, linear_with_rebuilt_weight
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class SLTrain(WeightMethod):
    """SLTrain: sparse plus low-rank pretraining. Han et al. 2024, arXiv 2406.02214.

    W′ = s·B·A + S in the PLACE of W, s = alpha/r: A (r, in) uniform as in LoRA, B (out, r) = 0, S zero but for
    int(density·out·in) values U(±1/√in) at places drawn once; a bias is drawn anew, U(±1/√out), and trained. It is a
    layer for training from scratch: nothing of W enters the output, and the start is a sparse random matrix. W itself
    stays untouched and comes back on detaching, so its memory is not saved; train what the paper trains at full rank
    beside it: Compose(SLTrain(), FullTuning(targets="embedding | norm | head")). W′ exists for one layer at a time:
    it is made in forward and again in backward, as in the authors' extension. `on_base=True` is our own extension for
    fine-tuning: W′ = W + s·B·A + S with S starting at zero and the bias frozen, which starts at the base.
    `train_scale` replaces s by tanh of a trained number that starts at 1, as the authors' option. Their dropout is
    never applied. Paper: rank 128 to 1024, density 0.03 to 0.05, alpha 32 to 8, learning rate 3e-3.
    Trainable: r·(in + out) + int(density·in·out) for each matrix, and its bias.
    """

    rank: int = setting(128, "rank of the dense part", minimum=1)
    alpha: float | None = setting(32.0, "numerator of the scale; None: equal to the rank", above=0.0)
    density: float = setting(0.03, "share of the entries of S that are trained", above=0.0, maximum=1.0)
    train_scale: bool = setting(False, "train the scale as tanh of a number")
    on_base: bool = setting(False, "add to the base's weight instead of replacing it (not in the paper)")
    targets: Targets = setting("all-linear", "places to replace")

    capabilities = Capabilities(starts_at_base="no", merge="exact", additive=False)

    def promises(self) -> Capabilities:
        return replace(self.capabilities, starts_at_base="exact" if self.on_base else "no")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("SLTrain", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, lead, size = site.rank(self.rank), site.layout.lead, site.out_features * site.in_features
        count = int(self.density * size)
        if count == 0:
            raise SettingError(f"SLTrain(density={self.density}) selects none of the {size} entries of {str(site)!r}.")
        specs = {
            # From scratch, layers of few entries and B = 0 let gradients through one by one.
            "A": Spec(site.matrices(rank, site.in_features), reached=self.on_base),
            "B": Spec(site.matrices(site.out_features, rank)),
            "value": Spec((*lead, count), reached=self.on_base),
            "index": frozen(*lead, count, stored="always", dtype=index_dtype(size)),
        }
        specs |= {"scale": Spec((1,))} if self.train_scale else {}
        outputs = math.prod(lead) * site.out_features
        return specs | ({"own_bias": Spec((outputs,))} if self._has_bias(site) else {})

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        kaiming_uniform(leaf.A, generator)
        size, count = leaf.site.out_features * leaf.site.in_features, leaf.value.shape[-1]
        for row in leaf.index.view(-1, count):
            row.copy_(torch.randperm(size, generator=generator)[:count].sort().values)
        if not self.on_base:
            uniform(leaf.value, 1.0 / math.sqrt(leaf.site.in_features), generator)
        if self.train_scale:
            leaf.scale.fill_(1.0)
        if self._has_bias(leaf.site):
            uniform(leaf.own_bias, 1.0 / math.sqrt(leaf.own_bias.numel()), generator)

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return _on_base(weight, *self._parts(leaf)) if self.on_base else _low_rank_and_sparse(*self._parts(leaf))

    def bias(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor | None:
        return leaf.own_bias if self._has_bias(leaf.site) else bias

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return _low_rank_and_sparse(*self._parts(leaf))

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        if self.on_base:
            return fused_by_rebuilding(leaf, x, _on_base, *self._parts(leaf))
        bias = leaf.own_bias.to(x.dtype) if self._has_bias(leaf.site) else None
        return linear_with_rebuilt_weight(x, bias, _low_rank_and_sparse, *self._parts(leaf))

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        if self.on_base:
            return super().forward(leaf, x, y)
        output = reference_update(leaf, x, self.delta(leaf))
        output = output + leaf.site.layout.channels(leaf.own_bias, output) if self._has_bias(leaf.site) else output
        return output.to(y.dtype)

    def _has_bias(self, site: ParameterSite) -> bool:
        return site.has_bias and not self.on_base

    def _parts(self, leaf: WeightLeaf) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return s·A, B, the values of S, and their places."""
        scale = leaf.scale.tanh() if self.train_scale else lora_scale(self.alpha, self.rank, rank_stabilized=False)
        return scale * leaf.A, leaf.B, leaf.value, leaf.index


def _low_rank_and_sparse(A: Tensor, B: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Return B·A with the values added at their flat places, (*lead, out, in)."""
    with torch.autocast(B.device.type, enabled=False):
        dense = B @ A
    return dense.flatten(-2).scatter_add(-1, index.long(), value).view(dense.shape)


def _on_base(weight: Tensor, *parts: Tensor) -> Tensor:
    return weight + _low_rank_and_sparse(*parts)
