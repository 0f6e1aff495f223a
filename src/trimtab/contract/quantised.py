"""The invariant of quantised bases, on linear maps stored as 8-bit numbers with one scale for each output."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.contract.case import (
    Case,
    ContractViolation,
    NotApplicable,
    Undecided,
    attached,
    capabilities_of,
    expect_same,
    optimizer_of,
    train,
)
from trimtab.contract.declarations import would_hold
from trimtab.contract.training import every_tensor_moves, starts_as_declared
from trimtab.errors import AttachError, TrimtabError
from trimtab.method import Method
from trimtab.quantized import is_packed


class Int8Params(nn.Parameter):
    """Numbers from −127 to 127; the name is the one by which such storage is known."""

    SCB: Tensor | None = None


class Int8Linear(nn.Linear):
    """A linear map that multiplies its 8-bit weight back in each forward."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        largest = plain.weight.detach().abs().amax(dim=1)
        numbers = (plain.weight.detach() / largest.unsqueeze(1) * 127.0).round().to(torch.int8)
        self.weight = Int8Params(numbers, requires_grad=False)
        self.bias = plain.bias
        self.state = SimpleNamespace(SCB=largest)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.float() * self.state.SCB.unsqueeze(1) / 127.0
        return F.linear(input, weight, self.bias)


def quantised(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose plain linear maps (with a weight of their own) are stored in 8 bits."""
    model = build()
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if (
                type(child) is nn.Linear
                and not is_packed(child)
                and holders[id(child.weight)] == 1
                and not isinstance(parent, nn.MultiheadAttention)
            ):
                parent._modules[name] = Int8Linear(child)
    return model.eval()


def runs_on_quantised_base(method: Method, case: Case) -> None:
    """On a quantised base the method starts, trains and is disabled as elsewhere, and refuses to merge into it."""
    packed_case = dataclasses.replace(case, build=partial(quantised, case.build))
    packed = [m for m in packed_case.build().modules() if isinstance(m, Int8Linear)]
    if not packed:
        raise NotApplicable("the model has no plain linear map")
    try:
        packed_case.output(packed_case.build())
    except RuntimeError as error:
        raise NotApplicable("the model reads its weights as real numbers itself") from error
    if not capabilities_of(method).quantized_base:
        _expect_refused(method, case, packed_case)
        return
    with contextlib.suppress(Undecided):
        starts_as_declared(method, packed_case)
    every_tensor_moves(method, packed_case)
    adapter = attached(packed_case, method)
    train(packed_case, adapter, optimizer_of(adapter), 2)
    with adapter.disabled():
        expect_same(
            "disabled on a quantised base", packed_case.output(adapter.model), packed_case.output(packed_case.build())
        )
    touched = [leaf.target for leaf in adapter.leaves() if is_packed(leaf.target)]
    if capabilities_of(method).merge == "none" or not touched:
        return
    try:
        adapter.merge(untie=True)
    except AttachError as error:
        if "quantised" not in str(error):
            raise ContractViolation(f"the refusal to merge into a quantised base does not say so: {error}") from error


def _at_own_targets(method: Method) -> bool:
    """Whether the targets are the method's own: others say nothing about it."""
    fields = {field.name: field for field in dataclasses.fields(method)}
    return "targets" not in fields or vars(method)["targets"] == fields["targets"].default


def _expect_refused(method: Method, case: Case, packed: Case) -> None:
    """A method that trains the base's own numbers stops where they are packed, and runs where its targets are not."""
    adapter = attached(case, method)
    quantised_model = packed.build()
    reached = [site for part in adapter.parts for site in part.sites]
    on_packed = [site for site in reached if is_packed(quantised_model.get_submodule(site.path), site.parameter)]
    if not on_packed:
        if _at_own_targets(method) and would_hold(runs_on_quantised_base, method, case, quantized_base=True):
            raise ContractViolation("quantized_base=False, but the method runs on a quantised base")
        raise NotApplicable("no target is quantised")
    try:
        attached(packed, method)
    except TrimtabError as error:
        if "quantised" not in str(error):
            raise ContractViolation(f"a quantised base is refused without saying why: {error}") from error
        return
    raise ContractViolation(f"quantized_base=False, but attached although {str(on_packed[0])!r} is quantised")
