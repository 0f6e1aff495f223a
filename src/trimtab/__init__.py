"""Trimtab: every published parameter-efficient fine-tuning method behind one small interface."""

from __future__ import annotations

from typing import Any

import trimtab.methods as _folder  # noqa: F401  binds the folder's name first, so that the function below keeps it
from trimtab import guards as _guards  # noqa: F401
from trimtab.adapter import Adapter
from trimtab.attach import adapters, attach, detach
from trimtab.check import ContractViolation, check_method
from trimtab.errors import (
    AdapterFileError,
    AttachError,
    SettingError,
    TargetError,
    TrainingError,
    TrimtabError,
    suggestion,
)
from trimtab.extras import MissingExtraError
from trimtab.method import Batches, Capabilities, Method, Spec, frozen, methods, setting
from trimtab.planning import plan
from trimtab.routing import route
from trimtab.storage import load
from trimtab.version import __version__

__all__ = [
    "Adapter", "AdapterFileError", "AttachError", "Batches", "Capabilities", "ContractViolation", "Method",
    "MissingExtraError", "SettingError", "Spec", "TargetError", "TrainingError", "TrimtabError", "__version__",
    "adapters", "attach", "check_method", "detach", "frozen", "load", "methods", "plan", "route", "setting",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Find a method class by its name on first use."""
    if name.startswith("_"):
        raise AttributeError(name)
    catalogue = methods()
    if name not in catalogue:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}." + suggestion(name, [*__all__, *catalogue]))
    return catalogue[name]


def __dir__() -> list[str]:
    return [*__all__, *methods()]
