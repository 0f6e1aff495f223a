"""Invariants of an adapter's life: disabling, several at once, routing, copies, and what detaching leaves behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attach import adapters, attach
from trimtab.contract.case import (
    ROUNDING,
    Case,
    ContractViolation,
    NotApplicable,
    attached,
    capabilities_of,
    difference,
    expect_near,
    expect_same,
    objective,
    require_base_kept,
    trained,
)
from trimtab.contract.declarations import would_hold
from trimtab.contract.sums import changes_add_up, expect_sum, follows_the_weight, saved, two_apart
from trimtab.errors import TrimtabError
from trimtab.guards import base_state_dict
from trimtab.method import Method
from trimtab.routing import route
from trimtab.storage import load

CYCLES = 20


def disabled_is_the_base(method: Method, case: Case) -> None:
    """Inside `disabled()` the output is the base's, bit for bit; afterwards the adapter's again."""
    require_base_kept(method)
    adapter = trained(case, method)
    beside = case.output(adapter.model)
    with adapter.disabled():
        expect_same("disabled output against the base", case.output(adapter.model), case.output(case.build()))
    expect_same("output after disabled", case.output(adapter.model), beside)
    if difference(beside, case.output(case.build())) <= ROUNDING:
        raise ContractViolation("three training steps have not changed the output")


def detaching_restores(method: Method, case: Case) -> None:
    """After training and detaching, the model is the one it was: keys, bits, classes, attributes, gradients wanted."""
    if not capabilities_of(method).keeps_base and would_hold(detaching_restores, method, case, keeps_base=True):
        raise ContractViolation("keeps_base=False, but detaching gives the base back, bit for bit")
    require_base_kept(method)
    untouched = case.build()
    adapter = trained(case, method)
    model = adapter.model
    adapter.detach()
    if list(model.state_dict()) != list(untouched.state_dict()):
        raise ContractViolation("detaching leaves other state-dict keys than the base's")
    for name, tensor in model.state_dict().items():
        expect_same(f"{name!r} after detaching", tensor, untouched.state_dict()[name])
    for found, expected in zip(_anatomy(model), _anatomy(untouched), strict=True):
        if found != expected:
            raise ContractViolation(f"detaching leaves a trace: {found}, was {expected}")
    expect_same("output after detaching", case.output(model), case.output(untouched))


def _anatomy(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (
            path,
            type(module),
            sorted(key for key in module.__dict__ if key != "training"),
            list(module._parameters),
            list(module._buffers),
            list(module._modules),
            [len(getattr(module, name)) for name in sorted(module.__dict__) if name.endswith("_hooks")],
            [None if p is None else p.requires_grad for p in module._parameters.values()],
        )
        for path, module in model.named_modules()
    ]


def leaves_nothing_behind(method: Method, case: Case) -> None:
    """Twenty times attach, train and detach leave no tensor, no hook and no byte."""
    require_base_kept(method)
    model = case.build()
    _cycle(method, case, model, 2)
    anatomy, tensors = _anatomy(model), _live_tensors()
    _cycle(method, case, model, CYCLES)
    if _anatomy(model) != anatomy:
        raise ContractViolation(f"{CYCLES} times attach and detach change the model")
    count, size = (now - before for now, before in zip(_live_tensors(), tensors, strict=True))
    if count > 0 or size > 0:
        raise ContractViolation(f"{CYCLES} times attach and detach leave {count} tensors and {size} bytes")


def _cycle(method: Method, case: Case, model: nn.Module, times: int) -> None:
    for _ in range(times):
        adapter = attach(model, case.method(method), base_mode="eval", calibration=case.calibration(method))
        objective(case.forward(model)).backward()  # type: ignore[no-untyped-call]
        adapter.detach()


def _live_tensors() -> tuple[int, int]:
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return len(found), sum(tensor.untyped_storage().nbytes() for tensor in found if not tensor.is_meta)


def deepcopies_are_independent(method: Method, case: Case) -> None:
    """A deepcopy gives the same output bit for bit, and its adapter acts on the copy alone."""
    adapter = trained(case, method)
    _expect_twin(method, case, adapter, copy.deepcopy(adapter.model))


def pickles_are_independent(method: Method, case: Case) -> None:
    """A pickled and restored model gives the same output bit for bit, and its adapter acts on it alone."""
    local = [type(part).__qualname__ for part in method.parts() if "<locals>" in type(part).__qualname__]
    if local:
        raise NotApplicable(f"Python cannot pickle the local class {local[0]}")
    try:
        pickle.dumps(case.build())
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise NotApplicable(f"the model itself cannot be pickled: {error}") from error
    adapter = trained(case, method)
    restored = pickle.loads(pickle.dumps(adapter.model))  # noqa: S301 - bytes of our own making
    _expect_twin(method, case, adapter, restored)


def _expect_twin(method: Method, case: Case, adapter: Adapter, model: nn.Module) -> None:
    beside = case.output(adapter.model)
    expect_same("output of the copy", case.output(model), beside)
    twin = adapters(model)[adapter.name]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    expect_same("output after changing the copy", case.output(adapter.model), beside)
    twin.detach()
    expect_same("output after detaching the copy's adapter", case.output(adapter.model), beside)
    if capabilities_of(method).keeps_base:
        expect_same("output of the detached copy", case.output(model), case.output(case.build()))


def _two(method: Method, case: Case) -> tuple[nn.Module, tuple[Adapter, Adapter], tuple[Tensor, Tensor]] | None:
    """Two trained adapters on one model, and their outputs alone; None where a second one is refused as declared."""
    apart = two_apart(method, case)
    alone = (case.output(apart[0].model), case.output(apart[1].model))
    model = case.build()
    with tempfile.TemporaryDirectory() as folder:
        files = saved(apart, Path(folder))
        first = load(model, files[0])
        if capabilities_of(method).additive:
            return model, (first, load(model, files[1])), alone
        try:
            load(model, files[1])
        except TrimtabError as error:
            if "not additive" not in str(error):
                raise ContractViolation(f"the refusal of a second adapter does not give the reason: {error}") from error
            expect_same("output after refusing a second adapter", case.output(model), alone[0])
            if would_hold(changes_add_up, method, case, additive=True) and not follows_the_weight(method, case):
                raise ContractViolation("additive=False, but the changes of two adapters add up") from error
            return None
    raise ContractViolation("additive=False, but a second adapter was attached at the same sites")


def two_adapters_keep_apart(method: Method, case: Case) -> None:
    """Of two adapters each one alone gives its own output; both together give another one."""
    both = _two(method, case)
    if both is None:
        return
    model, (first, second), alone = both
    together = case.output(model)
    second.active = False
    expect_near("the first of two, the second inactive", case.output(model), alone[0], case.rounding)
    first.active, second.active = False, True
    expect_near("the second of two, the first inactive", case.output(model), alone[1], case.rounding)
    first.active = True
    expect_same("both again", case.output(model), together)
    with contextlib.suppress(NotApplicable):
        expect_sum(method, case, (first, second), together)
    for name, output in zip(("first", "second"), alone, strict=True):
        if difference(together, output) <= ROUNDING:
            raise ContractViolation(f"two adapters together give the output of the {name} alone")
    second.detach()
    expect_near("the first after detaching the second", case.output(model), alone[0], case.rounding)


def rows_route_to_their_adapters(method: Method, case: Case) -> None:
    """In a routed batch each row gives the output of its own adapter, or of the base; or routing is refused."""
    capabilities = capabilities_of(method)
    both = _two(method, case) if capabilities.additive else None
    if both is None:
        adapter = trained(case, method, "a")
        model, alone = adapter.model, (case.output(adapter.model), case.output(case.build()))
    else:
        model, _, alone = both
    base = case.output(case.build())
    rows = ("a", "b" if both else None, None)
    expected = torch.cat([alone[0][:1], (alone[1] if both else base)[1:2], base[2:3]])
    routed = (*rows, *[None] * (len(base) - 3))
    if not capabilities.routable:
        _expect_route_refused(case, model, routed)
        if would_hold(rows_route_to_their_adapters, method, case, routable=True):
            raise ContractViolation("routable=False, but each row of a routed batch gives the output of its adapter")
        return
    with route(model, routed):
        expect_near(f"rows routed to {rows}", case.output(model)[:3], expected, case.rounding)
    if case.generate is not None and capabilities.cached_generation:
        _generates_by_rows(case.generate, model, rows, routed)


def _generates_by_rows(
    generate: Callable[[nn.Module, bool], Tensor],
    model: nn.Module,
    rows: tuple[str | None, ...],
    routed: tuple[str | None, ...],
) -> None:
    """Decoding a routed batch from a cache gives each row the tokens of its own adapter."""
    with route(model, routed):
        tokens = generate(model, True)
    for row, name in enumerate(rows):
        for adapter in adapters(model).values():
            adapter.active = adapter.name == name
        expect_same(f"tokens generated for a row routed to {name}", tokens[row], generate(model, True)[row])


def _expect_route_refused(case: Case, model: nn.Module, rows: tuple[str | None, ...]) -> None:
    try:
        with route(model, rows):
            case.output(model)
    except TrimtabError as error:
        if "routed" not in str(error):
            raise ContractViolation(f"the refusal to route does not say so: {error}") from error
        return
    raise ContractViolation("routable=False, but a routed batch went through")


def base_keys_stay(method: Method, case: Case) -> None:
    """Attached, the base's own keys, classes' names and isinstance relations are those of the plain model."""
    require_base_kept(method)
    plain, adapter = case.build(), attached(case, method)
    if list(base_state_dict(adapter.model)) != list(plain.state_dict()):
        raise ContractViolation("attaching changes the base's state-dict keys")
    modules = dict(adapter.model.named_modules())
    for path, module in plain.named_modules():
        if not isinstance(modules.get(path), type(module)) or type(modules[path]).__name__ != type(module).__name__:
            raise ContractViolation(f"attaching changes the class of {path!r} to {type(modules.get(path)).__name__}")
