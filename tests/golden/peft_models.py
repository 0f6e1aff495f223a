"""What the comparisons with peft share: a model with every kind of layer, and training two models side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab

peft = pytest.importorskip("peft")


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


PairsAt = Callable[[Any, Any], list[Pair]]
"""Pairs the tensors of our leaf with those of peft's layer."""


@dataclass(frozen=True)
class Beside:
    """Our model and peft's with equal adapters at the same places."""

    model: nn.Module
    adapter: trimtab.Adapter
    wrapped: Any
    pairs: list[Pair]


def beside_peft(
    method: trimtab.Method, config: Any, places: Iterable[str], pairs_at: PairsAt, dtype: torch.dtype = torch.float64
) -> Beside:
    """Attach ours and peft's; their tensors have their own starting values."""
    model, adapter, bare = twins(method, dtype)
    wrapped = peft.get_peft_model(bare, config)
    layers = {place: wrapped.base_model.model.get_submodule(place) for place in places}
    pairs = [pair for place, layer in layers.items() for pair in pairs_at(leaf_at(adapter, place), layer)]
    assert adapter.trainable_count == trainable_count(wrapped)
    return Beside(model, adapter, wrapped, pairs)


def assert_dropout_draws_as_in_peft(beside: Beside) -> None:
    """With one seed, the linear layers of both drop the same numbers in training, and none in evaluation."""
    x = torch.randn(5, 8, dtype=torch.float64)
    outputs = []
    for layer in (beside.model.linear, beside.wrapped.base_model.model.linear):
        layer.train()
        torch.manual_seed(4)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    assert (outputs[0] - beside.model.linear.eval()(x)).abs().max() > 1e-2


def assert_starts_as_in_peft(beside: Beside) -> None:
    """Every tensor of ours starts with the values of peft's; for starts that are not random."""
    for pair in beside.pairs:
        torch.testing.assert_close(pair.ours, pair.view(pair.theirs), rtol=0, atol=1e-6)


def assert_trains_and_merges_as_in_peft(
    beside: Beside, places: Iterable[str], tolerance: float = 1e-12, spread: float = 0.3
) -> None:
    """From equal random tensors: outputs, gradients, five optimizer steps, and the merged weights and biases."""
    randomise(pair.theirs for pair in beside.pairs)
    for pair in beside.pairs:
        with torch.no_grad():
            pair.theirs.mul_(spread / 0.3)
        pair.copy()
    assert (beside.model(TOKENS) - Layers().to(beside.pairs[0].ours.dtype)(TOKENS)).abs().max() > 1e-3
    assert_same_training(beside.model, beside.wrapped, beside.pairs, tolerance)
    beside.wrapped.merge_adapter()
    beside.adapter.merge()
    for place in places:
        ours, theirs = beside.model.get_submodule(place), beside.wrapped.base_model.model.get_submodule(place)
        expected = theirs.get_base_layer()
        torch.testing.assert_close(ours.weight, expected.weight, rtol=0, atol=max(1e-6, 10 * tolerance))
        if getattr(expected, "bias", None) is not None:
            torch.testing.assert_close(ours.bias, expected.bias, rtol=0, atol=max(1e-6, 10 * tolerance))


def assert_gradients_are_those_of_differences(method: trimtab.Method, place: str = "linear") -> None:
    """Output gradients of one layer, for its input and every trained tensor, against finite differences in float64."""
    model, adapter, _ = twins(method)
    parameters = list(adapter.parameters())
    moved = [tensor for tensor in parameters if not bool(tensor.any())]
    randomise(moved)
    layer: Any = model.get_submodule(place)
    widths = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    x = torch.randn(3, widths[0], generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))
