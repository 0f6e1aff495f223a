"""Bottlenecks: a projection down, an activation function and a projection up, along the channels of a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.activation import ActivationLeaf, ActivationSite
from trimtab.kinds.initial import kaiming_uniform, normal
from trimtab.method import Spec

Activation = Literal["relu", "gelu", "silu"]
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

NOT_MERGEABLE = "the activation function in the bottleneck cannot be folded into a linear map"


def bottleneck_tensors(site: ActivationSite, width: int) -> dict[str, Spec]:
    """Return the tensors of a bottleneck d → m → d with biases: 2·d·m + d + m numbers."""
    return {
        "down": Spec((width, site.features)),
        "down_bias": Spec((width,), decay=False),
        "up": Spec((site.features, width)),
        "up_bias": Spec((site.features,), decay=False),
    }


def bottleneck(leaf: ActivationLeaf, hidden: Tensor, activation: Activation, dropout: float = 0.0) -> Tensor:
    """Return W_up·act(W_down·h + b_down) + b_up on the site's channel axis; dropout acts inside the bottleneck."""
    inside = _FUNCTIONS[activation](F.linear(hidden.movedim(leaf.site.axis, -1), leaf.down, leaf.down_bias))  # (…, m)
    inside = F.dropout(inside, dropout, leaf.training)
    return F.linear(inside, leaf.up, leaf.up_bias).movedim(-1, leaf.site.axis)


def start_at_zero(leaf: ActivationLeaf, generator: torch.Generator) -> None:
    """LoRA's start: W_down uniform as in PyTorch's linear layers, the rest zero, so that the bottleneck gives zero."""
    kaiming_uniform(leaf.down, generator)


def start_normal(leaf: ActivationLeaf, deviation: float, generator: torch.Generator) -> None:
    """BERT's start: both matrices N(0, deviation²), the biases zero."""
    normal(leaf.down, deviation, generator)
    normal(leaf.up, deviation, generator)
