"""Reading and writing weights whatever their storage: plain, transposed, bitsandbytes, torchao."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import AttachError


def _names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def is_transposed(module: nn.Module) -> bool:
    """Say whether the module is GPT-2's linear map, which stores its weight as (in, out)."""
    return "Conv1D" in _names(module) and not isinstance(module, nn.Conv1d)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear map over the last axis, else None.

    Sizes come from the module, never from the stored weight: a packed weight has another shape.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        rows, columns = module.get_parameter("weight").shape
        return rows, columns
    return None


def is_packed(module: nn.Module, parameter: str = "weight") -> bool:
    """Say whether the weight is stored quantised, so that it can be neither read nor edited as numbers."""
    weight = module._parameters.get(parameter)
    if weight is None:
        return False
    if type(weight) is nn.Parameter:  # plain numbers, told in a way that torch.compile can follow
        return not weight.dtype.is_floating_point
    quantised = {"Params4bit", "Int8Params", "TorchAOBaseTensor"}
    tensor_names = {cls.__name__ for cls in type(weight.data).__mro__} | {cls.__name__ for cls in type(weight).__mro__}
    return bool(tensor_names & quantised) or not weight.dtype.is_floating_point


def at_least_single(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own precision where that is higher: what merging computes in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or gathered where processes hold shards of it: then all of them must call this."""
    sharded: Any = tensor
    return sharded.full_tensor() if type(tensor).__name__ == "DTensor" else tensor


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Return the whole weight as a float tensor in its storage orientation, dequantised if packed; not recorded."""
    weight = module._parameters[parameter]
    if weight is None:
        raise AttachError(f"{type(module).__name__} has no {parameter}.")
    if not is_packed(module, parameter):
        return whole(weight.detach())
    with torch.no_grad():
        return _dequantise(module, weight)


def _dequantise(module: Any, weight: Any) -> Tensor:
    kind = type(weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if kind == "Int8Params":
        statistics = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * statistics.view(-1, 1) / 127.0  # type: ignore[no-any-return]
    return weight.dequantize()  # type: ignore[no-any-return]
