"""The immutable table of rows that every reader returns; it knows where in the file each row stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from trimtab.errors import suggestion
from trimtab.training.errors import DataError


@dataclass(frozen=True)
class Table:
    """Rows of named columns, each with its place in the source (`positions` counts from 1, in `unit`s)."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    positions: tuple[int, ...]
    unit: Literal["line", "row"] = "line"

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(f"{self.source} holds no rows; at least one row of data is needed.")
        if len(self.rows) != len(self.positions):
            raise ValueError(f"{len(self.rows)} rows, but {len(self.positions)} positions")

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Return where row `index` (from 0) stands, as errors say it: 'train.csv, line 12'."""
        return f"{self.source}, {self.unit} {self.positions[index]}"

    def values(self, column: str) -> tuple[object, ...]:
        """Return one column as it was read; raises DataError with the nearest names when it is absent."""
        if column not in self.columns:
            raise DataError(
                f"{self.source} has no column {column!r}.{suggestion(column, self.columns)} "
                f"It has {listed(self.columns)}."
            )
        position = self.columns.index(column)
        return tuple(row[position] for row in self.rows)

    def texts(self, column: str) -> tuple[str, ...]:
        """Return a column of texts, unchanged; raises DataError at the first row that is not a text or is empty."""
        return self._checked(column, _text_fault, lambda value: str(value), "Fill it in, or remove the row.")

    def labels(self, column: str) -> tuple[str, ...]:
        """Return a column of class labels as text without surrounding blanks: 3 is '3', true is 'true'.

        Raises DataError at the first row whose label is missing or is no name or whole number.
        """
        return self._checked(column, _label_fault, _label_text, "Give the row a label, or remove it.")

    def select(self, indices: Sequence[int]) -> Table:
        """Return the rows at `indices` (from 0), in that order; each keeps its place in the source."""
        return replace(
            self,
            rows=tuple(self.rows[index] for index in indices),
            positions=tuple(self.positions[index] for index in indices),
        )

    def _checked(
        self, column: str, fault: Callable[[object], str | None], convert: Callable[[object], str], way_out: str
    ) -> tuple[str, ...]:
        values = self.values(column)
        bad = [index for index, value in enumerate(values) if fault(value) is not None]
        if not bad:
            return tuple(convert(value) for value in values)
        others = f" ({len(bad) - 1} more such rows follow.)" if len(bad) > 1 else ""
        raise DataError(f"{self.place(bad[0])}: column {column!r} {fault(values[bad[0]])}. {way_out}{others}")


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Return 'the column a' or 'the columns a, b, …' for an error: at most `limit` names of 40 characters."""
    short = (name if len(name) <= 40 else name[:39] + "…" for name in names[:limit])
    shown = ", ".join(map(repr, short)) + (", …" if len(names) > limit else "")
    return f"the column{'s' if len(names) != 1 else ''} {shown}"


def _text_fault(value: object) -> str | None:
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"holds {value!r}, which is a {type(value).__name__}, not a text"
    if not value.strip():
        return "is empty"
    # JSON can spell half of a surrogate pair, which no tokenizer accepts.
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "holds half of a surrogate pair, which is not valid Unicode"
    return None


def _label_fault(value: object) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return "holds no label"
    if not isinstance(value, str | int):
        return f"holds {value!r}, which is a {type(value).__name__}, not the name or number of a class"
    return None


def _label_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).strip()
