"""Heads that a checkpoint lacks are part of the adapter: whatever the method, they are trained and saved with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.kinds.selection import SelectionMethod
from trimtab.method import Method, find_method
from trimtab.methods.composition.compose import Compose
from trimtab.methods.selection.full_tuning import FullTuning
from trimtab.planning import plan

HEAD_LR_SCALE = 10.0  # a fresh head has all to learn: at the rate of what is pretrained it stays behind


def with_fresh_head(model: nn.Module, method: Method, fresh: Sequence[str]) -> Method:
    """Return `method` with full tuning of the `fresh` parameters (dotted names) that it does not train whole itself."""
    numbers = {_place(name): model.get_parameter(name).numel() for name in fresh}
    trained = {
        row.site
        for row in plan(model, method).rows
        if row.trainable == numbers.get(row.site) and issubclass(find_method(row.method), SelectionMethod)
    }
    rest = tuple(place for place in numbers if place not in trained)
    return Compose(method, FullTuning(targets=rest, lr_scale=HEAD_LR_SCALE)) if rest else method


def head_numbers(model: nn.Module, fresh: Sequence[str]) -> int:
    """Return how many numbers the `fresh` parameters (dotted names) hold."""
    return sum(model.get_parameter(name).numel() for name in fresh)


def default_learning_rate(method: Method) -> float:
    """Return a learning rate to start from: 5e-5 where the whole model is trained, 1e-3 for adapters."""
    whole = any(isinstance(part, FullTuning) and part.targets == "all" for part in method.parts())
    return 5e-5 if whole else 1e-3


def _place(name: str) -> str:
    path, _, parameter = name.rpartition(".")
    return f"{path}:{parameter}" if path else parameter
