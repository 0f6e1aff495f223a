"""Reading and writing weights whatever their storage: plain, transposed, bitsandbytes, torchao, sharded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
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
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def for_file(tensor: Tensor) -> Tensor:
    """Return the whole tensor as files hold it: on the processor, contiguous, not recorded."""
    return whole(tensor.detach()).cpu().contiguous()


def is_sharded(tensor: Tensor) -> bool:
    """Say whether processes hold shards of the tensor."""
    return type(tensor).__name__ == "DTensor"


def placed_like(values: Tensor, tensor: Tensor) -> Tensor:
    """Return whole values on the device of `tensor`, or this process's shard of them where it holds one of `tensor`."""
    if not is_sharded(tensor):
        return values.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    here = values.to(sharded.to_local().device)
    return distribute_tensor(here, sharded.device_mesh, sharded.placements, src_data_rank=None)  # nothing is sent


@contextlib.contextmanager
def gathered(places: Iterable[tuple[nn.Module, str]], write: bool) -> Iterator[None]:
    """Inside the `with`, parameters of which processes hold shards are whole, gradients included; all must call this.

    `places`: (module, name of its parameter). `write`: keep what was changed in place; otherwise the whole tensors are
    functions of the shards, to be differentiated.
    """
    held = [(module, name, module._parameters[name]) for module, name in places if name in module._parameters]
    shards = [(module, name, shard) for module, name, shard in held if shard is not None and is_sharded(shard)]
    for module, name, shard in shards:
        full: Any = nn.Parameter(whole(shard.detach()), shard.requires_grad) if write else whole(shard)
        if write and shard.grad is not None:
            full.grad = whole(shard.grad)
        module._parameters[name] = full
    try:
        yield
    finally:
        for module, name, shard in shards:
            changed, module._parameters[name] = module._parameters[name], shard
            if write and changed is not None:
                _write_back(shard, changed)


def _write_back(shard: nn.Parameter, changed: nn.Parameter) -> None:
    with torch.no_grad():
        shard.copy_(placed_like(changed.detach(), shard))
        if shard.grad is not None and changed.grad is not None:
            shard.grad.copy_(placed_like(changed.grad, shard))


def dense_weight(module: nn.Module, parameter: str = "weight") -> Tensor:
    """Return the whole weight as a float tensor in its storage orientation, dequantised if packed; not recorded."""
    weight = module._parameters[parameter]
    if weight is None:
        raise AttachError(f"{type(module).__name__} has no {parameter}.")
    if not is_packed(module, parameter):
        return whole(weight.detach())
    with torch.no_grad():
        return _dequantise(module, weight)


def plain_numbers(tensor: Any) -> Tensor:
    """Return a tensor as plain numbers: torchao's types are dequantised, any other is returned as it is."""
    packed = any(cls.__name__ == "TorchAOBaseTensor" for cls in type(tensor).__mro__)
    return tensor.dequantize() if packed else tensor  # type: ignore[no-any-return]


def keep_from_repacking(model: nn.Module) -> list[Callable[[], object]]:
    """Keep 4-bit weights in the form that can be trained beside; returns what undoes it. Raises AttachError if lost.

    On processors with AVX512-BF16 bitsandbytes replaces a 4-bit weight at the first forward in evaluation mode by a
    form that rounds its scales to bfloat16 and lets no gradient through, for good.
    """
    name, undo = "support_avx512bf16_for_cpu", []
    for path, module in model.named_modules():
        if name in module.__dict__:
            held: Any = module
            _refuse_repacked(repr(path), held.weight.quant_state)
            undo.append(functools.partial(setattr, module, name, module.__dict__[name]))
    for call in undo:
        setattr(call.args[0], name, False)
    return list(undo)


def _refuse_repacked(where: str, quant_state: Any) -> None:
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise AttachError(
            f"bitsandbytes has repacked the 4-bit weight of {where} for inference on this CPU, at a forward in "
            f"evaluation mode: it lets no gradient through and its numbers are rounded. Load the model again and "
            f"attach before the first forward."
        )


def _dequantise(module: Any, weight: Any) -> Tensor:
    """Told by what the weight carries: its class does not survive pickling."""
    quant_state, name = getattr(weight, "quant_state", None), type(module).__name__
    if quant_state is not None:
        from bitsandbytes.functional import dequantize_4bit

        _refuse_repacked(f"a {name}", quant_state)
        return dequantize_4bit(weight.data, quant_state)  # type: ignore[no-any-return]
    if weight.dtype is torch.int8:
        scales = getattr(weight, "SCB", None)
        scales = module.state.SCB if scales is None else scales
        return weight.data.float() * scales.view(-1, 1) / 127.0  # type: ignore[no-any-return]
    numbers = plain_numbers(weight)
    if numbers is weight:
        raise AttachError(f"the weight of a {name} is stored as {weight.dtype}, which cannot be read as numbers.")
    return numbers
