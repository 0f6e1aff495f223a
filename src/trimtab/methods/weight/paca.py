"""PaCA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError, TargetError
from trimtab.kinds.layouts import ConvolutionLayout, index_dtype
from trimtab.kinds.lowrank import accumulate, lora_scale
from trimtab.kinds.transforms import transformed
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class PaCA(WeightMethod):
    """PaCA: Partial Connection Adaptation for Efficient Fine-Tuning. Woo et al. 2025, arXiv 2503.01905.

    In each weight W (out, in), r input columns idx, drawn at random, are trained: W′[:, idx] = s·p, s = alpha/r,
    p (out, r) starting at W[:, idx]/s. Held here as Δ = p − W[:, idx]/s, which starts at zero, so that the base is
    never written and the start is exact on any base: y = base(x) + s·x[..., idx] Δᵀ. The gradient is the same,
    s·(full dW)[:, idx], and of the input only x[..., idx] is kept for it: tokens·r numbers, LoRA keeps tokens·(in + r).
    The choice follows `attach(…, seed=…)`; the indices are saved in the narrowest integer type. No weight decay (the
    authors' would act on p and pull the pretrained columns to zero). Merging writes those columns and no other number.
    The authors' code overwrites the base while training, and may run on columns of the step before.
    With Adam, s multiplies the learning rate of the columns. Trainable: r·out for each weight (7 projections of
    Llama2-7B, r = 8: 10,878,976). Not defined on embeddings and convolutions.
    """

    rank: int = setting(8, "number of trained input columns of each weight", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale s; None: equal to the rank (s = 1)", above=0.0)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True)

    @property
    def scale(self) -> float:
        """The factor s of the columns."""
        return lora_scale(self.alpha, self.rank, rank_stabilized=False)

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("PaCA", site)
        if isinstance(site.layout, ConvolutionLayout):
            raise TargetError(f"PaCA is not defined for the convolution {site.path!r}; leave it out of the targets.")

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        if self.rank > site.in_features:
            raise SettingError(
                f"PaCA(rank={self.rank}): {str(site)!r} has only {site.in_features} input columns; use a smaller rank, "
                f"or leave this layer out of the targets."
            )
        lead = site.layout.lead
        return {
            "change": Spec((*lead, site.out_features, self.rank), decay=False),
            "index": frozen(*lead, self.rank, stored="always", dtype=index_dtype(site.in_features)),
        }

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        chosen = leaf.index.view(-1, self.rank)
        for row in chosen:
            row.copy_(torch.randperm(leaf.site.in_features, generator=generator)[: self.rank])

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        columns = leaf.index.long().unsqueeze(-2).expand(leaf.change.shape)  # (*lead, out, r)
        return weight.scatter_add(-1, columns, (self.scale * leaf.change).to(weight.dtype))

    def delta(self, leaf: WeightLeaf) -> Tensor:
        shape = leaf.site.matrices(leaf.site.out_features, leaf.site.in_features)
        return self.weight(leaf, leaf.change.new_zeros(shape))

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        target: Any = leaf.target
        return _WithColumns.apply(x, None, target.weight, target.bias, leaf.change, leaf.index, self.scale)  # type: ignore[no-any-return,no-untyped-call]

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        if transformed():
            selected = x.index_select(-1, leaf.index.view(-1).long()).to(leaf.change.dtype)  # (tokens, r)
            return y + self.scale * F.linear(selected, leaf.change).to(y.dtype)
        return _WithColumns.apply(x, y, None, None, leaf.change, leaf.index, self.scale)  # type: ignore[no-any-return,no-untyped-call]


class _WithColumns(torch.autograd.Function):
    """y + s·x[..., idx] Δᵀ, where y is given or is x Wᵀ + b; keeps x[..., idx], and parameters by reference."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None,
        change: Tensor, index: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        selected = x.index_select(-1, index.long()).view(-1, index.numel())  # (tokens, r)
        output = F.linear(x, weight, bias) if y is None else y.clone(memory_format=torch.contiguous_format)
        accumulate(output.view(-1, output.shape[-1]), selected.to(change.dtype), change.t(), scale)
        whole = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(selected, weight, change, index, whole)
        ctx.scale, ctx.shape = scale, x.shape
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        selected, weight, change, index, whole = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        wide, grad_x, needs = rows.to(change.dtype), None, ctx.needs_input_grad
        if needs[0]:
            grad_x = rows.new_zeros(len(rows), ctx.shape[-1]) if weight is None else torch.mm(rows, weight)
            grad_x.index_add_(1, index.long(), torch.mm(change.t(), wide.t()).t().to(grad_x.dtype), alpha=ctx.scale)
            grad_x = grad_x.view(ctx.shape)
        grad_change = torch.mm(selected.to(change.dtype).t(), wide).mul_(ctx.scale).t() if needs[4] else None
        grad_weight = torch.mm(rows.t(), whole.reshape(len(rows), -1)) if needs[2] else None
        grad_bias = rows.sum(0) if needs[3] else None
        return grad_x, grad if needs[1] else None, grad_weight, grad_bias, grad_change, None, None
