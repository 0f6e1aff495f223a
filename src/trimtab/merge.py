"""Merging into the base weights: in float32, rounded once, with the originals kept and a receipt of what changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.attachment import refuse_sharded
from trimtab.errors import AttachError, brief
from trimtab.hooks import keeping_modes
from trimtab.quantized import is_packed

if TYPE_CHECKING:
    from trimtab.adapter import Adapter


@dataclass(frozen=True)
class Edit:
    """One parameter of the base and its value after merging; `module` holds it at `path`.

    `for_all_holders`: the change is meant for every module that shares the parameter.
    """

    module: nn.Module
    path: str
    parameter: str
    value: Tensor
    for_all_holders: bool = False

    def __str__(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


@dataclass(frozen=True)
class Receipt:
    """What a merge changed: parameters, relative size of the change, and the output difference on the probe."""

    parameters: tuple[str, ...]
    relative_change: float
    created: tuple[str, ...]
    largest_difference: float | None

    def __str__(self) -> str:
        created = f", biases created: {len(self.created)}" if self.created else ""
        probe = "" if self.largest_difference is None else f", largest output difference {self.largest_difference:.3g}"
        return f"merged {len(self.parameters)} parameters, relative change {self.relative_change:.3g}{created}{probe}"


@dataclass(frozen=True, eq=False)
class Change:
    """An edit and the base's own parameter there (None: it has none); with `original`, its values are overwritten.

    Without `original` the place gets a parameter of its own.
    """

    edit: Edit
    parameter: nn.Parameter | None
    original: Tensor | None


@dataclass(frozen=True, eq=False)
class Merged:
    """The changes of one merge."""

    changes: list[Change]

    @property
    def created(self) -> tuple[str, ...]:
        """The parameters that the base does not have."""
        return tuple(str(change.edit) for change in self.changes if change.parameter is None)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the merged values, keeping every parameter object and storage that is the base's own."""
        for change in self.changes:
            edit, holder = change.edit, change.edit.module._parameters
            if change.original is None:
                holder[edit.parameter] = nn.Parameter(edit.value.clone(), requires_grad=False)
            else:
                holder[edit.parameter].copy_(edit.value)  # type: ignore[union-attr]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the originals back, bit for bit."""
        for change in self.changes:
            edit, holder = change.edit, change.edit.module._parameters
            if change.original is None:
                holder[edit.parameter] = change.parameter
            else:
                holder[edit.parameter].copy_(change.original)  # type: ignore[union-attr]


def merge_leaves(adapter: Adapter, untie: bool, probe: Any) -> Receipt:
    """Merge every leaf of the adapter; raises AttachError where that is impossible or would change nothing."""
    refuse_sharded(adapter.model, "merge an adapter into", "Save the adapter and merge it into an unwrapped model.")
    if adapter.merged:
        raise AttachError(f"adapter {adapter.name!r} is merged already.")
    if not adapter.active:
        raise AttachError(f"adapter {adapter.name!r} is inactive or disabled; set its `active` to True to merge it.")
    adapter.attached.refuse_merged("merging another")
    for part in adapter.parts:
        capabilities = part.method.promises()
        if capabilities.merge == "none":
            raise AttachError(f"{type(part.method).__name__} cannot be merged: {capabilities.merge_reason}.")
        part.method.before_merge(part)
    before = _outputs(adapter.model, probe)
    with torch.no_grad():
        edits = [edit for leaf in adapter.leaves() for edit in leaf.edits()]
    record = Merged(_changes(adapter.model, edits, untie))
    relative = _relative_size(record.changes)
    if relative == 0.0:
        raise AttachError(f"merging adapter {adapter.name!r} would change nothing: it is still at its start, or empty.")
    record.apply()
    adapter.merge_record = record
    outputs = zip(before, _outputs(adapter.model, probe), strict=True)
    difference = max((float((a.double() - b.double()).abs().max()) for a, b in outputs), default=None)
    return Receipt(tuple(str(edit) for edit in edits), relative, record.created, difference)


def _changes(model: nn.Module, edits: list[Edit], untie: bool) -> list[Change]:
    """Round each edit once to the base's dtype; refuses what would be rounded away, or would reach another weight."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    changes: dict[tuple[int, str], Change] = {}
    for edit in edits:
        place, members = (id(edit.module), edit.parameter), edit.module._parameters
        if place in changes:
            raise AttachError(f"two parts of the adapter change {str(edit)!r}; merge them as adapters of their own.")
        if is_packed(edit.module, edit.parameter):
            raise AttachError(
                f"{str(edit)!r} is stored quantised: merging would round the change away. "
                f"Keep the adapter attached, or load the base in full precision and merge there."
            )
        parameter = members.get(edit.parameter)
        tied = parameter is not None and holders[id(parameter)] > 1 and not edit.for_all_holders
        if tied and not untie:
            raise AttachError(
                f"{str(edit)!r} is tied to another weight of the model, which the adapter does not change: merging "
                f"would change both. Use merge(untie=True) to give this one a weight of its own."
            )
        like = next(p for p in (parameter, *members.values()) if p is not None)
        rounded = replace(edit, value=edit.value.detach().to(like.dtype).contiguous())
        original = None if parameter is None or tied else parameter.detach().clone()
        changes[place] = Change(rounded, parameter, original)
    return list(changes.values())


def _relative_size(changes: list[Change]) -> float:
    """Return ‖W′ − W‖ / ‖W‖ over all changed parameters, before they are written."""
    changed = total = 0.0
    for change in changes:
        value = change.edit.value.double()
        base = torch.zeros_like(value) if change.parameter is None else change.parameter.detach().double()
        changed += float((value - base).square().sum())
        total += float(base.square().sum())
    return float((changed / total) ** 0.5) if total else float(changed > 0)


def _outputs(model: nn.Module, probe: Any) -> list[Tensor]:
    """Return the floating-point outputs for a probe; none without one."""
    if probe is None:
        return []
    if not isinstance(probe, Mapping):
        raise AttachError(f"merge: probe is a dictionary of the model's keyword inputs, found {brief(probe)}.")
    with keeping_modes(model), torch.no_grad():
        output = model.eval()(**probe)
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
