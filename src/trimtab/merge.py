"""Merging into the base weights: in float32, rounded once, with the originals kept and a receipt of what changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.attachment import refuse_sharded
from trimtab.errors import AttachError
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


@dataclass(eq=False)
class Merged:
    """The parameters that a merge replaced, with their values before and after."""

    edits: list[Edit]
    originals: list[Tensor | None]
    ties: list[nn.Parameter | None]

    @property
    def created_bias(self) -> bool:
        """Whether a parameter was created that the base does not have."""
        return any(original is None for original in self.originals)

    def apply(self) -> None:
        """Write the merged values, keeping every parameter object and storage."""
        with torch.no_grad():
            for edit, tie in zip(self.edits, self.ties, strict=True):
                parameter = edit.module._parameters.get(edit.parameter)
                if parameter is None or tie is not None:
                    edit.module._parameters[edit.parameter] = nn.Parameter(edit.value.clone(), requires_grad=False)
                else:
                    parameter.copy_(edit.value)


def restore(record: Merged) -> None:
    """Write the originals back, bit for bit."""
    with torch.no_grad():
        for edit, original, tie in zip(record.edits, record.originals, record.ties, strict=True):
            if original is None or tie is not None:
                edit.module._parameters[edit.parameter] = tie
            else:
                edit.module._parameters[edit.parameter].copy_(original)  # type: ignore[union-attr]


def merge_leaves(adapter: Adapter, untie: bool, probe: Any) -> Receipt:
    """Merge every leaf of the adapter; raises AttachError where that is impossible or would change nothing."""
    refuse_sharded(adapter.model, "merge an adapter into", "Save the adapter and merge it into an unwrapped model.")
    if adapter.merged:
        raise AttachError(f"adapter {adapter.name!r} is merged already.")
    others = [name for name, other in adapter.attached.adapters.items() if other.merged]
    if others:
        raise AttachError(f"adapter {others[0]!r} is merged into this model; unmerge it before merging another.")
    for part in adapter.parts:
        capabilities = part.method.capabilities
        if capabilities.merge == "none":
            raise AttachError(f"{type(part.method).__name__} cannot be merged: {capabilities.merge_reason}.")
        part.method.before_merge(part)
    before = _outputs(adapter.model, probe)
    with torch.no_grad():
        edits = _rounded([edit for leaf in adapter.leaves() for edit in leaf.edits()])
    ties = _ties(adapter, edits, untie)
    originals = [None if (p := e.module._parameters.get(e.parameter)) is None else p.detach().clone() for e in edits]
    relative = _relative_change(edits, originals)
    if relative == 0.0:
        raise AttachError(f"merging adapter {adapter.name!r} would change nothing: it is still at its start, or empty.")
    record = Merged(edits, originals, ties)
    record.apply()
    adapter.merge_record = record
    for part in adapter.parts:
        part.state.merged = True
    after = _outputs(adapter.model, probe)
    difference = None if before is None or after is None else _largest_difference(before, after)
    created = tuple(str(e) for e, original in zip(edits, originals, strict=True) if original is None)
    return Receipt(tuple(str(edit) for edit in edits), relative, created, difference)


def _rounded(edits: list[Edit]) -> list[Edit]:
    """Round once to the dtype of the parameter; two edits of one parameter cannot be told apart and are refused."""
    seen: set[tuple[int, str]] = set()
    rounded = []
    for edit in edits:
        place = (id(edit.module), edit.parameter)
        if place in seen:
            raise AttachError(
                f"two parts of the adapter change {str(edit)!r}; merge them as separate adapters in turn."
            )
        seen.add(place)
        stored = edit.module._parameters.get(edit.parameter)
        like = stored if stored is not None else next(p for p in edit.module._parameters.values() if p is not None)
        rounded.append(replace(edit, value=edit.value.detach().to(like.dtype).contiguous()))
    return rounded


def _ties(adapter: Adapter, edits: list[Edit], untie: bool) -> list[nn.Parameter | None]:
    """Return, for each edit, the shared parameter that must come apart; refuses that unless asked for."""
    holders: dict[int, int] = {}
    for module in adapter.model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    ties: list[nn.Parameter | None] = []
    for edit in edits:
        parameter = edit.module._parameters.get(edit.parameter)
        if parameter is not None and is_packed(edit.module, edit.parameter):
            raise AttachError(
                f"{str(edit)!r} is stored quantised: merging would round the change away. "
                f"Keep the adapter attached, or load the base in full precision and merge there."
            )
        tied = parameter is not None and holders[id(parameter)] > 1 and not edit.for_all_holders
        if tied and not untie:
            raise AttachError(
                f"{str(edit)!r} is tied to another weight of the model, which the adapter does not change: merging "
                f"would change both. Use merge(untie=True) to give this one a weight of its own."
            )
        ties.append(parameter if tied else None)
    return ties


def _relative_change(edits: list[Edit], originals: list[Tensor | None]) -> float:
    changed = total = 0.0
    for edit, original in zip(edits, originals, strict=True):
        base = torch.zeros_like(edit.value) if original is None else original
        changed += float((edit.value.double() - base.double()).square().sum())
        total += float(base.double().square().sum())
    return float((changed / total) ** 0.5) if total else float(changed > 0)


def _outputs(model: nn.Module, probe: Any) -> list[Tensor] | None:
    if probe is None:
        return None
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        output = model(**probe)
    for module, mode in modes.items():
        module.training = mode
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True))
