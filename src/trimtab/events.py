"""Binding an adapter to an optimizer: its schedule and its checks hang on the optimizer's own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trimtab.errors import TrainingError, brief
from trimtab.quantized import whole

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
    made: int = 0
    moving: int = 0
    reached: set[str] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Gradients are complete: unscale them, add penalties, run the methods' event."""
        self.skipped = _overflowed(optimizer) or not (self.adapter.active and self.adapter.trainable)
        if self.skipped:
            return
        adapter = self.adapter
        if adapter.steps >= self.total_steps and any(p.method.promises().requires_binding for p in adapter.parts):
            raise TrainingError(
                f"adapter {adapter.name!r}: its total_steps={self.total_steps} are over; bind it for the whole run."
            )
        _unscale(optimizer)
        if self.has_penalty:
            self._take_penalty()
        for part in self.adapter.parts:
            part.call("before_step")

    def after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The optimizer has stepped: run the schedules; the gradients are still there."""
        if self.skipped:
            return
        adapter = self.adapter
        with torch.no_grad():
            for part in adapter.parts:
                part.call("after_step", adapter.steps, self.total_steps)
        adapter.steps += 1
        # A warm-up that starts at zero moves nothing in its first step, and the second gradient is the first again.
        self.made += 1
        self.moving += any(float(group["lr"]) != 0.0 for group in optimizer.param_groups)
        if self.moving <= 2 and adapter.steps - self.made <= 2:  # a run resumed later has been checked before
            self._check_reach(last=self.moving == 2)

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
        tensors = [(name, tensor) for name, tensor, spec in self.adapter.named_tensors() if spec.reached]
        gradients = {name: tensor.grad for name, tensor in tensors if tensor.requires_grad}
        largest = {name: float(whole(grad).abs().max()) for name, grad in gradients.items() if grad is not None}
        wild = next((name for name, size in largest.items() if not math.isfinite(size)), None)
        if wild is not None:
            raise TrainingError(
                f"adapter {self.adapter.name!r}: the gradient of {wild!r} is not finite; lower the learning rate."
            )
        self.reached |= {name for name, size in largest.items() if size > 0}
        missing = [name for name in gradients if name not in self.reached]
        if last and missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            shown = ", ".join(repr(name) for name in missing[:5]) + more
            raise TrainingError(
                f"adapter {self.adapter.name!r}: after two steps no gradient has reached {shown} "
                f"({len(missing)} of {len(gradients)} tensors). They would never train: the model does not use these "
                f"places, checkpointing with frozen inputs cuts gradients (use use_reentrant=False), or lr is too high."
            )

    def release(self) -> None:
        """Take the hooks off the optimizer; the adapter can then be bound to another one."""
        for handle in self.handles:
            handle.remove()
        self.adapter.binding = None


def bind(adapter: Adapter, optimizer: Any, total_steps: int | None, penalty: Literal["step", "loss"]) -> None:
    """Hang an adapter's schedule, penalty and gradient check on an optimizer (accelerate's wrapper is seen through).

    `total_steps`: optimizer steps of the whole run; needed by methods with a schedule. `penalty`: "step" adds the
    penalty's gradient just before the step (after any clipping), "loss" expects it in the loss. Raises TrainingError.
    """
    inner = unwrap(optimizer)
    if adapter.binding is not None:
        raise TrainingError(f"adapter {adapter.name!r} is bound to an optimizer already.")
    if penalty not in ("step", "loss"):
        raise TrainingError(f"bind: penalty={brief(penalty)}; choose 'step' or 'loss'.")
    needs = [p.method for p in adapter.parts if p.method.promises().requires_binding]
    if needs if total_steps is None else (type(total_steps) is not int or total_steps < 1):
        why = f"{type(needs[0]).__name__} follows a schedule over the whole run: " if needs else ""
        raise TrainingError(
            f"{why}bind(optimizer, total_steps=…) needs the number of optimizer steps, found {brief(total_steps)}."
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
    has_penalty = any(part.call("penalty") is not None for part in adapter.parts)
    adapter.binding = binding = Binding(adapter, inner, total_steps or 0, penalty, has_penalty)
    before, after = binding.before_step, binding.after_step
    binding.handles = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]


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
