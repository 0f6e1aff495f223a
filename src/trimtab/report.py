"""Tables for people: what an adapter is, and what attaching a method would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.adapter import Adapter


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain-text table with aligned columns."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def bytes_text(count: float) -> str:
    """Return a byte count for people (powers of 1024)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


@dataclass(frozen=True)
class Row:
    """One site: where, by which method, its tensors' shapes, and how many numbers it trains."""

    site: str
    method: str
    size: str
    trainable: int


@dataclass(frozen=True)
class Report:
    """The state of one attached adapter."""

    name: str
    rows: tuple[Row, ...]
    total: int
    base: int
    trainable: bool
    active: bool
    merged: bool

    def __str__(self) -> str:
        facts = [str(value).lower() for value in (self.trainable, self.active, self.merged)]
        body = [(r.site, r.method, r.size, f"{r.trainable:,}", *facts) for r in self.rows]
        head = (
            f"adapter {self.name!r}: {self.total:,} trainable numbers, {self.total / max(self.base, 1):.3%} of the base"
        )
        return head + "\n" + table(("site", "method", "size", "trainable", "trained", "active", "merged"), body)


@dataclass(frozen=True)
class Coverage:
    """How much of one group of the base's weights the targets reach."""

    group: str
    numbers: int
    reached: int

    @property
    def share(self) -> float:
        """Share of the group's weights at targeted sites, from 0 to 1."""
        return self.reached / self.numbers if self.numbers else 0.0


@dataclass(frozen=True)
class Plan:
    """What attaching a method would do; nothing was changed.

    `adapter_bytes` holds the tensors, `training_bytes` adds their gradients and two Adam moments; activations come on
    top. `coverage` shows by group what is reached and what is not.
    """

    method: str
    rows: tuple[Row, ...]
    trainable: int
    base: int
    adapter_bytes: int
    training_bytes: int
    coverage: tuple[Coverage, ...]

    def __str__(self) -> str:
        sites = table(
            ("site", "method", "size", "trainable"), [(r.site, r.method, r.size, f"{r.trainable:,}") for r in self.rows]
        )
        reach = table(
            ("weights", "numbers", "reached"), [(c.group, f"{c.numbers:,}", f"{c.share:.1%}") for c in self.coverage]
        )
        head = (
            f"{self.method}: {self.trainable:,} trainable numbers, {self.trainable / max(self.base, 1):.3%} of the "
            f"base; adapter {bytes_text(self.adapter_bytes)}, with gradients and Adam {bytes_text(self.training_bytes)}"
        )
        return f"{head}\n{sites}\n\n{reach}"


def size_text(shapes: Iterable[tuple[int, ...]]) -> str:
    """Return shapes for people."""
    return " ".join("×".join(map(str, shape)) or "1" for shape in shapes)


def report_of(adapter: Adapter) -> Report:
    """Return the report of an attached adapter."""
    rows = []
    for part in adapter.parts:
        method = type(part.method).__name__
        groups = {"(shared)": part.shared_specs} if part.shared_specs else {}
        groups |= {str(site): part.specs[str(site)] for site in part.sites}
        for site, specs in groups.items():
            learned = [spec for spec in specs.values() if spec.trainable]
            count = sum(math.prod(spec.shape) for spec in learned)
            rows.append(Row(site, method, size_text(spec.shape for spec in learned), count))
    own = {id(tensor) for _, tensor, _ in adapter.named_tensors()}
    base = sum(p.numel() for p in adapter.model.parameters() if id(p) not in own)
    return Report(
        adapter.name, tuple(rows), adapter.trainable_count, base, adapter.trainable, adapter.active, adapter.merged
    )
