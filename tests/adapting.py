"""What many tests do with adapters and models: move one away from its start, keep a state, compare with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import trimtab as tt


def moved(model: nn.Module, method: tt.Method, name: str = "default", seed: int = 0) -> tt.Adapter:
    """Attach a method and move it away from its start."""
    adapter = tt.attach(model, method, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return adapter


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
