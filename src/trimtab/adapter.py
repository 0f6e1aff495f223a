"""The adapter: the handle on every tensor that one attached method trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from trimtab.attachment import Attached, attached_to
from trimtab.errors import TrainingError
from trimtab.hooks import Leaf, State
from trimtab.merge import Merged, Receipt, merge_leaves, restore
from trimtab.method import Method, Spec
from trimtab.report import Report, report_of

if TYPE_CHECKING:
    from trimtab.events import Binding
    from trimtab.targets import Item


@dataclass(eq=False)
class Part:
    """One method of an adapter with its sites and their leaves, in the same order."""

    method: Method
    index: int
    items: list[Item]
    sites: list[Any]
    state: State
    root: nn.Module
    leaves: list[Leaf] = field(default_factory=list)
    companions: list[Leaf] = field(default_factory=list)
    specs: dict[str, dict[str, Spec]] = field(default_factory=dict)
    shared_specs: dict[str, Spec] = field(default_factory=dict)

    def shared(self, name: str) -> Tensor:
        """Return one tensor that all sites share."""
        return getattr(self.root, self.state.shared[name])  # type: ignore[no-any-return]

    def tensors(self) -> Iterator[tuple[str, Tensor, Spec]]:
        """Yield (name, tensor, spec) of every tensor, shared ones first; names are those of the adapter file."""
        for name, spec in self.shared_specs.items():
            yield f"{self.index}/shared/{name}", self.shared(name), spec
        for site, leaf in zip(self.sites, self.leaves, strict=True):
            for name, spec in self.specs[str(site)].items():
                yield f"{self.index}/{site}/{name}", getattr(leaf, name), spec


@dataclass(eq=False)
class Adapter:
    """A named, attached instance of a method. Not a module: its tensors live in the model it is attached to."""

    name: str
    model: nn.Module
    method: Method
    parts: list[Part]
    seed: int
    base_mode: Literal["follow", "eval"] = "follow"
    binding: Binding | None = None
    steps: int = 0
    merge_record: Merged | None = None
    lineage: tuple[str, ...] = ()
    first_version: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "binding": None, "first_version": None}  # a copy has no optimizer yet

    def leaves(self) -> list[Leaf]:
        """Return every leaf, in order of attaching."""
        return [leaf for part in self.parts for leaf in (*part.leaves, *part.companions)]

    def named_tensors(self) -> Iterator[tuple[str, Tensor, Spec]]:
        """Yield (name, tensor, spec) of every tensor of the adapter; names are those of the adapter file."""
        for part in self.parts:
            yield from part.tensors()

    def file_tensors(self, training: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of what an adapter file holds; `training` adds schedule state and keeps helpers."""
        for part in self.parts:
            if training or part.method.exported() is part.method:
                kinds = ("always", "training") if training else ("always",)
                yield from ((name, tensor) for name, tensor, spec in part.tensors() if spec.stored in kinds)
                continue
            for site, leaf in zip(part.sites, part.leaves, strict=True):
                with torch.no_grad():
                    finished = part.method.export(leaf)
                yield from ((f"{part.index}/{site}/{name}", tensor) for name, tensor in finished.items())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of what the adapter trains."""
        for name, tensor, spec in self.named_tensors():
            if spec.trainable and isinstance(tensor, nn.Parameter):
                yield name, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the adapter trains."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def trainable_count(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def active(self) -> bool:
        """Whether the adapter takes part in the forward; independent of `trainable`."""
        return self.parts[0].state.active

    @active.setter
    def active(self, value: bool) -> None:
        for part in self.parts:
            part.state.active = value

    @property
    def trainable(self) -> bool:
        """Whether the adapter's parameters receive gradients; independent of `active`."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(value)

    @property
    def merged(self) -> bool:
        """Whether the adapter's change is at present written into the base weights."""
        return self.merge_record is not None

    @property
    def created_bias(self) -> bool:
        """Whether merging created a bias that the base does not have."""
        return self.merge_record is not None and self.merge_record.created_bias

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the `with`, the model gives the base's own output (without this adapter)."""
        record, before = self.merge_record, self.active
        if record is not None:
            restore(record)
        self.active = False
        try:
            yield
        finally:
            self.active = before
            if record is not None:
                record.apply()

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return optimizer groups with each tensor's own learning rate and decay, as its method defines them."""
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for _, tensor, spec in self.named_tensors():
            if spec.trainable and isinstance(tensor, nn.Parameter):
                groups.setdefault((spec.lr_scale, spec.decay), []).append(tensor)
        return [
            {"params": members, "lr": lr * scale, "weight_decay": weight_decay if decay else 0.0}
            for (scale, decay), members in groups.items()
        ]

    def bind(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None = None,
        penalty: Literal["step", "loss"] = "step",
    ) -> None:
        """Hang the method's schedule and checks on the optimizer; see `trimtab.events.bind`."""
        from trimtab.events import bind

        bind(self, optimizer, total_steps, penalty)

    def penalty(self) -> Tensor | None:
        """Return the sum of the methods' penalties to be added to the loss, or None where there is none."""
        values = [value for part in self.parts if (value := part.method.penalty(part)) is not None]
        if self.binding is not None:
            self.binding.penalty_taken = True
        return torch.stack([value.float() for value in values]).sum() if values else None

    def check_bound(self) -> None:
        """Stop when a method with a schedule is trained without being bound to its optimizer."""
        needs = [p.method for p in self.parts if p.method.capabilities.requires_binding]
        if not needs or self.binding is not None or not torch.is_grad_enabled() or not self.trainable:
            return
        version = next(self.parameters())._version
        if self.first_version is None:
            self.first_version = version
        elif version != self.first_version:
            raise TrainingError(
                f"adapter {self.name!r} is trained without being bound: the schedule of {type(needs[0]).__name__} "
                f"would never run. Call adapter.bind(optimizer, total_steps=…) before the first step."
            )

    def report(self) -> Report:
        """Return one table: site, method, size, trainable, active, merged."""
        return report_of(self)

    def save(self, path: str | Path, training: bool = False) -> Path:
        """Write the adapter to one file, atomically; `training` adds the schedule state for a bit-exact resume."""
        from trimtab.storage import save_adapter

        return save_adapter(self, path, training)

    def merge(self, untie: bool = False, probe: Any = None) -> Receipt:
        """Write the change into the base weights; returns a receipt. The originals are kept for `unmerge`.

        `untie`: allow a weight that is tied to another to come apart. `probe`: keyword inputs of the model, to
        measure the largest difference between the merged and the attached output. Raises AttachError.
        """
        return merge_leaves(self, untie, probe)

    def unmerge(self) -> None:
        """Restore the base weights bit for bit and go on beside them."""
        if self.merge_record is not None:
            restore(self.merge_record)
            self.merge_record = None
            for part in self.parts:
                part.state.merged = False

    def detach(self, keep_merged: bool = False) -> None:
        """Remove the adapter; the base is restored bit for bit (or stays merged where `keep_merged` says so)."""
        from trimtab.attach import detach

        detach(self, keep_merged)

    @property
    def attached(self) -> Attached:
        """The record of the model; raises where the adapter was detached."""
        record = attached_to(self.model)
        if record is None or record.adapters.get(self.name) is not self:
            raise TrainingError(f"adapter {self.name!r} is not attached any more.")
        return record
