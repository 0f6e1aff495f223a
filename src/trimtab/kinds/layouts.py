"""How a weight is stored and applied: every layout shows it as a matrix (*lead, out, in) and applies factors of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import TargetError
from trimtab.quantized import is_transposed, linear_features


@dataclass(frozen=True)
class Layout:
    """A linear map over the last axis, stored as (out, in)."""

    lead: tuple[int, ...]
    out_features: int
    in_features: int
    axis: int = -1

    def matrix(self, weight: Tensor) -> Tensor:
        """View the stored weight as (*lead, out, in)."""
        return weight

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Bring a matrix (*lead, out, in) back to the storage shape of `like`."""
        return matrix.reshape(like.shape)

    def down(self, module: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
        """Apply a factor (*lead, r, in) as the module applies its weight, without bias."""
        return F.linear(x, factor)

    def up(self, hidden: Tensor, factor: Tensor) -> Tensor:
        """Apply a factor (*lead, out, r) to the r channels."""
        return F.linear(hidden, factor)

    def channels(self, vector: Tensor, like: Tensor) -> Tensor:
        """Shape a vector of one number per channel so that it multiplies `like` along the channel axis."""
        return along_axis(vector, self.axis, like)

    def rank(self, rank: int) -> int:
        """Return the rank that each leading matrix gets."""
        return rank


@dataclass(frozen=True)
class TransposedLayout(Layout):
    """A linear map stored as (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.t()


@dataclass(frozen=True)
class EmbeddingLayout(TransposedLayout):
    """A table (num, dim): the map from a one-hot row, in = num, out = dim."""

    def down(self, module: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
        return F.embedding(x, factor.t())


@dataclass(frozen=True)
class ConvolutionLayout(Layout):
    """A convolution (out, in/groups, *kernel); with groups, one matrix for each group."""

    axis: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(*self.lead, self.out_features, self.in_features)

    def down(self, module: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
        weight: Any = module.weight
        kernel = factor.reshape(-1, *weight.shape[1:])  # (groups·r, in/groups, *kernel)
        return module._conv_forward(x, kernel, None)  # type: ignore[no-any-return,operator]

    def up(self, hidden: Tensor, factor: Tensor) -> Tensor:
        groups = self.lead[0] if self.lead else 1
        weight = factor.reshape(-1, factor.shape[-1], *[1] * (hidden.dim() - 2))  # (out, r/groups, 1, …)
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[hidden.dim()]
        return convolve(hidden, weight, groups=groups)

    def rank(self, rank: int) -> int:
        groups = self.lead[0] if self.lead else 1
        if rank % groups:
            raise TargetError(f"rank {rank} must be a multiple of the convolution's {groups} groups.")
        return rank // groups


def along_axis(vector: Tensor, axis: int, like: Tensor) -> Tensor:
    """Shape a vector of one number per channel so that it acts along the channel axis of `like`."""
    behind = like.dim() - 1 - axis if axis >= 0 else -1 - axis
    return vector.view(-1, *[1] * behind) if behind else vector


def index_dtype(size: int) -> torch.dtype:
    """Return the narrowest integer type for the positions 0 … size-1 along an axis that processes can exchange."""
    types = (torch.uint8, torch.int32)  # gloo, which joins processes without GPUs, knows no int16
    return next((kind for kind in types if size - 1 <= torch.iinfo(kind).max), torch.int64)


def layout_of(path: str, module: nn.Module, parameter: str | None) -> Layout:
    """Return the layout of a module's weight, or of one raw parameter; raises TargetError where there is none."""
    tensor = module._parameters.get(parameter or "weight")
    if parameter is not None and tensor is not None and (parameter != "weight" or not callable_alone(module)):
        if tensor.dim() not in (2, 3):
            raise TargetError(
                f"{path}:{parameter} has shape {tuple(tensor.shape)}; a matrix or stack of them is needed."
            )
        return Layout(tuple(tensor.shape[:-2]), int(tensor.shape[-2]), int(tensor.shape[-1]))
    features = linear_features(module)
    if features is not None:
        kind = TransposedLayout if is_transposed(module) else Layout
        return kind((), features[1], features[0])
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return EmbeddingLayout((), module.embedding_dim, module.num_embeddings)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        weight, groups = module.weight, module.groups
        lead = (groups,) if groups > 1 else ()
        return ConvolutionLayout(lead, weight.shape[0] // groups, weight[0].numel())
    raise TargetError(f"{path!r} is a {type(module).__name__}, which holds no weight this method can act on.")


def callable_alone(module: nn.Module) -> bool:
    """Say whether the module applies its weight in its own forward (the projection inside nn.MultiheadAttention
    is only read by its owner)."""
    return type(module).__name__ != "NonDynamicallyQuantizableLinear"
