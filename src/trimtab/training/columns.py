"""Which column plays which part: the one that was named, else the only one with a conventional name, else an error."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.training.errors import DataError
from trimtab.training.table import Table, listed

TEXT = (
    "text", "sentence", "message", "question", "query", "utterance", "review", "content", "comment", "tweet",
    "document", "body", "input",
)  # fmt: skip
LABEL = ("label", "labels", "intent", "category", "class", "target", "sentiment", "topic", "tag")
PROMPT = ("prompt", "instruction", "question", "query", "input")
COMPLETION = ("completion", "response", "answer", "output")
SOURCE = ("source", "input", "article", "document", "text", "question", "prompt")
TARGET = ("target", "output", "summary", "answer", "highlights", "translation", "label", "completion")


def find_column(table: Table, role: str, given: str | None, conventional: Sequence[str]) -> str:
    """Return the column for `role`: `given` if not None, else the one whose name is conventional (case ignored).

    Raises DataError when `given` is absent (with the nearest names), or when no or several columns have such a name.
    """
    if given is not None:
        table.values(given)
        return given
    found = matching_columns(table, conventional)
    if len(found) == 1:
        return found[0]
    if found:
        trouble = f"{' and '.join(map(repr, found))} could each be the {role}"
    else:
        trouble = f"which of them is the {role} cannot be told from the names"
    raise DataError(f"{table.source} has {listed(table.columns)}; {trouble}. Name it: {role}=…{_header_hint(table)}")


def matching_columns(table: Table, conventional: Sequence[str]) -> list[str]:
    """Return the columns whose name, case and surrounding blanks ignored, is one of `conventional`."""
    return [column for column in table.columns if column.strip().lower() in conventional]


def _header_hint(table: Table) -> str:
    if not table.source.lower().endswith((".csv", ".tsv")):
        return ""
    if len(table.columns) > 1:
        return ". If these are data, not names, give the names with header=…"
    marks = [mark for mark in (";", "\t", "|", ",") if mark in table.columns[0]]
    return f". The fields seem to be separated by {marks[0]!r}: give delimiter={marks[0]!r}" if marks else ""
