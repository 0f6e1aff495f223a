"""Split one table into training, validation and test rows: a function of the seed, with every class in its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import SettingError
from trimtab.training.batches import shuffled
from trimtab.training.errors import DataError
from trimtab.training.table import Table


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one table, each in the table's own order; None where its share was 0."""

    train: Table
    validation: Table | None
    test: Table | None


def split_table(
    table: Table, *, validation: float = 0.1, test: float = 0.0, seed: int = 0, label: str | None = None
) -> Split:
    """Split `table` at random; `validation` and `test` are shares of the rows (each ≥ 0, together < 1).

    With `label`, the column of the classes, each class is divided in the same shares (to within one row), and at
    least one row of every class stays in training.
    Raises SettingError for shares out of range, DataError when a part would be left without a row.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise SettingError(f"{name}={share}; it is a share of the rows: at least 0 and less than 1.")
    if validation + test >= 1:
        raise SettingError(f"validation={validation} and test={test} leave no rows to train on; together stay below 1.")
    groups = _groups(table, seed, label)
    sizes = [len(group) for group in groups]
    held_out = _quotas(sizes, test, [max(size - 1, 0) for size in sizes])
    validating = _quotas(sizes, validation, [size - 1 - taken for size, taken in zip(sizes, held_out, strict=True)])
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for group, for_test, for_validation in zip(groups, held_out, validating, strict=True):
        parts[2].extend(group[:for_test])
        parts[1].extend(group[for_test : for_test + for_validation])
        parts[0].extend(group[for_test + for_validation :])
    return Split(
        table.select(sorted(parts[0])),
        _part(table, parts[1], "validation", validation),
        _part(table, parts[2], "test", test),
    )


def refuse_training_rows(name: str, part: Table, train: Table) -> None:
    """Raise DataError where the data given as `name` are the training data, be it the same file or a copy of it."""
    if (part.columns, part.rows) == (train.columns, train.rows):
        other = "" if part.source == train.source else f", a copy of {train.source}"
        raise DataError(
            f"{name}={part.source}: holds the rows that are trained on{other}, so its figures would say nothing about "
            f"new rows. Give other data, or a share of the rows that is kept back, for example {name}=0.1."
        )


def _groups(table: Table, seed: int, label: str | None) -> list[list[int]]:
    """Return the rows of each class in random order; one group when no label column is given."""
    members: dict[str, list[int]] = {}
    for index, name in enumerate(table.labels(label) if label is not None else [""] * len(table)):
        members.setdefault(name, []).append(index)
    return [shuffled(members[name], f"split, seed {seed}, class {name}") for name in sorted(members)]


def _quotas(sizes: Sequence[int], share: float, limits: Sequence[int]) -> list[int]:
    """Return how many rows each group gives: `share` of its size, rounded so that the total is right.

    Largest remainders are rounded up first; no group gives more than its limit.
    """
    exact = [size * share for size in sizes]
    quotas = [min(int(value), limit) for value, limit in zip(exact, limits, strict=True)]
    missing = round(sum(sizes) * share) - sum(quotas)
    by_remainder = sorted(range(len(sizes)), key=lambda group: (int(exact[group]) - exact[group], group))
    for group in by_remainder:
        if missing > 0 and quotas[group] < limits[group]:
            quotas[group] += 1
            missing -= 1
    return quotas


def _part(table: Table, rows: list[int], name: str, share: float) -> Table | None:
    if share == 0:
        return None
    if not rows:
        raise DataError(
            f"{table.source}: {name}={share} of its {len(table)} rows is not one row that training can spare. "
            f"Give more data, a larger share, or {name}=0."
        )
    return table.select(sorted(rows))
