"""Declarations put to the test: what a method would do if it declared something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from trimtab.contract.case import Case, ContractViolation, NotApplicable, capabilities_of, trained
from trimtab.errors import TrimtabError
from trimtab.method import Method
from trimtab.structure import Convolution


@contextmanager
def promising(method: Method, **declared: Any) -> Iterator[None]:
    """Inside the `with`, the method (and each part of it) declares something else than it does.

    The declaration of the class is exchanged, not the class: adapter files name a method by its class.
    """
    with ExitStack() as undo:
        for cls in dict.fromkeys(type(part) for part in (method, *method.parts())):
            undo.callback(_exchange, cls, {name: cls.__dict__.get(name) for name in ("capabilities", "promises")})
            _exchange(cls, {"capabilities": dataclasses.replace(cls.capabilities, **declared),
                            "promises": _promises(cls.promises, declared)})  # fmt: skip
        yield


def _promises(own: Callable[[Any], Any], declared: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda method: dataclasses.replace(own(method), **declared)


def _exchange(cls: type[Method], attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if value is not None:
            setattr(cls, name, value)
        elif name in cls.__dict__:
            delattr(cls, name)


def would_hold(check: Callable[[Method, Case], None], method: Method, case: Case, **declared: Any) -> bool:
    """Say whether a check would pass if the method declared something else."""
    with promising(method, **declared):
        try:
            check(method, case)
        except Exception:  # noqa: BLE001 - a refusal, a violation and a crash all say: it would not
            return False
    return True


def creates_bias(method: Method, case: Case) -> bool | None:
    """Whether merging creates a bias in the model without those of its maps; None where it has none, or needs them."""
    bare = dataclasses.replace(case, build=partial(without_biases, case.build))
    try:
        bare.forward(bare.build().requires_grad_(False))  # as under an adapter: torch chooses its kernels by this
    except (AttributeError, RuntimeError, TypeError):
        return None
    if len(list(bare.build().parameters())) == len(list(case.build().parameters())):
        return None
    try:
        return bool(trained(bare, method).merge(untie=True).created)
    except TrimtabError:
        return False


def without_biases(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model and take the biases of its linear maps and convolutions away."""
    model = build()
    for module in model.modules():
        if isinstance(module, (nn.Linear, *Convolution)):
            module.register_parameter("bias", None)
    return model


def promises_what_its_parts_do(method: Method, case: Case) -> None:
    """What a composition declares is what its parts together do."""
    if method.parts() == (method,):
        raise NotApplicable("the method has no parts")
    own, parts = dataclasses.asdict(method.promises()), dataclasses.asdict(capabilities_of(method))
    for name in own:
        if name not in ("merge_reason", "base_mode") and own[name] != parts[name]:
            raise ContractViolation(f"{name}={own[name]!r}, but its parts together give {name}={parts[name]!r}")
