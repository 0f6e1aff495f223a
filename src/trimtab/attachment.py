"""What one model carries: its attached adapters, what it was before them, and the routing of the present batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimtab.errors import AttachError
from trimtab.hooks import PREFIX, Call, Leaf, hook, is_adapters, is_hooked, unhook
from trimtab.quantized import keep_from_repacking
from trimtab.structure import Structure

if TYPE_CHECKING:
    from trimtab.adapter import Adapter

# Runs one hooked module, given its own call, its leaves, and the call's arguments.
Router = Callable[[nn.Module, Call, list[Leaf], tuple[Any, ...], dict[str, Any]], Any]
LINEAGE = "_trimtab_lineage"  # on a model for good: the adapters that were merged into it to stay


@dataclass(eq=False)
class Attached:
    """The record kept on the root of a model with adapters; removed with the last of them."""

    root: nn.Module
    adapters: dict[str, Adapter] = field(default_factory=dict)
    required_grad: list[nn.Parameter] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)
    hooked: list[nn.Module] = field(default_factory=list)
    router: Router | None = None

    def before_forward(self) -> None:
        """A forward of the whole model begins: stop where a schedule was never bound."""
        if not torch.compiler.is_compiling():
            for adapter in self.adapters.values():
                adapter.check_bound()

    def refuse_merged(self, action: str) -> None:
        """Stop where an adapter is merged: its change would be taken for the base's own numbers."""
        merged = [name for name, adapter in self.adapters.items() if adapter.merged]
        if merged:
            raise AttachError(f"adapter {merged[0]!r} is merged into this model; unmerge it before {action}.")

    def keep_modes(self) -> None:
        """Hold the base in evaluation mode where an adapter asked for that."""
        if any(adapter.base_mode == "eval" for adapter in self.adapters.values()):
            for module in Structure(self.root).modules.values():
                module.training = False

    def hook(self, module: nn.Module, path: str, parameters: tuple[str, ...] = ()) -> None:
        """Hook a module and remember it."""
        if not is_hooked(module):
            self.hooked.append(module)
        hook(module, path, self, parameters)

    def connect(self, leaf: Leaf, key: str, path: str) -> None:
        """Register a leaf on its target, which lies at `path`, and hook every module that it acts through."""
        target = leaf.target
        if key in target._modules or key in target.__dict__:
            raise AttachError(f"module {path!r} already holds {key!r}; choose another adapter name.")
        for module, place, parameters in ((target, path, ()), *leaf.read_through()):
            self.hook(module, place, parameters)
        self.undo += switch_off_fast_paths(self.root, path)
        target._modules[key] = leaf

    def remove(self, adapter: Adapter) -> None:
        """Take an adapter out of the model, also one that was attached in part only; with the last, all is undone."""
        for leaf in adapter.leaves():
            for key in [key for key, child in leaf.target._modules.items() if child is leaf]:
                del leaf.target._modules[key]
        for name in (name for part in adapter.parts for name in part.shared_names.values()):
            self.root._parameters.pop(name, None)
            self.root._buffers.pop(name, None)
        self.adapters.pop(adapter.name, None)
        self._unhook_unused()
        if not self.adapters:
            for undo in self.undo:
                undo()
            for parameter in self.required_grad:
                parameter.requires_grad_(True)

    def _unhook_unused(self) -> None:
        leaves = [leaf for adapter in self.adapters.values() for leaf in adapter.leaves()]
        used = {id(leaf.target) for leaf in leaves} | {id(m) for leaf in leaves for m, _, _ in leaf.read_through()}
        if self.adapters:
            used.add(id(self.root))
        for module in self.hooked:
            if id(module) not in used:
                unhook(module)
        self.hooked = [module for module in self.hooked if is_hooked(module)]


def attached_to(model: nn.Module) -> Attached | None:
    """Return the record of a model that is itself the root of an attachment, or None."""
    record = model.__dict__.get("_trimtab_attached")
    return record if record is not None and record.root is model else None


def begin(model: nn.Module) -> Attached:
    """Return the model's record; the first call freezes the base and hooks the root."""
    existing = attached_to(model)
    if existing is not None:
        return existing
    _refuse_unfit(model)
    attached = Attached(model, undo=keep_from_repacking(model))
    attached.hook(model, "")
    attached.required_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    return attached


def _refuse_unfit(model: nn.Module) -> None:
    inside = [name for name, module in model.named_modules() if is_hooked(module)]
    if inside:
        raise AttachError(
            f"{inside[0] or 'the model'!r} belongs to an attachment of another root; attach to the same model object "
            f"as before, or detach the other adapter first."
        )
    if any(is_adapters(name) for name, _ in model.named_modules()):
        raise AttachError(f"the model has modules whose names start with {PREFIX!r}, which adapters use.")
    refuse_sharded(model, "attach an adapter to", "Attach before DistributedDataParallel or fully_shard.")


def refuse_sharded(model: nn.Module, action: str, remedy: str) -> None:
    """Refuse a model that is wrapped or sharded for distributed training: the result would be silently different."""
    for name, module in model.named_modules():
        wrapper = isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
        sharded = any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)
        if wrapper or sharded:
            where = repr(name) if name else "the root"
            raise AttachError(f"cannot {action} a model that is already distributed ({where}). {remedy}")


def switch_off_fast_paths(root: nn.Module, path: str) -> list[Callable[[], object]]:
    """Keep torch's own encoder modules above `path` from reading weights unseen in inference; returns what undoes it.

    A no-op hook switches off the native path of nn.TransformerEncoderLayer; nn.TransformerEncoder decides by its first
    layer's frozen tensors alone, and must not convert its input.
    """
    undo: list[Callable[[], object]] = []
    steps = path.split(".") if path else []
    for depth in range(len(steps) + 1):
        module = root.get_submodule(".".join(steps[:depth]))
        if isinstance(module, nn.TransformerEncoderLayer) and _no_change not in module._forward_pre_hooks.values():
            undo.append(module.register_forward_pre_hook(_no_change).remove)
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False
            undo.append(functools.partial(setattr, module, "use_nested_tensor", True))
    return undo


def _no_change(module: nn.Module, args: Any) -> None:
    return None
