"""The processes of a run: which there are, how they share work, and how the model is spread over them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from trimtab.adapter import Adapter
from trimtab.adapter_file import digest
from trimtab.errors import SettingError, TrainingError
from trimtab.extras import require
from trimtab.fingerprint import fingerprint
from trimtab.quantized import is_sharded
from trimtab.storage import replaced_by

Item = TypeVar("Item")
Result = TypeVar("Result")

_ONE_MODEL_EACH = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
_DEEPSPEED = (
    "DeepSpeed keeps gradients and steps to itself, so that neither a method's schedule nor the checks of training can "
    "follow them. Use DistributedDataParallel or FSDP2, or a loop of your own (docs/distributed.md)."
)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which this one is number `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.index == 0

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def spread(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return function(item) for every item, in order, in every process; each computes a share of them.

        Every process calls `function` equally often (a surplus one repeats the last item), so that it may contain what
        all of them have to do together.
        """
        rounds = -(-len(items) // self.count)
        own = [function(items[min(n * self.count + self.index, len(items) - 1)]) for n in range(rounds)]
        if self.count == 1:
            return own
        shares: list[Any] = require("accelerate.utils", "hf").gather_object([own])
        return [shares[number % self.count][number // self.count] for number in range(len(items))]


ALONE = Processes()


def processes_started() -> int:
    """Return how many processes torchrun or accelerate says that it started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current_processes() -> Processes:
    """Return the processes that torchrun or accelerate started, after joining them; one where nobody did.

    Raises TrainingError where they cannot be joined.
    """
    # Unless told so, accelerate looks for no other process on a machine without a GPU.
    state = require("accelerate", "hf").PartialState(cpu=_only_cpus())
    started = processes_started()
    if state.num_processes != started:
        raise TrainingError(
            f"{started} processes were started together, but accelerate joins {state.num_processes}: each would train "
            f"alone and overwrite what the others write."
        )
    return Processes(state.process_index, state.num_processes)


def leave_together() -> None:
    """Leave the group of processes; one that leaves early aborts what the others still do."""
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        group.barrier()
        group.destroy_process_group()


def make_accelerator(task: str) -> Any:
    """Return accelerate's Accelerator for one process, DistributedDataParallel or FSDP2, as the launcher asked.

    Raises SettingError for any other way of distributing, or one in which `task` cannot be evaluated.
    """
    accelerate = require("accelerate", "hf")
    current_processes()
    accelerator = accelerate.Accelerator(cpu=_only_cpus())
    if accelerator.distributed_type.value == "MULTI_CPU" and _launched_with_fsdp():
        # accelerate shards on GPUs only; on CPUs it would train with DistributedDataParallel without a word.
        accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    kind = accelerator.distributed_type.value
    if kind == "FSDP":
        _check_sharding(accelerator.state.fsdp_plugin, task)
    elif kind not in _ONE_MODEL_EACH:
        reason = _DEEPSPEED if kind == "DEEPSPEED" else "Use DistributedDataParallel or FSDP2."
        raise SettingError(f"the loop does not train with {kind}. {reason}")
    accelerator.gradient_accumulation_steps = 1  # the loop weights micro-batches itself, whatever the launcher says
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return accelerator


def prepare(accelerator: Any, adapter: Adapter, lr: float, weight_decay: float) -> tuple[Any, Any, Any]:
    """Spread the adapter's model over the processes; returns what to call, its AdamW, and accelerate's wrapper of it.

    Raises TrainingError where the processes hold different models or adapters.
    """
    if accelerator.num_processes > 1:
        _check_same(adapter)
    plain = torch.optim.AdamW(adapter.parameter_groups(lr, weight_decay), lr=lr)
    if accelerator.is_fsdp2:
        model, optimizer = accelerator.prepare(adapter.model, plain)
        return model, plain, optimizer
    return accelerator.prepare_model(adapter.model), plain, accelerator.prepare_optimizer(plain)


def holds_shards(adapter: Adapter) -> bool:
    """Say whether processes hold shards of the adapter."""
    return any(is_sharded(parameter) for parameter in adapter.parameters())


def _only_cpus() -> bool | None:
    return True if processes_started() > 1 and not torch.accelerator.is_available() else None


def _launched_with_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _check_sharding(plugin: Any, task: str) -> None:
    """Stop at settings of FSDP with which training would not be what it is in one process."""
    if task == "seq2seq":
        raise SettingError(
            "the task 'seq2seq' is evaluated by generating, which takes another number of forwards in each process: "
            "with FSDP they would wait for each other forever. Use DistributedDataParallel."
        )
    if plugin.fsdp_version != 2:
        raise SettingError(
            f"FSDP is configured with fsdp_version={plugin.fsdp_version}, which flattens the adapter into the base's "
            f"parameters. Use fsdp_version=2."
        )
    if plugin.activation_checkpointing:
        raise SettingError(
            "FSDP is configured with fsdp_activation_checkpointing, which wraps the blocks that carry the adapter. "
            "Call model.gradient_checkpointing_enable() instead."
        )
    # Every process has loaded the whole model, and what attaching computed from it; there is nothing to hand out.
    plugin.cpu_ram_efficient_loading = False


def _check_same(adapter: Adapter) -> None:
    tensors = {name: digest(tensor) for name, tensor, _ in adapter.named_tensors()}
    described = json.dumps([fingerprint(adapter.model, replaced_by(adapter.parts)), tensors], sort_keys=True)
    own = hashlib.sha256(described.encode()).hexdigest()
    found = require("accelerate.utils", "hf").gather_object([own])
    different = [index for index, other in enumerate(found) if other != found[0]]
    if different:
        raise TrainingError(
            f"process {different[0]} holds another model or adapter than process 0: load the same weights in every "
            f"process (with FSDP: fsdp_cpu_ram_efficient_loading=false) and attach with the same seed."
        )


def reshard(model: nn.Module) -> None:
    """Let every process hold its shards alone again: a forward without backward leaves some parameters whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
