"""A case: a model with inputs on which a method is checked, and what every check does with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attach import attach
from trimtab.errors import TrimtabError
from trimtab.kinds.weight import WeightMethod
from trimtab.method import Capabilities, Method

ROUNDING = 1e-5
"""Differences up to this share of the largest output are float32 rounding."""
TOTAL_STEPS = 10
"""Length of the run that schedules are told of; the checks make its first steps."""


class ContractViolation(TrimtabError):
    """A method breaks a promise; names the invariant, the method, the model and the figures."""


class NotApplicable(Exception):
    """The invariant says nothing about this method on this model; the reason is its text."""


def itself(output: Any) -> Any:
    """Return the output: for models whose forward returns the tensor itself."""
    return output


@dataclass(frozen=True)
class Case:
    """One model with inputs. Everything in it can be pickled, so that other processes can build the same model.

    `build` returns the same model at every call, in evaluation mode. Each input is passed by its name; its first axis
    is the batch of at least three rows, and each row of `primary(model(**inputs))` depends on its own inputs only.
    `targets` stand in for a method's "all-linear". `tokens` names the input (batch, positions) of a model whose output
    (batch, positions, …) looks at earlier positions only; `generate(model, cached)` decodes greedily.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    primary: Callable[[Any], Tensor] = itself
    targets: str | None = None
    tokens: str | None = None
    generate: Callable[[nn.Module, bool], Tensor] | None = None

    def method(self, method: Method) -> Method:
        """Return the method with this case's own targets, where its own are "all-linear"."""
        if self.targets is None or getattr(method, "targets", None) != "all-linear":
            return method
        return dataclasses.replace(method, targets=self.targets)  # type: ignore[call-arg]

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the tensor to compare outputs by."""
        return self.primary(model(**(self.inputs if inputs is None else inputs)))

    def output(self, model: nn.Module) -> Tensor:
        """Return the output in evaluation mode, computed in the same way whatever the model's parameters want.

        torch's native attention kernels round otherwise than the plain ones, and attention is computed in another way
        where a parameter requires a gradient, even without recording: equal bits could not be asked for.
        """
        model.eval()
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            with torch.no_grad(), plain_attention():
                return self.forward(model).detach()
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def converted(self, dtype: torch.dtype) -> Case:
        """Return the case with its real-valued inputs in another precision."""
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch from its native attention kernels inside the `with`."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def objective(output: Tensor) -> Tensor:
    """Return the mean squared distance of an output to fixed numbers in [−1, 1]; any batch, any shape."""
    wanted = torch.sin(torch.arange(output[0].numel(), dtype=torch.float32, device=output.device))
    return (output.flatten(1).float() - wanted).square().mean()


def attached(case: Case, method: Method, name: str = "default", seed: int = 0) -> Adapter:
    """Attach the method to a new model of the case, whose base stays in evaluation mode."""
    return attach(case.build(), case.method(method), name=name, seed=seed, base_mode="eval")


def optimizer_of(adapter: Adapter, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Return AdamW over the adapter's groups, bound to the adapter: a tensor moves exactly if a gradient reaches it."""
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2, weight_decay=weight_decay))
    adapter.bind(optimizer, total_steps=TOTAL_STEPS)
    return optimizer


def train(case: Case, adapter: Adapter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Make optimizer steps on the case's inputs; random draws depend on the number of the step alone."""
    adapter.model.train()
    with torch.random.fork_rng(devices=[]):
        for _ in range(steps):
            torch.manual_seed(1000 + adapter.steps)
            optimizer.zero_grad(set_to_none=True)
            objective(case.forward(adapter.model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    adapter.model.eval()


def trained(case: Case, method: Method, name: str = "default", seed: int = 0, steps: int = 3) -> Adapter:
    """Return an adapter after a few optimizer steps on a new model of the case, off its start, without gradients."""
    adapter = attached(case, method, name, seed)
    optimizer = optimizer_of(adapter)
    train(case, adapter, optimizer, steps)
    optimizer.zero_grad(set_to_none=True)
    return adapter


def gradients(adapter: Adapter, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the adapter's parameters by name; zero where none arrives."""
    named = [(name, parameter) for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [parameter for _, parameter in named], materialize_grads=True, allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(named, found, strict=True)}


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected number; infinite where one is not a number."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    largest = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    return largest / max(scale, 1e-12) if largest else 0.0


def expect_near(what: str, found: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    """Stop unless two outputs differ by rounding only; tolerance is a share of the largest expected number."""
    found_difference = difference(found, expected)
    if not found_difference <= tolerance:
        raise ContractViolation(f"{what}: relative difference {found_difference:.2g}, at most {tolerance:.0e} allowed")


def expect_same(what: str, found: Tensor, expected: Tensor) -> None:
    """Stop unless two tensors hold the same bits."""
    if found.shape != expected.shape or found.dtype != expected.dtype or not torch.equal(found, expected):
        raise ContractViolation(f"{what}: not the same bits (relative difference {difference(found, expected):.2g})")


def expect_near_gradients(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Stop unless the gradients of every tensor agree, each relative to its own largest entry (or to a thousandth of
    the largest of all, below which rounding rules)."""
    largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest, 1e-12)
        apart = float((found[name].double() - gradient.double()).abs().max()) / scale
        if not apart <= tolerance:
            raise ContractViolation(
                f"{what}: gradient of {name!r} differs by {apart:.2g}, at most {tolerance:.0e} allowed"
            )


def capabilities_of(method: Method) -> Capabilities:
    """Return what a method promises; a composition of several promises what its weakest part does."""
    parts = [part.promises() for part in method.parts()]
    first = parts[0]
    if len(parts) == 1:
        return first
    order = ("exact", "approximate", "no", "none")
    all_of = ("linear_in_parameters", "additive", "causal_safe", "cached_generation", "quantized_base", "routable",
              "per_sample_gradients", "keeps_base", "checkpointing")  # fmt: skip
    any_of = ("input_dependent", "creates_bias", "requires_binding")
    combined: dict[str, Any] = {name: all(getattr(part, name) for part in parts) for name in all_of}
    combined |= {name: any(getattr(part, name) for part in parts) for name in any_of}
    return dataclasses.replace(
        first,
        starts_at_base=max((part.starts_at_base for part in parts), key=order.index),
        merge=max((part.merge for part in parts), key=order.index),
        merge_reason="; ".join(part.merge_reason for part in parts if part.merge_reason),
        **combined,
    )


def require_base_kept(method: Method) -> None:
    """Leave out methods that build a new model on purpose."""
    if not capabilities_of(method).keeps_base:
        raise NotApplicable("keeps_base=False: the method builds a new model")


def require_weight_kind(method: Method) -> None:
    """Leave out methods that do not change weights."""
    if not all(isinstance(part, WeightMethod) for part in method.parts()):
        raise NotApplicable("not a weight method")
