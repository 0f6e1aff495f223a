"""Whether the changes of two adapters at one place add up, and whether that has a meaning."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.contract.case import (
    ROUNDING,
    Case,
    NotApplicable,
    attached,
    capabilities_of,
    difference,
    expect_near,
    require_weight_kind,
    trained,
)
from trimtab.contract.weights import (
    LINEAR,
    calls_of,
    effective_parameters,
    own_leaves,
    require_plain_products,
    substitute,
)
from trimtab.kinds.activation import ActivationLeaf
from trimtab.kinds.weight import WeightLeaf, WeightMethod
from trimtab.method import Method
from trimtab.quantized import dense_weight, is_packed
from trimtab.storage import load

Parameters = dict[tuple[str, str], Tensor]
AMPLIFICATION = 4
"""Two ways to a sum may differ by so many times what its two orders differ by, where that is more than rounding."""


def two_apart(method: Method, case: Case) -> list[Adapter]:
    """Return two trained adapters, each on a model of its own."""
    return [trained(case, method, name, seed, steps=3 + seed) for seed, name in enumerate(("a", "b"))]


def saved(adapters: list[Adapter], folder: Path) -> list[Path]:
    """Write adapters into a folder and return their files."""
    return [adapter.save(folder / f"{adapter.name}.safetensors") for adapter in adapters]


def changes_add_up(method: Method, case: Case) -> None:
    """Two adapters at one site change it by the sum of their changes."""
    _require_fine_numbers(case)
    model = case.build()
    with tempfile.TemporaryDirectory() as folder:
        first, second = (load(model, file) for file in saved(two_apart(method, case), Path(folder)))
    if all(isinstance(part, WeightMethod) for part in method.parts()):
        expect_sum(method, case, (first, second), case.output(model))
        return
    calls = calls_of(first, case)
    pairs = zip(first.leaves(), second.leaves(), strict=True)
    for one, two in ((one, two) for one, two in pairs if calls.get(one)):
        if not isinstance(one, ActivationLeaf):
            raise NotApplicable("what the leaf acts on is not one tensor")
        hidden, *rest = calls[one][0]
        alone = one(hidden, *rest), two(hidden, *rest)
        expect_near("the changes of two", two(alone[0], *rest) - hidden, alone[0] + alone[1] - 2 * hidden, ROUNDING)


def expect_sum(method: Method, case: Case, both: tuple[Adapter, Adapter], together: Tensor) -> None:
    """Two adapters of a weight method together give the output of the plain model with W plus both changes."""
    require_weight_kind(method)
    _require_fine_numbers(case)
    require_plain_products(case)
    if capabilities_of(method).input_dependent:
        return
    values = [effective_parameters(adapter) for adapter in both]
    expected, other_order = _output_of_sum(case, *values), _output_of_sum(case, *values[::-1])
    allowed = max(case.rounding, AMPLIFICATION * difference(other_order, expected))
    expect_near("two adapters together against the sum of their changes", together, expected, allowed)


def _require_fine_numbers(case: Case) -> None:
    if case.rounding > ROUNDING:
        raise NotApplicable("what is left of a sum is lost in this model's rounding")


def _output_of_sum(case: Case, first: Parameters, second: Parameters) -> Tensor:
    """Return the plain model's output with W₁ + (W₂ − W); the other order shows what it makes of the last digits."""
    plain = case.build()
    with torch.no_grad():
        joined = {}
        for path, name in first:
            stored = plain.get_submodule(path)._parameters[name]
            base = 0.0 if stored is None else dense_weight(plain.get_submodule(path), name)
            joined[path, name] = first[path, name] + (second[path, name] - base)
        substitute(plain, joined)
    return case.output(plain)


def follows_the_weight(method: Method, case: Case) -> bool:
    """Say whether a weight method's change is another one for another base weight: two such changes have no sum.

    Packed weights cannot be doubled to see it: there the answer is that it may be, and plain models decide.
    """
    one = trained(case, method)
    if not all(isinstance(leaf, WeightLeaf) for leaf in own_leaves(one)):
        return False
    if any(is_packed(leaf.holder, leaf.site.parameter) for leaf in own_leaves(one)):
        return True
    other = attached(dataclasses.replace(case, build=partial(_twice, case.build)), method)
    with torch.no_grad():
        for (_, value), (_, target) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            target.copy_(value)
        first, second = (
            [leaf.method.weight(leaf, leaf.weight()) - leaf.weight() for leaf in own_leaves(adapter)]
            for adapter in (one, other)
        )
    return any(difference(changed, change) > LINEAR for change, changed in zip(first, second, strict=True))


def _twice(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model
