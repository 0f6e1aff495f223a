"""The dry run: what attaching a method would do, which changes nothing."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from trimtab.adapter import Part
from trimtab.attach import refuse_conflicts, resolved_parts
from trimtab.method import Method
from trimtab.report import Row, table
from trimtab.structure import Structure
from trimtab.targets import ROLES


def bytes_text(count: float) -> str:
    """Return a byte count for people (powers of 1024)."""
    power = min(int(math.log2(max(count, 1))) // 10, 3)
    unit = ("B", "KiB", "MiB", "GiB")[power]
    return f"{count / 1024**power:.1f} {unit}" if power else f"{count:.0f} {unit}"


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
        rows = [(r.site, r.method, r.size, f"{r.trainable:,}") for r in self.rows]
        groups = [(c.group, f"{c.numbers:,}", f"{c.share:.1%}") for c in self.coverage]
        head = (
            f"{self.method}: {self.trainable:,} trainable numbers, {self.trainable / max(self.base, 1):.3%} of the "
            f"base; adapter {bytes_text(self.adapter_bytes)}, with gradients and Adam {bytes_text(self.training_bytes)}"
        )
        sites = table(("site", "method", "size", "trainable"), rows)
        return f"{head}\n{sites}\n\n" + table(("weights", "numbers", "reached"), groups)


def plan(model: nn.Module, method: Method) -> Plan:
    """Dry run: sites, trainable count, memory, and what is not covered; changes nothing, works on the meta device."""
    structure = Structure(model)
    parts = resolved_parts(structure, method)
    refuse_conflicts(itertools.combinations(parts[::-1], 2))
    rows = tuple(row for part in parts for row in part.rows())
    trainable = sum(row.trainable for row in rows)
    specs = [spec for part in parts for _, spec in part.named_specs()]
    stored = 4 * sum(math.prod(spec.shape) for spec in specs)
    coverage = _coverage(structure, parts)
    base = sum(entry.numbers for entry in coverage)
    return Plan(type(method).__name__, rows, trainable, base, stored, stored + 12 * trainable, coverage)


def _coverage(structure: Structure, parts: list[Part]) -> tuple[Coverage, ...]:
    """Share of the weights of each group that lies at a targeted place, or below one."""
    groups: dict[str, str] = {}
    for role in ("attention", "mlp", "experts", "head", "embedding", "norm"):
        for item in ROLES[role](structure):
            groups.setdefault(item.path, role)
    targets = tuple({f"{item.path}." for part in parts for item in part.items})
    numbers: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    for path, _, parameter in structure.parameters():
        group = groups.get(path, "other")
        numbers[group] += parameter.numel()
        reached[group] += parameter.numel() if f"{path}.".startswith(targets) else 0
    return tuple(Coverage(group, total, reached[group]) for group, total in numbers.items())
