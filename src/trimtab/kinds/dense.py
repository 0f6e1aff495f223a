"""One product for base and update, for updates that are dense by their nature."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.weight import WeightLeaf, reference_update


def linear_with_dense_update(leaf: WeightLeaf, x: Tensor, delta: Tensor) -> Tensor:
    """Return x (W + ΔW)ᵀ + b of a plain `nn.Linear`; x (..., in), ΔW (out, in).

    Where W is less precise than ΔW, adding them would round the update away: then there are two products.
    """
    target: Any = leaf.target
    if target.weight.dtype == x.dtype == delta.dtype:
        return F.linear(x, target.weight + delta, target.bias)
    y = F.linear(x, target.weight, target.bias)
    return y + reference_update(leaf, x, delta).to(y.dtype)
