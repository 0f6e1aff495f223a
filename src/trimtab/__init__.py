"""Trimtab: every published parameter-efficient fine-tuning method behind one small interface."""

from __future__ import annotations

import importlib
from typing import Any

importlib.import_module("trimtab.methods")  # binds the folder's name first, so that the function below keeps it

from trimtab.adapter import Adapter  # noqa: E402
from trimtab.attach import adapters, attach, detach, plan  # noqa: E402
from trimtab.check import ContractViolation, check_method  # noqa: E402
from trimtab.errors import (  # noqa: E402
    AdapterFileError,
    AttachError,
    MissingExtraError,
    SettingError,
    TargetError,
    TrainingError,
    TrimtabError,
    suggestion,
)
from trimtab.method import Capabilities, Method, Spec, frozen, methods, setting  # noqa: E402
from trimtab.routing import route  # noqa: E402
from trimtab.storage import load  # noqa: E402
from trimtab.version import __version__  # noqa: E402

__all__ = [
    "Adapter",
    "AdapterFileError",
    "AttachError",
    "Capabilities",
    "ContractViolation",
    "Method",
    "MissingExtraError",
    "SettingError",
    "Spec",
    "TargetError",
    "TrainingError",
    "TrimtabError",
    "__version__",
    "adapters",
    "attach",
    "check_method",
    "detach",
    "frozen",
    "load",
    "methods",
    "plan",
    "route",
    "setting",
]


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
