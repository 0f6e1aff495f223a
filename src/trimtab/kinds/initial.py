"""Initial values, drawn from a generator of the adapter's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.kinds.layouts import EmbeddingLayout, Layout


def uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill with U(−bound, bound); the same bits on every processor."""
    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
    tensor.copy_((2.0 * values - 1.0) * bound)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator, gain: float = 1.0 / math.sqrt(3.0)) -> None:
    """Fill (*lead, rows, in) with U(−b, b), b = gain·√(3/in); the default gain is PyTorch's for linear layers."""
    uniform(tensor, gain * math.sqrt(3.0 / tensor.shape[-1]), generator)


def normal(tensor: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Fill with N(0, deviation²)."""
    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * deviation)


def truncated_normal(tensor: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Fill with N(0, deviation²) restricted to two standard deviations (TensorFlow's truncated normal)."""
    inside = math.erf(math.sqrt(2.0))  # probability within two standard deviations
    values = (2.0 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1.0) * inside
    tensor.copy_(torch.erfinv(values) * math.sqrt(2.0) * deviation)


def lora_start(down: Tensor, up: Tensor, layout: Layout, generator: torch.Generator) -> None:
    """LoRA's start, whose product is zero: `down` uniform, `up` zero; on an embedding `down` zero, `up` ~ N(0, 1)."""
    if isinstance(layout, EmbeddingLayout):
        normal(up, 1.0, generator)
    else:
        kaiming_uniform(down, generator)
