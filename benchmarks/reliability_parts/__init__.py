"""Parts of the reliability report: each file has `rows(full)`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the report: what was done, what is asked for, what was measured, and whether it holds."""

    what: str
    asked: str
    measured: str
    holds: bool
