"""What one model carries: its attached adapters, what it was before them, and the routing of the present batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from trimtab.errors import AttachError
from trimtab.hooks import PREFIX, Call, Leaf, hook, is_hooked, unhook
from trimtab.structure import Structure

if TYPE_CHECKING:
    from trimtab.adapter import Adapter


class Router(Protocol):
    """Decides, inside one forward, which rows of the batch go through which adapter (`trimtab.routing`)."""

    @property
    def engaged(self) -> bool:
        """Whether hooked modules must be run by `run`."""

    def before_forward(self) -> None:
        """A forward of the whole model begins."""

    def run(
        self, module: nn.Module, call: Call, leaves: list[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one hooked module."""


@dataclass(eq=False)
class Attached:
    """The record kept on the root of a model with adapters; removed with the last of them."""

    root: nn.Module
    adapters: dict[str, Adapter] = field(default_factory=dict)
    required_grad: list[nn.Parameter] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    hooked: list[nn.Module] = field(default_factory=list)
    router: Router | None = None

    def before_forward(self) -> None:
        """A forward of the whole model begins: note it for routing; stop where a schedule was never bound."""
        if torch.compiler.is_compiling():
            return
        if self.router is not None:
            self.router.before_forward()
        for adapter in self.adapters.values():
            adapter.check_bound()

    def keep_modes(self) -> None:
        """Hold the base in evaluation mode where an adapter asked for that."""
        if any(adapter.base_mode == "eval" for adapter in self.adapters.values()):
            for module in Structure(self.root).modules.values():
                module.training = False

    def hook(self, module: nn.Module, path: str, parameters: tuple[str, ...] = ()) -> None:
        """Hook a module and remember it."""
        if not is_hooked(module):
            hook(module, path, self, parameters)
            self.hooked.append(module)
        elif parameters:
            hook(module, path, self, parameters)

    def cover(self, path: str) -> None:
        """Switch off torch's own inference fast paths above a target."""
        self.handles += switch_off_fast_path(self.root, path)

    def release(self) -> None:
        """Give every module its own class back, and the base its own requires_grad."""
        for handle in self.handles:
            handle.remove()
        for module in self.hooked:
            unhook(module)
        for parameter in self.required_grad:
            parameter.requires_grad_(True)

    def drop_unused(self) -> None:
        """Give modules that no adapter uses any more their own class back."""
        leaves = [leaf for adapter in self.adapters.values() for leaf in adapter.leaves()]
        used = {id(leaf.target) for leaf in leaves} | {id(m) for leaf in leaves for m, _, _ in leaf.read_through()}
        for module in self.hooked:
            if id(module) not in used and module is not self.root:
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
    attached = Attached(model)
    attached.hook(model, "")
    for parameter in model.parameters():
        if parameter.requires_grad:
            attached.required_grad.append(parameter)
            parameter.requires_grad_(False)
    return attached


def _refuse_unfit(model: nn.Module) -> None:
    inside = [name for name, module in model.named_modules() if is_hooked(module)]
    if inside:
        raise AttachError(
            f"{inside[0] or 'the model'!r} belongs to an attachment of another root; attach to the same model object "
            f"as before, or detach the other adapter first."
        )
    if any(name.rsplit(".", 1)[-1].startswith(PREFIX) for name, _ in model.named_modules() if name):
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


class _WithoutNestedTensors:
    """Keeps one nn.TransformerEncoder from converting its input; `remove` gives it its own choice back."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder, self.own = encoder, encoder.use_nested_tensor
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        self.encoder.use_nested_tensor = self.own


def switch_off_fast_path(root: nn.Module, path: str) -> list[Any]:
    """Keep torch's own encoder modules above `path` from reading weights unseen in inference; returns handles.

    A no-op hook switches off the native path of nn.TransformerEncoderLayer; nn.TransformerEncoder decides by its first
    layer's frozen tensors alone, and must not convert its input.
    """
    handles: list[Any] = []
    steps = path.split(".") if path else []
    for depth in range(len(steps) + 1):
        module = root.get_submodule(".".join(steps[:depth]))
        if isinstance(module, nn.TransformerEncoderLayer) and _no_change not in module._forward_pre_hooks.values():
            handles.append(module.register_forward_pre_hook(_no_change))
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            handles.append(_WithoutNestedTensors(module))
    return handles


def _no_change(module: nn.Module, args: Any) -> None:
    return None
