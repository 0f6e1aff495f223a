"""How much single numbers of a tensor matter to the loss: smoothed sensitivity times its uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.hooks import Leaf
from trimtab.method import Spec, frozen


def importance_specs(name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """Return the specs of the two running averages that belong to the tensor `name`."""
    average = frozen(*shape, stored="training", dtype=torch.float32)
    return {f"{name}_sensitivity": average, f"{name}_uncertainty": average}


def measure_importance(leaf: Leaf, name: str, smoothing: float) -> None:
    """Take the present value and gradient into the averages, in place (arXiv 2303.10512, equations 8 to 10).

    With s = |p·∂L/∂p|: I ← β·I + (1 − β)·s, then U ← β·U + (1 − β)·|s − I|. A missing gradient counts as zero.
    """
    value: Tensor = getattr(leaf, name)
    sensitivity, uncertainty = getattr(leaf, f"{name}_sensitivity"), getattr(leaf, f"{name}_uncertainty")
    gradient = torch.zeros_like(value) if value.grad is None else value.grad
    present = (value.detach().float() * gradient.float()).abs()
    sensitivity.mul_(smoothing).add_(present, alpha=1.0 - smoothing)
    uncertainty.mul_(smoothing).add_((present - sensitivity).abs(), alpha=1.0 - smoothing)


def importance(leaf: Leaf, name: str) -> Tensor:
    """Return I·U for each number of a tensor."""
    return getattr(leaf, f"{name}_sensitivity") * getattr(leaf, f"{name}_uncertainty")  # type: ignore[no-any-return]
