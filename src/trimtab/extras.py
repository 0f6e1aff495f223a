"""Optional dependencies: what is absent is an error that names the extra which brings it."""

from __future__ import annotations

import importlib
from types import ModuleType

from trimtab.errors import TrimtabError


class MissingExtraError(TrimtabError):
    """An optional dependency is absent; names the extra that brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; raises MissingExtraError naming the extra when it is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this needs the package {module!r}, which is not installed; "
            f"install it with: pip install 'trimtab[{extra}]'"
        ) from error
