"""Errors: every refusal says what was asked, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base class of every error that Trimtab raises on purpose."""


class TargetError(TrimtabError):
    """A target clause matches nothing, or matches something the method cannot act on."""


class SettingError(TrimtabError):
    """A setting is unknown, of the wrong type, or out of range for this model."""


class AttachError(TrimtabError):
    """An adapter cannot be attached, detached, merged or used in the model's present state."""


class TrainingError(TrimtabError):
    """Training would go on without doing what was asked."""


class AdapterFileError(TrimtabError):
    """An adapter file cannot be written or read; names the file, the cause and the way out."""


def nearest(word: str, candidates: Iterable[str], count: int = 4) -> list[str]:
    """Return up to `count` candidates most like `word`, best first (possibly none)."""
    pool = list(dict.fromkeys(candidates))
    tails = {name.rsplit(".", 1)[-1]: name for name in reversed(pool)}  # the first place of each last name
    found = [name for name in (*pool, *tails) if sorted(name) == sorted(word)]  # two swapped letters
    found += difflib.get_close_matches(word, pool, n=count, cutoff=0.5)
    found += difflib.get_close_matches(word, tails, n=count, cutoff=0.5)
    found = [name if name in pool else tails[name] for name in found]
    return list(dict.fromkeys(found))[:count]


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """Return ' Did you mean …?' for the nearest candidates, else the first few names (nothing without any)."""
    pool = list(dict.fromkeys(candidates))
    close = nearest(word, pool)
    if close:
        return " Did you mean " + " or ".join(repr(name) for name in close) + "?"
    if not pool:
        return ""
    return " Known: " + ", ".join(pool[:12]) + (", …" if len(pool) > 12 else "") + "."


def brief(value: object) -> str:
    """Return a value as errors show it, in at most 80 characters."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # whole numbers of more than 4,300 digits
        return f"<{type(value).__name__} too long to print>"
