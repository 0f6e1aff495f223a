"""Invariants of starting and training: the start, the frozen base, what moves, counts, schedules, resuming."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from trimtab.adapter import Part
from trimtab.attach import attach
from trimtab.contract.case import (
    ROUNDING,
    Case,
    ContractViolation,
    NotApplicable,
    Undecided,
    attached,
    capabilities_of,
    difference,
    expect_same,
    in_double,
    objective,
    optimizer_of,
    require_base_kept,
    train,
    trained,
)
from trimtab.errors import TrainingError
from trimtab.guards import base_state_dict
from trimtab.method import Method
from trimtab.planning import plan
from trimtab.quantized import is_packed
from trimtab.storage import load

EXACT = 1e-9
"""In double precision, an exact start is off by at most this share of the largest output."""
ELSEWHERE = 0.01
"""What starts elsewhere is off by more than this share of the largest output, if not on every model."""
APPROXIMATE = 0.5
"""An approximate start or merge is off by at most this share of the largest output."""


def starts_as_declared(method: Method, case: Case) -> None:
    """The first output is the base's (exact), near it (approximate), or another one, on some model at least (no)."""
    declared = capabilities_of(method).starts_at_base
    precise, dtype = in_double(case)
    exact, finest = (EXACT, EXACT) if dtype is torch.float64 else (ROUNDING, 0.0)
    base, model = precise.output(precise.build()), precise.build()
    attach(model, precise.method(method), dtype=dtype, base_mode="eval", calibration=precise.calibration(method))
    apart = difference(precise.output(model), base)
    right = {"exact": apart <= exact, "approximate": finest < apart <= APPROXIMATE, "no": apart > ELSEWHERE}
    if declared == "no" and finest < apart <= ELSEWHERE:
        raise Undecided(f"starts_at_base='no', but here the first output is {apart:.2g} of the largest from the base's")
    if not right[declared]:
        raise ContractViolation(
            f"starts_at_base={declared!r}, but the first output is {apart:.2g} of the largest base output away from it "
            f"(exact: at most {exact:.0e}, approximate: more, and at most {APPROXIMATE}, no: above {ELSEWHERE})"
        )


def start_depends_on_seed_alone(method: Method, case: Case) -> None:
    """The same seed gives the same bits whatever was drawn before; attaching draws nothing from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = attached(case, method, seed=7)
        before = torch.get_rng_state()
        torch.manual_seed(2)
        model = case.build()
        between = torch.get_rng_state()
        second = attach(model, case.method(method), seed=7, base_mode="eval", calibration=case.calibration(method))
        if not torch.equal(between, torch.get_rng_state()) or torch.equal(before, between):
            raise ContractViolation("attaching draws from torch's global generator instead of the adapter's own")
    for (name, one, _), (_, two, _) in zip(first.named_tensors(), second.named_tensors(), strict=True):
        expect_same(f"the same seed twice, {name!r}", two, one)


def base_stays_frozen(method: Method, case: Case) -> None:
    """After training with weight decay on everything, every tensor of the base has the same bits and no gradient."""
    require_base_kept(method)
    adapter = attached(case, method)
    own = {id(parameter) for parameter in adapter.parameters()}
    rest = [parameter for parameter in adapter.model.parameters() if id(parameter) not in own]
    before = {name: tensor.clone() for name, tensor in base_state_dict(adapter.model).items()}
    optimizer = optimizer_of(adapter, weight_decay=0.1)
    if rest:
        optimizer.add_param_group({"params": rest, "lr": 1e-2, "weight_decay": 0.1})
    train(case, adapter, optimizer, 3)
    for name, tensor in base_state_dict(adapter.model).items():
        expect_same(f"the base's {name!r} after training", tensor, before[name])
    learning = [p for p in rest if p.requires_grad or p.grad is not None]
    if learning:
        raise ContractViolation(f"{len(learning)} tensors that are not the adapter's require or hold a gradient")


def every_tensor_moves(method: Method, case: Case) -> None:
    """After two steps every trainable tensor has moved, where its spec says that a gradient reaches it."""
    adapter = attached(case, method)
    before = {name: tensor.detach().clone() for name, tensor, _ in adapter.named_tensors()}
    train(case, adapter, optimizer_of(adapter), 2)
    expected = [(name, tensor) for name, tensor, spec in adapter.named_tensors() if spec.trainable and spec.reached]
    still = [name for name, tensor in expected if torch.equal(tensor, before[name])]
    if still:
        raise ContractViolation(f"{len(still)} of {len(expected)} trainable tensors have not moved: {still[0]!r}, …")
    fixed = [name for name, tensor, spec in adapter.named_tensors() if not spec.trainable and spec.stored != "training"]
    tensors = {name: tensor for name, tensor, _ in adapter.named_tensors()}
    for name in fixed:
        if tensors[name].is_floating_point() and tensors[name].requires_grad:
            raise ContractViolation(f"{name!r} is declared frozen, but requires a gradient")


def counts_match_plan(method: Method, case: Case) -> None:
    """`plan` and the adapter agree on the number of trained numbers; planning works on the meta device."""
    model = case.build()
    classes = [type(module) for module in model.modules()]
    planned = plan(model, case.method(method)).trainable
    if classes != [type(module) for module in model.modules()]:
        raise ContractViolation("plan has changed the model")
    on_meta = plan(_on_meta(case.build()), case.method(method)).trainable
    adapter = attached(case, method)
    counts = {
        "plan": planned,
        "plan on the meta device": on_meta,
        "adapter.trainable_count": adapter.trainable_count,
        "adapter.report()": adapter.report().total,
        "parameters that require a gradient": sum(p.numel() for p in adapter.model.parameters() if p.requires_grad),
    }
    if len(set(counts.values())) > 1:
        raise ContractViolation(f"the numbers of trained numbers differ: {counts}")


def _on_meta(model: nn.Module) -> nn.Module:
    """Move a model to the meta device, its quantised weights excepted, which cannot; tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_packed(module, name):
                empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), empty)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    return model


def schedule_needs_binding(method: Method, case: Case) -> None:
    """A method with a schedule stops when it is trained unbound; one that declares none has none to miss."""
    acting = [type(part.method).__name__ for part in attached(case, method).parts if _acts_at_steps(part)]
    if not capabilities_of(method).requires_binding:
        if acting:
            raise ContractViolation(
                f"{acting[0]} acts at optimizer steps, but requires_binding=False: trained unbound, its schedule would "
                f"be missing in silence"
            )
        raise NotApplicable("no schedule")
    if not acting:
        raise ContractViolation("requires_binding=True, but the method does nothing at optimizer steps")
    adapter = attached(case, method)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter.model.train()
    try:
        for _ in range(2):
            objective(case.forward(adapter.model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    except TrainingError as error:
        if "bind" not in str(error):
            raise ContractViolation(f"the refusal of unbound training does not say what to do: {error}") from error
        return
    raise ContractViolation("requires_binding=True, but two unbound steps went through")


def _acts_at_steps(part: Part) -> bool:
    """Whether a method has a schedule, or a penalty under these settings."""
    given = type(part.method)
    scheduled = given.before_step is not Method.before_step or given.after_step is not Method.after_step
    return scheduled or part.method.penalty(part) is not None


def resumes_bit_for_bit(method: Method, case: Case) -> None:
    """Four steps, and two steps, save, load into a new model, two more steps, end in the same bits."""
    unbroken = trained(case, method, steps=4)
    first = attached(case, method)
    optimizer = optimizer_of(first)
    train(case, first, optimizer, 2)
    with tempfile.TemporaryDirectory() as folder:
        file = first.save(Path(folder) / "adapter.safetensors", training=True)
        resumed = load(case.build(), file, trainable=True)
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    train(case, resumed, again, 2)
    for (name, one, _), (_, two, _) in zip(unbroken.named_tensors(), resumed.named_tensors(), strict=True):
        expect_same(f"{name!r} after resuming", two, one)
