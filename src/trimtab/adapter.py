"""The adapter: the handle on every tensor that one attached method trains."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from trimtab.adapter_file import file_bytes
from trimtab.attachment import LINEAGE, Attached, attached_to, refuse_sharded
from trimtab.errors import AttachError, SettingError, TrainingError, brief, suggestion
from trimtab.events import Binding, bind
from trimtab.hooks import PREFIX, Leaf
from trimtab.merge import Merged, Receipt, merge_leaves
from trimtab.method import Method, Spec, fits
from trimtab.quantized import for_file, gathered
from trimtab.report import Report, Row, row_of
from trimtab.structure import Structure

if TYPE_CHECKING:
    from trimtab.targets import Item


@dataclass(eq=False)
class Part:
    """One method of an adapter: its sites, the specs of their tensors, and, once attached, their leaves in order."""

    method: Method
    index: int
    items: list[Item]
    sites: list[Any]
    specs: dict[str, dict[str, Spec]]
    shared_specs: dict[str, Spec]
    leaves: list[Leaf] = field(default_factory=list)
    companions: list[Leaf] = field(default_factory=list)
    shared_names: dict[str, str] = field(default_factory=dict)  # of the tensors that all sites share, on the model
    adapter: Adapter = field(init=False)

    @property
    def key(self) -> str:
        """The name of the part's leaves on their targets."""
        return f"{PREFIX}{self.adapter.name}" + (f"_{self.index}" if self.index else "")

    def shared(self, name: str) -> Tensor:
        """Return one tensor that all sites share."""
        return getattr(self.adapter.model, self.shared_names[name])  # type: ignore[no-any-return]

    def places(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield (module, name) of every parameter."""
        yield from ((self.adapter.model, name) for name in self.shared_names.values())
        yield from ((leaf, name) for leaf in self.leaves for name in leaf._parameters)

    def call(self, event: str, *arguments: Any) -> Any:
        """Run an event of the method, where it has one of its own; tensors held in shards are whole meanwhile."""
        if getattr(type(self.method), event) is getattr(Method, event):
            return None
        with gathered(self.places(), write=event != "penalty"):
            return getattr(self.method, event)(self, *arguments)

    def named_specs(self) -> Iterator[tuple[str, Spec]]:
        """Yield (name, spec) of every tensor, shared ones first; names are those of the adapter file."""
        for place, specs in (("shared", self.shared_specs), *self.specs.items()):
            yield from ((f"{self.index}/{place}/{name}", spec) for name, spec in specs.items())

    def tensors(self) -> Iterator[tuple[str, Tensor, Spec]]:
        """Yield (name, tensor, spec) of every tensor, shared ones first; names are those of the adapter file."""
        leaves = zip(self.specs.values(), self.leaves, strict=True)
        own = (*map(self.shared, self.shared_specs), *(getattr(leaf, name) for specs, leaf in leaves for name in specs))
        for (name, spec), tensor in zip(self.named_specs(), own, strict=True):
            yield name, tensor, spec

    def rows(self) -> list[Row]:
        """Return one row for each site, behind one for the shared tensors where there are any."""
        groups = ({"(shared)": self.shared_specs} if self.shared_specs else {}) | self.specs
        trained = {site: [spec.shape for spec in specs.values() if spec.trainable] for site, specs in groups.items()}
        return [row_of(site, type(self.method).__name__, shapes) for site, shapes in trained.items()]


@dataclass(eq=False, repr=False)
class Adapter:
    """A named, attached instance of a method. Not a module: its tensors live in the model it is attached to."""

    name: str
    model: nn.Module
    method: Method
    parts: list[Part]
    seed: int
    base_mode: Literal["follow", "eval"] = "follow"
    active: bool = True  # whether the adapter takes part in the forward; independent of `trainable`
    binding: Binding | None = None
    steps: int = 0
    merge_record: Merged | None = None
    lineage: tuple[str, ...] = ()
    first_mark: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            part.adapter = self

    def __repr__(self) -> str:
        return f"<Adapter {self.name!r}: {self.method!r}, {self.trainable_count:,} numbers>"

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dataclass_fields__ and name != "trainable":
            raise AttachError(f"an adapter has no {name!r}." + suggestion(name, dir(self)))
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "binding": None, "first_mark": None}  # a copy has no optimizer yet

    def leaves(self) -> list[Leaf]:
        """Return every leaf, in order of attaching."""
        return [leaf for part in self.parts for leaf in (*part.leaves, *part.companions)]

    def named_tensors(self) -> Iterator[tuple[str, Tensor, Spec]]:
        """Yield (name, tensor, spec) of every tensor of the adapter; names are those of the adapter file."""
        for part in self.parts:
            yield from part.tensors()

    def file_tensors(self, training: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as an adapter file holds them; `training` adds schedule state and keeps helpers."""
        for part in self.parts:
            if training or part.method.exported() is part.method:
                kinds = ("always", "training") if training else ("always",)
                yield from ((name, for_file(tensor)) for name, tensor, spec in part.tensors() if spec.stored in kinds)
                continue
            for site, leaf in zip(part.sites, part.leaves, strict=True):
                with torch.no_grad(), gathered(part.places(), write=False):
                    finished = part.method.export(leaf)
                yield from ((f"{part.index}/{site}/{name}", for_file(tensor)) for name, tensor in finished.items())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of what the adapter trains."""
        for name, tensor, spec in self.named_tensors():
            if spec.trainable and isinstance(tensor, nn.Parameter):
                yield name, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that the adapter trains."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def trainable_count(self) -> int:
        """Number of trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

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

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the `with`, the model gives the base's own output (without this adapter)."""
        _ = self.attached  # raises once detached
        record, before = self.merge_record, self.active
        if record is not None:
            record.restore()
        self.active = False
        try:
            yield
        finally:
            self.active = before
            if record is not None:
                record.apply()

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return optimizer groups with each tensor's own learning rate and decay, as its method defines them."""
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not fits(value, float) or not 0 <= value <= torch.finfo(torch.float32).max:
                raise SettingError(f"{name} must be a number from 0, found {brief(value)}.")
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
        self.attached.refuse_merged("training")
        bind(self, optimizer, total_steps, penalty)

    def penalty(self) -> Tensor | None:
        """Return the sum of the methods' penalties to be added to the loss, or None where there is none."""
        values = [value for part in self.parts if (value := part.call("penalty")) is not None]
        if self.binding is not None:
            self.binding.penalty_taken = True
        return torch.stack([value.float() for value in values]).sum() if values else None

    def check_bound(self) -> None:
        """Stop when a method with a schedule is trained without being bound to its optimizer."""
        needs = [p.method for p in self.parts if p.method.promises().requires_binding]
        if not needs or self.binding is not None or not torch.is_grad_enabled() or not self.trainable:
            return
        # The version shows a step at once, except of libraries that change parameters behind torch's back (DeepSpeed).
        mark = (next(self.parameters())._version, sum(float(p.detach().sum()) for p in self.parameters()))
        if self.first_mark is None:
            self.first_mark = mark
        elif mark != self.first_mark:
            raise TrainingError(
                f"adapter {self.name!r} is trained without being bound: the schedule of {type(needs[0]).__name__} "
                f"would never run. Call adapter.bind(optimizer, total_steps=…) before the first step."
            )

    def report(self) -> Report:
        """Return one table: site, method, size, trainable, active, merged."""
        rows = tuple(row for part in self.parts for row in part.rows())
        base = sum(parameter.numel() for _, _, parameter in Structure(self.model).parameters())
        return Report(self.name, rows, self.trainable_count, base, self.trainable, self.active, self.merged)

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
            self.merge_record.restore()
            self.merge_record = None

    def detach(self, keep_merged: bool = False) -> None:
        """Remove the adapter; without `keep_merged` the base is restored bit for bit. Raises AttachError."""
        attached = self.attached
        refuse_sharded(self.model, "detach an adapter from", "Save the adapter and load it on an unwrapped model.")
        if keep_merged and not self.merged:
            raise AttachError(f"adapter {self.name!r} is not merged; call merge() before detach(keep_merged=True).")
        if keep_merged:
            numbers = file_bytes(dict(self.file_tensors(training=False)))
            entry = f"{self.name} ({type(self.method).__name__}, sha256 {hashlib.sha256(numbers).hexdigest()})"
            self.model.__dict__[LINEAGE] = (*self.lineage, entry)
        else:
            self.unmerge()
        if self.binding is not None:
            self.binding.release()
        attached.remove(self)

    @property
    def attached(self) -> Attached:
        """The record of the model; raises where the adapter was detached."""
        record = attached_to(self.model)
        if record is None or record.adapters.get(self.name) is not self:
            raise TrainingError(f"adapter {self.name!r} is not attached any more.")
        return record
