"""Invariants of execution: other precisions, autocast, activation checkpointing, compilation, order of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.adapter import Adapter
from trimtab.contract.case import (
    ROUNDING,
    Case,
    ContractViolation,
    NotApplicable,
    attached,
    capabilities_of,
    difference,
    expect_near,
    expect_near_gradients,
    expect_same,
    gradients,
    objective,
    optimizer_of,
    plain_attention,
    train,
    trained,
)
from trimtab.errors import TrimtabError
from trimtab.hooks import Leaf
from trimtab.method import Method
from trimtab.structure import Structure

BFLOAT16 = 0.05
"""What bfloat16 may add to a relative difference."""


def halved(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model in bfloat16."""
    return build().to(torch.bfloat16)


def trains_on_bfloat16_base(method: Method, case: Case) -> None:
    """On a bfloat16 base the adapter's numbers stay float32, start as declared, and train; the output is bfloat16."""
    half = dataclasses.replace(case.converted(torch.bfloat16), build=partial(halved, case.build))
    adapter = attached(half, method)
    base, output = half.output(half.build()), half.output(adapter.model)
    if output.dtype is not base.dtype:
        raise ContractViolation(f"the output became {output.dtype}, the base gives {base.dtype}")
    if capabilities_of(method).starts_at_base == "exact" and difference(output, base) > BFLOAT16:
        raise ContractViolation(f"on a bfloat16 base the start is off by {difference(output, base):.2g}")
    before = {name: tensor.detach().clone() for name, tensor, _ in adapter.named_tensors()}
    train(half, adapter, optimizer_of(adapter), 2)
    for name, tensor, spec in adapter.named_tensors():
        if spec.dtype is None and tensor.dtype is not torch.float32:
            raise ContractViolation(f"{name!r} is {tensor.dtype} on a bfloat16 base, float32 was asked for")
        if not bool(torch.isfinite(tensor).all()):
            raise ContractViolation(f"{name!r} is not finite after two steps on a bfloat16 base")
        if spec.trainable and spec.reached and torch.equal(tensor, before[name]):
            raise ContractViolation(f"{name!r} has not moved after two steps on a bfloat16 base")


def runs_under_autocast(method: Method, case: Case) -> None:
    """Under autocast the output is the float32 one within bfloat16, and gradients have the parameters' dtype."""
    adapter = trained(case, method)
    with torch.autocast("cpu", dtype=torch.bfloat16), plain_attention():
        low = case.forward(adapter.model)
        found = gradients(adapter, objective(low))
        base_low = case.output(case.build())
    noise = difference(base_low, case.output(case.build()))
    apart = difference(low.detach(), case.output(adapter.model))
    if apart > 4 * noise + BFLOAT16:
        raise ContractViolation(f"under autocast the output is off by {apart:.2g}, the base's own by {noise:.2g}")
    parameters = dict(adapter.named_parameters())
    for name, gradient in found.items():
        if gradient.dtype is not parameters[name].dtype or not bool(torch.isfinite(gradient).all()):
            raise ContractViolation(f"under autocast the gradient of {name!r} is {gradient.dtype}, or not finite")


class _Checkpointed:
    """Stands in for a module's forward on the instance and recomputes it in the backward pass."""

    def __init__(self, forward: Callable[..., Any], reentrant: bool) -> None:
        self.forward, self.reentrant = forward, reentrant

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reentrant and not any(_real(value) for value in (*args, *kwargs.values())):
            return self.forward(*args, **kwargs)  # an embedding: reentrant checkpointing would cut its gradient
        values = [_wanting_gradient(value) if self.reentrant else value for value in (*args, *kwargs.values())]

        def run(*given: Any) -> Any:
            return self.forward(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        return checkpoint(run, *values, use_reentrant=self.reentrant)


def _wanting_gradient(value: Any) -> Any:
    """Reentrant checkpointing cuts gradients where no input wants one: frozen inputs are made to, as trainers do."""
    return value.detach().requires_grad_() if _real(value) and not value.requires_grad else value


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """The blocks, or where there are none, the parts of the model that are called."""
    structure = Structure(model)
    if structure.blocks:
        return [structure.modules[path] for path in structure.blocks]
    children = [child for child in model.children() if not isinstance(child, Leaf | nn.ModuleList)]
    return [child for child in children if any(True for _ in child.parameters())]


def _checkpoints(method: Method, case: Case, reentrant: bool) -> None:
    adapter = trained(case, method)
    plain = case.forward(adapter.model)
    expected = gradients(adapter, objective(plain))
    for module in _checkpointed_modules(adapter.model):
        module.forward = _Checkpointed(module.forward, reentrant)
    if not capabilities_of(method).checkpointing:
        _expect_checkpointing_refused(case, adapter)
        return
    output = case.forward(adapter.model)
    expect_near("output with checkpointing", output.detach(), plain.detach(), case.rounding)
    objective(output).backward()  # type: ignore[no-untyped-call]
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in adapter.named_parameters()}
    expect_near_gradients("with checkpointing", found, expected, case.derived)


def _expect_checkpointing_refused(case: Case, adapter: Adapter) -> None:
    try:
        objective(case.forward(adapter.model)).backward()  # type: ignore[no-untyped-call]
    except TrimtabError as error:
        if "checkpointing" not in str(error):
            raise ContractViolation(f"the refusal of checkpointing does not say so: {error}") from error
        return
    raise ContractViolation("checkpointing=False, but a checkpointed step went through")


def checkpoints(method: Method, case: Case) -> None:
    """Activation checkpointing without reentry gives the same output and gradients, or is refused as declared."""
    with plain_attention():
        _checkpoints(method, case, reentrant=False)


def checkpoints_reentrantly(method: Method, case: Case) -> None:
    """Reentrant activation checkpointing gives the same output and gradients, or is refused as declared."""
    with plain_attention():
        _checkpoints(method, case, reentrant=True)


def compiles_whole(method: Method, case: Case) -> None:
    """torch.compile captures the model with its adapter as one graph, with the same output and gradients."""
    adapter = trained(case, method)
    plain = case.forward(adapter.model)
    expected = gradients(adapter, objective(plain))
    try:
        output = _compiled(case, adapter.model)
        found = gradients(adapter, objective(output))
    except TrimtabError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        if not _compiles_alone(case):
            raise NotApplicable(f"the model itself does not compile as one graph: {text}") from error
        raise ContractViolation(f"does not compile as one graph: {type(error).__name__}: {text}") from error
    expect_near("compiled output", output.detach(), plain.detach(), case.rounding)
    expect_near_gradients("compiled", found, expected, case.derived)


def _compiled(case: Case, model: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return case.forward(torch.compile(model, fullgraph=True, backend="aot_eager"))  # type: ignore[arg-type]


def _compiles_alone(case: Case) -> bool:
    try:
        objective(_compiled(case, case.build())).backward()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - whatever stops the model alone is no fault of the method
        return False
    return True


def looks_back_only(method: Method, case: Case) -> None:
    """In a causal model the output at a position does not depend on later tokens, exactly if causal_safe says so."""
    if case.tokens is None:
        raise NotApplicable("the model is not causal")
    adapter = trained(case, method)
    tokens = case.inputs[case.tokens]
    changed = tokens.clone()
    changed[:, -1] = tokens[:, -1] - 1  # another token of the vocabulary: examples hold none below one
    later = dataclasses.replace(case, inputs={**case.inputs, case.tokens: changed})
    before, after = case.output(adapter.model), later.output(adapter.model)
    if difference(before[:, -1], after[:, -1]) <= ROUNDING:
        raise ContractViolation("another last token leaves the last output as it was")
    leak = difference(after[:, :-1], before[:, :-1])
    declared = capabilities_of(method).causal_safe
    if (leak <= case.rounding) != declared:
        raise ContractViolation(f"causal_safe={declared}, but another last token changes earlier outputs by {leak:.2g}")


def generates_from_a_cache(method: Method, case: Case) -> None:
    """Greedy decoding gives the same tokens with and without a cache; or decoding with a cache is refused."""
    if case.generate is None:
        raise NotApplicable("the model does not generate")
    adapter = trained(case, method)
    if capabilities_of(method).cached_generation:
        expect_same(
            "tokens decoded with a cache", case.generate(adapter.model, True), case.generate(adapter.model, False)
        )
        return
    try:
        case.generate(adapter.model, True)
    except TrimtabError:
        return
    raise ContractViolation("cached_generation=False, but decoding with a cache went through")


def refuses_instance_forward(method: Method, case: Case) -> None:
    """A target whose forward sits on the instance would silently bypass the adapter, and is refused."""
    adapter = attached(case, method)
    paths = _targets(adapter)
    adapter.detach()
    model = case.build()
    for path in paths:
        module = model.get_submodule(path)
        module.forward = module.forward
    try:
        attached(dataclasses.replace(case, build=lambda: model), method)
    except TrimtabError as error:
        if "forward of its own" not in str(error):
            raise ContractViolation(f"a dispatched model is refused without saying why: {error}") from error
        return
    raise ContractViolation("attached to a dispatched model, whose forwards would bypass the adapter")


def _targets(adapter: Adapter) -> list[str]:
    return [site.owner for part in adapter.parts for site in part.sites]
