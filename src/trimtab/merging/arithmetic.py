"""Weighted sums of the changes that adapters make, as one LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attach import adapters, attach
from trimtab.errors import AttachError, SettingError, brief
from trimtab.kinds.selection import SelectionMethod
from trimtab.merging.factors import (
    Factored,
    change_of,
    errors_of,
    errors_text,
    matrix_count,
    nearest,
    scaled_factors,
    why_no_change,
)
from trimtab.method import Method, fits
from trimtab.methods.composition.compose import Compose
from trimtab.methods.selection.full_tuning import FullTuning
from trimtab.methods.weight.lora import LoRA
from trimtab.storage import load


@dataclass(frozen=True)
class CombineReceipt:
    """What combining came to; errors are ‖B·A − ΔW‖ / ‖ΔW‖ (Frobenius), over all weights and at worst."""

    places: int
    rank: int
    averaged_whole: tuple[str, ...]
    relative_error: float
    worst_place: str
    worst_error: float

    def __str__(self) -> str:
        whole = f", {len(self.averaged_whole)} tensors averaged whole" if self.averaged_whole else ""
        errors = errors_text(self.relative_error, self.worst_place, self.worst_error)
        return f"combined at {self.places} places in rank {self.rank}{whole}; {errors}"


@dataclass
class _Sum:
    """The change of one weight so far: products of factors (down, up), and what is no such product."""

    matrices: int
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rest: Tensor | None = None

    def total(self) -> Tensor:
        """Return ΔW (*lead, out, in)."""
        parts = [up @ down for down, up in self.pairs] + ([] if self.rest is None else [self.rest])
        return torch.stack(parts).sum(0)


def combine(
    model: nn.Module,
    files: Sequence[tuple[str | Path, float]],
    rank: int,
    name: str = "combined",
    accept_other_base: bool = False,
) -> tuple[Adapter, CombineReceipt]:
    """Attach one LoRA whose change is the sum of factor · change over adapter files; returns it with its error.

    The files may hold other methods each, as long as each changes weights alone. The sum is exact where the ranks of
    their factors add up to at most `rank`; else every ΔW is the nearest of that rank, by its singular values. Tensors
    that are trained whole (a head) are averaged: the factors have to sum to one then. The model must carry no adapter.
    `accept_other_base`: as in `load`.
    Raises AttachError, SettingError, AdapterFileError; the model is unchanged then.
    """
    _check(model, files)
    sums, whole = _sums(model, files, name, accept_other_base)
    method: Method = LoRA(rank=rank, targets=tuple(f"={place}" for place in sums))
    if whole:
        method = Compose(method, FullTuning(targets=tuple(f"={place}" for place in whole)))
    adapter = attach(model, method, name)
    try:
        return adapter, _fill(adapter, sums, whole, rank)
    except BaseException:
        adapter.detach()
        raise


def _check(model: nn.Module, files: Sequence[tuple[str | Path, float]]) -> None:
    if adapters(model):
        raise AttachError(f"combine: adapter {next(iter(adapters(model)))!r} is attached; detach it first.")
    if not files:
        raise SettingError("combine: there is no adapter file to combine.")
    for file, factor in files:
        if not fits(factor, float) or not math.isfinite(factor):
            raise SettingError(f"combine: the factor of {str(file)!r} must be a finite number, found {brief(factor)}.")


def _sums(
    model: nn.Module, files: Sequence[tuple[str | Path, float]], name: str, accept_other_base: bool
) -> tuple[dict[str, _Sum], dict[str, Tensor]]:
    """Return by place the sums of changes, and of tensors that are trained whole."""
    sums: dict[str, _Sum] = {}
    whole: dict[str, Tensor] = {}
    for file, factor in files:
        adapter = load(model, file, name, accept_other_base=accept_other_base)
        try:
            with torch.no_grad():
                _add(adapter, factor, sums, whole)
        finally:
            adapter.detach()
    if not sums:
        raise AttachError("combine: these adapters change no weight by a difference; there is no LoRA to make.")
    total = math.fsum(factor for _, factor in files)
    if whole and not math.isclose(total, 1.0, rel_tol=1e-6):
        raise SettingError(
            f"combine: {next(iter(whole))!r} is trained whole, and such tensors are averaged: the factors must sum to "
            f"1, found {total:g}."
        )
    return sums, whole


def _add(adapter: Adapter, factor: float, sums: dict[str, _Sum], whole: dict[str, Tensor]) -> None:
    """Add factor · change of every leaf."""
    for leaf in (leaf for part in adapter.parts for leaf in part.leaves):
        place, method = str(leaf.site), leaf.method
        reason = why_no_change(leaf)
        if reason is not None:
            raise AttachError(f"combine: {type(method).__name__} cannot be written as a LoRA: {reason}.")
        weight_leaf: Any = leaf
        if isinstance(method, SelectionMethod):
            value = factor * method.weight(weight_leaf, weight_leaf.weight())
            whole[place] = whole[place] + value if place in whole else value
            continue
        found = sums.setdefault(place, _Sum(matrix_count(weight_leaf)))
        pair = scaled_factors(weight_leaf)
        if pair is not None:
            found.pairs.append((pair[0].clone(), factor * pair[1]))
        else:
            change = factor * change_of(weight_leaf)
            found.rest = change if found.rest is None else found.rest + change


def _fill(adapter: Adapter, sums: dict[str, _Sum], whole: dict[str, Tensor], rank: int) -> CombineReceipt:
    found: dict[str, Factored] = {}
    with torch.no_grad():
        for leaf in (leaf for part in adapter.parts for leaf in part.leaves):
            place = str(leaf.site)
            if place in whole:
                leaf.value.copy_(whole[place])
                continue
            added = sums[place]
            pairs = None if added.rest is not None else added.pairs
            found[place] = nearest(leaf.site.path, added.total(), pairs, rank // added.matrices)
            leaf.A.copy_(found[place].down)
            leaf.B.copy_(found[place].up)
    return CombineReceipt(len(found), rank, tuple(whole), *errors_of(found))
