"""TMoE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError, TargetError
from trimtab.kinds.initial import kaiming_uniform, normal, truncated_normal
from trimtab.kinds.layouts import ConvolutionLayout
from trimtab.kinds.lowrank import lora_scale
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import at_least_single


@dataclass(frozen=True)
class TMoE(WeightMethod):
    """TMoE, the layer of SPMTrack: Spatio-Temporal PEFT with Mixture of Experts. Cai et al. 2025, arXiv 2503.18338.

    y = x·Wᵀ + b + s·Σ_e g_e(x)·R_e·C·dropout(x) with g = softmax(x·Gᵀ) over E experts for each token, all of them
    active: C (r, in), R_e (out, r), router G (E, in) uniform as a linear layer, s = alpha/r. The update depends on the
    input, so it cannot be merged. `initial="lora"`: C uniform as in LoRA, R = 0, which starts at the base;
    "gaussian": C ~ N(0, 1/r²), R = 0; "bert" is the authors' default, both truncated N(0, 0.02²), and does not start at
    the base. `shared_expert` adds s·R₀·C·x ungated; `own_compression` gives each expert its own C (not both).
    The router runs in at least float32, on the input that is not dropped out. The authors adapt every linear map of
    every block, a fused qkv split into three layers with an adapter each (name the projections of a model that has
    them apart: a fused one gets one adapter here). r = 64, alpha = 64, E = 4. Their merge is left over from LoRA and
    would be wrong. The tracker around the layer is no part of this method. Not defined on embeddings, convolutions and
    weights that are only read. With R = 0 the router has no gradient before the first step.
    Trainable: r·in + E·r·out + E·in for each layer; ViT-B/14, all linear maps, r = 64: 26,873,856.
    """

    rank: int = setting(64, "rank r of every expert", minimum=1)
    experts: int = setting(4, "number E of routed experts", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; None: equal to the rank", above=0.0)
    dropout: float = setting(0.0, "dropout on the input of C", minimum=0.0, maximum=0.99)
    rank_stabilized: bool = setting(False, "scale by 1/√rank instead of 1/rank")
    initial: Literal["lora", "gaussian", "bert"] = setting("lora", "start of C and the experts")
    shared_expert: bool = setting(False, "one more expert that is always on")
    own_compression: bool = setting(False, "a C for each expert")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(
        starts_at_base="exact",
        merge="none",
        merge_reason="its update depends on the input (a router mixes the experts for each token)",
        input_dependent=True,
        per_sample_gradients=True,
    )

    def promises(self) -> Capabilities:
        return replace(self.capabilities, starts_at_base="no" if self.initial == "bert" else "exact")

    def validate(self) -> None:
        if self.shared_expert and self.own_compression:
            raise SettingError("TMoE: a shared expert needs the shared C, so own_compression must be off.")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("TMoE", site)
        if not site.called or isinstance(site.layout, ConvolutionLayout):
            raise TargetError(f"TMoE is not defined for {str(site)!r}, which is no linear map that is called.")

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank, compressions = site.rank(self.rank), self.experts if self.own_compression else 1
        specs = {
            "down": Spec((compressions, rank, site.in_features)),
            "up": Spec((self.experts, site.out_features, rank)),
            # One expert is always fully on: its router has nothing to choose.
            "router": Spec((self.experts, site.in_features), reached=self.experts > 1),
        }
        return specs | ({"shared_up": Spec((site.out_features, rank))} if self.shared_expert else {})

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        kaiming_uniform(leaf.router, generator)
        if self.initial == "lora":
            kaiming_uniform(leaf.down, generator)
        elif self.initial == "gaussian":
            normal(leaf.down, 1.0 / self.rank, generator)
        else:
            for tensor in (leaf.down, leaf.up, *((leaf.shared_up,) if self.shared_expert else ())):
                truncated_normal(tensor, 0.02, generator)

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        x = x.to(leaf.down.dtype)
        with torch.autocast(x.device.type, enabled=False):
            gates = F.linear(at_least_single(x), at_least_single(leaf.router)).softmax(-1)  # (..., E)
        hidden = F.linear(F.dropout(x, self.dropout, leaf.training), leaf.down.flatten(0, 1)).to(leaf.up.dtype)
        scale = lora_scale(self.alpha, self.rank, self.rank_stabilized)
        hidden = scale * hidden.view(*hidden.shape[:-1], -1, self.rank)  # (..., E or 1, r)
        gated = (gates.unsqueeze(-1).to(hidden.dtype) * hidden).flatten(-2)  # (..., E·r)
        update = F.linear(gated, leaf.up.transpose(0, 1).flatten(1))
        if self.shared_expert:
            update = update + F.linear(hidden.squeeze(-2), leaf.shared_up)
        return y + update.to(y.dtype)
