"""Tables for people: what an adapter is, and what attaching a method would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a plain-text table with aligned columns."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


@dataclass(frozen=True)
class Row:
    """One site: where, by which method, its tensors' shapes, and how many numbers it trains."""

    site: str
    method: str
    size: str
    trainable: int


def row_of(site: str, method: str, shapes: Iterable[tuple[int, ...]]) -> Row:
    """Return the row of a site whose trained tensors have these shapes."""
    shapes = list(shapes)
    size = " ".join("×".join(map(str, shape)) or "1" for shape in shapes)
    return Row(site, method, size, sum(map(math.prod, shapes)))


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
        share = self.total / max(self.base, 1)
        head = f"adapter {self.name!r}: {self.total:,} trainable numbers, {share:.3%} of the base"
        return head + "\n" + table(("site", "method", "size", "trainable", "trained", "active", "merged"), body)
