"""Binding an adapter to an optimizer: its schedule and its checks hang on the optimizer's own steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trimtab.errors import TrainingError

if TYPE_CHECKING:
    from trimtab.adapter import Adapter


@dataclass(eq=False)
class Binding:
    """The live connection between one adapter and one optimizer."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    total_steps: int
    penalty: Literal["step", "loss"]
    has_penalty: bool
    penalty_taken: bool = False
    skipped: bool = False
    still: int = 0
    reached: set[str] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Gradients are complete: unscale them, add penalties, run the methods' event."""
        self.skipped = _overflowed(optimizer) or not (self.adapter.active and self.adapter.trainable)
        if self.skipped:
            return
        _unscale(optimizer)
        if self.has_penalty:
            self._take_penalty()
        for part in self.adapter.parts:
            part.method.before_step(part)

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer has stepped: run the schedules; the gradients are still there."""
        if self.skipped:
            return
        adapter = self.adapter
        with torch.no_grad():
            for part in adapter.parts:
                part.method.after_step(part, adapter.steps, self.total_steps)
        adapter.steps += 1
        # A warm-up that starts at zero moves nothing in its first step, and the second gradient is the first again.
        self.still += all(float(group["lr"]) == 0.0 for group in optimizer.param_groups)
        if adapter.steps - self.still <= 2:
            self._check_reach(last=adapter.steps - self.still == 2)

    def _take_penalty(self) -> None:
        if self.penalty == "loss":
            if not self.penalty_taken:
                raise TrainingError(
                    f"adapter {self.adapter.name!r} is bound with penalty='loss', but its penalty never entered the "
                    f"loss: use loss = loss + adapter.penalty(), or bind(…, penalty='step')."
                )
            self.penalty_taken = False
            return
        parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        with torch.enable_grad():
            value = self.adapter.penalty()
        assert value is not None
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(gradient)  # in place: distributed training keeps views of it

    def _check_reach(self, last: bool) -> None:
        """After the second step every tensor must have received a gradient, where its method says so."""
        expected = []
        for name, tensor, spec in self.adapter.named_tensors():
            if not spec.trainable or not spec.reached or not tensor.requires_grad:
                continue
            expected.append(name)
            if tensor.grad is not None and bool(tensor.grad.detach().abs().max() > 0):
                self.reached.add(name)
        missing = [name for name in expected if name not in self.reached]
        if last and missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            shown = ", ".join(repr(name) for name in missing[:5]) + more
            raise TrainingError(
                f"adapter {self.adapter.name!r}: after two steps no gradient has reached {shown} "
                f"({len(missing)} of {len(expected)} tensors). They would never train: the model does not use these "
                f"places, or checkpointing with frozen inputs cuts the gradient (use use_reentrant=False)."
            )

    def release(self) -> None:
        """Take the hooks off the optimizer; the adapter can then be bound to another one."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.adapter.binding = None


def bind(adapter: Adapter, optimizer: Any, total_steps: int | None, penalty: Literal["step", "loss"]) -> None:
    """Hang an adapter's schedule, penalty and gradient check on an optimizer (accelerate's wrapper is seen through).

    `total_steps`: optimizer steps of the whole run; needed by methods with a schedule. `penalty`: "step" adds the
    penalty's gradient just before the step (after any clipping), "loss" expects it in the loss. Raises TrainingError.
    """
    inner = unwrap(optimizer)
    if adapter.binding is not None:
        raise TrainingError(f"adapter {adapter.name!r} is bound to an optimizer already.")
    needs = [p.method for p in adapter.parts if p.method.capabilities.requires_binding]
    if needs and (total_steps is None or total_steps < 1):
        raise TrainingError(
            f"{type(needs[0]).__name__} follows a schedule over the whole run: bind(optimizer, total_steps=…) needs "
            f"the number of optimizer steps, found {total_steps!r}."
        )
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    absent = [name for name, p in adapter.named_parameters() if p.requires_grad and id(p) not in held]
    if absent:
        raise TrainingError(
            f"the optimizer does not hold {len(absent)} of the adapter's parameters, for example {absent[0]!r}: "
            f"make it from adapter.parameter_groups(lr=…), after attaching and after any sharding."
        )
    for part in adapter.parts:
        part.method.check_schedule(total_steps or 0)
    has_penalty = any(part.method.penalty(part) is not None for part in adapter.parts)
    binding = Binding(adapter, inner, total_steps or 0, penalty, has_penalty)
    binding.handles.append(inner.register_step_pre_hook(binding.before_step))
    binding.handles.append(inner.register_step_post_hook(binding.after_step))
    adapter.binding = binding


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer whose step really happens; raises TrainingError for one that cannot be seen through."""
    seen = optimizer
    while type(seen).__name__ == "AcceleratedOptimizer":
        seen = seen.optimizer
    if not isinstance(seen, torch.optim.Optimizer) or "deepspeed" in type(seen).__module__:
        raise TrainingError(
            f"cannot bind to {type(optimizer).__name__}: its gradients and steps cannot be seen (DeepSpeed partitions "
            f"them). Use a torch optimizer, plain or prepared by accelerate."
        )
    return seen


def _unscale(optimizer: Any) -> None:
    """Take the loss scale out of the gradients where the optimizer's fused step would do so, and tell it so.

    GradScaler leaves the scale in the gradients of such optimizers and hands it over in `grad_scale`; None there means
    that they are unscaled already.
    """
    scale = getattr(optimizer, "grad_scale", None)
    if not isinstance(scale, Tensor):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())
