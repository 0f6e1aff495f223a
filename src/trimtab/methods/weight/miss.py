"""MiSS."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.blocks import cut
from trimtab.kinds.dense import linear_with_dense_update
from trimtab.kinds.layouts import ConvolutionLayout
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class MiSS(WeightMethod):
    """MiSS: Matrix Shard Sharing (once Bone). Kang and Yin 2024, arXiv 2409.15371.

    One matrix D (r, out) = 0 is shared by all shards of r input columns: ΔW[:, j] = D[j mod r], so that
    y = base(x) + (Σ over shards of x)·D: starts at the base, and costs a sum and one thin product. The last shard may
    be shorter. `variant="mini"` has D (r, t), repeated along the outputs, t = `mini_width` dividing out. "bat" has
    D (out/r, r, r) and adds W_ij·D_i + D_i to each block W_ij (r, r) of W: dense, depends on the base, and needs r to
    divide in and out. Dropout acts on the input of the update, in "standard" and "mini".
    A convolution shares along in·kernel, each group and expert by itself. Not defined on embeddings.
    Trainable for each matrix: r·out, r·t ("mini"), or out·r ("bat").
    """

    rank: int = setting(64, "width r of a shard", minimum=1)
    variant: Literal["standard", "mini", "bat"] = setting("standard", "how the shard acts")
    mini_width: int = setting(1, "columns t of D in the variant mini", minimum=1)
    dropout: float = setting(0.0, "dropout on the input of the update", minimum=0.0, maximum=0.99)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True)

    def promises(self) -> Capabilities:
        return dataclasses.replace(self.capabilities, additive=self.variant != "bat")

    def validate(self) -> None:
        if self.variant == "bat" and self.dropout > 0.0:
            raise SettingError(f"MiSS(variant='bat', dropout={self.dropout}): this variant has no dropout.")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("MiSS", site)
        divided = {"standard": (), "mini": (site.out_features,), "bat": (site.in_features, site.out_features)}
        divisor = self.mini_width if self.variant == "mini" else self.rank
        too_wide = self.rank > site.in_features
        if too_wide or any(width % divisor for width in divided[self.variant]):
            raise SettingError(
                f"MiSS({self.variant}, rank={self.rank}, mini_width={self.mini_width}) does not fit {str(site)!r} of "
                f"shape {site.out_features}×{site.in_features}: rank must be at most the input width; in 'bat' it must "
                f"divide both widths, in 'mini' mini_width must divide the output width."
            )

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        lead, r, out = site.layout.lead, self.rank, site.out_features
        shapes = {"standard": (r, out), "mini": (r, self.mini_width), "bat": (out // r, r, r)}
        return {"D": Spec((*lead, *shapes[self.variant]))}

    def delta(self, leaf: WeightLeaf) -> Tensor:
        if self.variant == "bat":
            weight, r = leaf.weight().to(leaf.D.dtype), self.rank
            blocks = weight.reshape(*leaf.D.shape[:-2], r, -1, r).transpose(-3, -2)  # (*lead, out/r, in/r, r, r)
            shared = leaf.D.unsqueeze(-3)
            change: Tensor = (blocks @ shared + shared).transpose(-3, -2)
            return change.reshape(weight.shape)
        columns = torch.arange(leaf.site.in_features, device=leaf.D.device) % self.rank
        update: Tensor = self._shard(leaf).mT[..., columns]
        return update

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        if self.variant == "bat":
            return linear_with_dense_update(leaf, x, self.delta(leaf))
        return self.unfused(leaf, x)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(leaf.D.dtype)
        x = F.dropout(x, self.dropout) if leaf.training and self.dropout > 0.0 else x
        if self.variant == "bat" or isinstance(leaf.site.layout, ConvolutionLayout):
            return y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype)
        padded = F.pad(x, (0, -x.shape[-1] % self.rank))
        summed = cut(padded, -1, self.rank).sum(-2)  # (..., r)
        return y + (summed @ self._shard(leaf)).to(y.dtype)

    def _shard(self, leaf: WeightLeaf) -> Tensor:
        """Return D as (*lead, r, out)."""
        return leaf.D.repeat(*[1] * (leaf.D.dim() - 1), leaf.site.out_features // leaf.D.shape[-1])
