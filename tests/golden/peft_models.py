"""What the comparisons with peft share: a model with every kind of layer, and training two models side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab


class Layers(nn.Module):
    """Embedding, linear, transposed linear, convolution and grouped convolution in one chain."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 12)
        self.transposed = Conv1D(6, 12)
        self.plain = nn.Conv2d(1, 6, kernel_size=3, padding=1)
        self.grouped = nn.Conv2d(6, 4, kernel_size=3, stride=2, groups=2)
        self.head = nn.Linear(4, 3, bias=False)
        nn.init.normal_(self.transposed.weight, std=0.3)
        nn.init.normal_(self.transposed.bias, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.linear(self.embedding(tokens)))
        hidden = self.transposed(hidden).unsqueeze(1)  # (batch, 1, positions, 6)
        hidden = F.gelu(self.plain(hidden))
        return self.head(F.gelu(self.grouped(hidden)).mean((2, 3)))


TOKENS = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 0])


@dataclass(frozen=True)
class Pair:
    """One trained tensor of ours and peft's tensor of the same meaning; `view` shows the latter in our shape."""

    ours: Tensor
    theirs: Tensor
    view: Callable[[Tensor], Tensor]

    def copy(self) -> None:
        """Give ours peft's values."""
        with torch.no_grad():
            self.ours.copy_(self.view(self.theirs))


def reshaped(ours: Tensor, theirs: Tensor) -> Pair:
    """Return a pair that differs in its shape only."""
    return Pair(ours, theirs, lambda tensor: tensor.reshape(ours.shape))


def leaf_at(adapter: trimtab.Adapter, path: str) -> Any:
    """Return the adapter's tensors at one place."""
    (part,) = adapter.parts
    (leaf,) = [leaf for leaf, site in zip(part.leaves, part.sites, strict=True) if site.path == path]
    return leaf


def twins(method: trimtab.Method, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, trimtab.Adapter, nn.Module]:
    """Return a model with our adapter, the adapter, and an equal bare model."""
    model = Layers().to(dtype)
    bare = copy.deepcopy(model)
    return model, trimtab.attach(model, method, dtype=dtype), bare


def randomise(tensors: Iterable[Tensor], seed: int = 2) -> None:
    """Fill tensors with numbers that no part of a formula is lost on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def assert_same_training(
    ours: nn.Module, theirs: nn.Module, pairs: list[Pair], tolerance: float, steps: int = 5
) -> None:
    """Train both from equal tensors: outputs, gradients and tensors must agree in every step."""
    optimizers = [
        torch.optim.AdamW([pair.ours for pair in pairs], lr=1e-2, weight_decay=0.0),
        torch.optim.AdamW([pair.theirs for pair in pairs], lr=1e-2, weight_decay=0.0),
    ]
    start = [pair.ours.detach().clone() for pair in pairs]
    for _ in range(steps):
        outputs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(TOKENS))
            F.cross_entropy(outputs[-1], LABELS).backward()
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=tolerance)
        for pair in pairs:
            assert pair.ours.grad is not None
            assert pair.theirs.grad is not None
            torch.testing.assert_close(pair.ours.grad, pair.view(pair.theirs.grad), rtol=0, atol=tolerance)
        for optimizer in optimizers:
            optimizer.step()
    for pair, before in zip(pairs, start, strict=True):
        torch.testing.assert_close(pair.ours, pair.view(pair.theirs), rtol=0, atol=100 * tolerance)
        assert not torch.allclose(pair.ours, before)


def trainable_count(model: nn.Module) -> int:
    """Return how many numbers a model trains."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
