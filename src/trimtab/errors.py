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
    """Return up to `count` candidates most like `word`, in whatever case, best first (possibly none)."""
    asked, pool = word.lower(), list(dict.fromkeys(candidates))
    whole = [name.lower() for name in pool]
    tails = {name.lower().rsplit(".", 1)[-1]: name for name in reversed(pool)}  # the first place of each last name
    found = [form for form in (*whole, *tails) if sorted(form) == sorted(asked)]  # two swapped letters
    found += [form for forms in (whole, tails) for form in difflib.get_close_matches(asked, forms, n=count, cutoff=0.5)]
    named = [name for form in found for name in pool if name.lower() == form or name == tails.get(form)]
    return list(dict.fromkeys(named))[:count]


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """Return ' Did you mean …?' for the nearest candidates, else the first few names (nothing without any)."""
    pool = list(dict.fromkeys(candidates))
    if close := nearest(word, pool):
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
