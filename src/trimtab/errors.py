"""Errors: every refusal says what was asked, what was found, and what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


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


class Interrupted(TrimtabError):
    """The user stopped a training run; says what was saved and how to go on."""


class AdapterFileError(TrimtabError):
    """An adapter file cannot be written or read; names the file, the cause and the way out."""


class DataError(TrimtabError):
    """Training data cannot be used as asked; names the file, the line, what was found and the way out."""


class ModelError(TrimtabError):
    """A model to train cannot be found, or does not hold what the task needs."""


class MissingExtraError(TrimtabError):
    """An optional dependency is absent; names the extra that brings it."""


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` candidates most like `word`, best first (possibly none)."""
    pool = list(dict.fromkeys(candidates))
    found = difflib.get_close_matches(word, pool, n=count, cutoff=0.5)
    by_tail = difflib.get_close_matches(word, [name.rsplit(".", 1)[-1] for name in pool], n=count, cutoff=0.5)
    found += [name for name in pool if name.rsplit(".", 1)[-1] in by_tail]
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


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; raises MissingExtraError naming the extra when it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs the package {module!r}, which is not installed; "
            f"install it with: pip install 'trimtab[{extra}]'"
        ) from error
