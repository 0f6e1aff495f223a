"""A case: a model with inputs on which a method is checked, and what every check does with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attach import attach
from trimtab.errors import TrimtabError
from trimtab.kinds.calibration import starts_from_data
from trimtab.kinds.composition import weakest
from trimtab.kinds.weight import WeightMethod
from trimtab.method import Batches, Capabilities, Method
from trimtab.quantized import is_packed, plain_numbers

ROUNDING = 1e-5
"""Differences up to this share of the largest output are float32 rounding."""
TOTAL_STEPS = 10
"""Length of the run that schedules are told of; the checks make its first steps."""


class ContractViolation(TrimtabError):
    """A method breaks a promise; names the invariant, the method, the model and the figures."""


CALIBRATION_BATCHES = 8


class NotApplicable(Exception):
    """The invariant says nothing about this method on this model; the reason is its text."""


class Undecided(NotApplicable):
    """This model cannot decide it: another one has to, or the promise counts as broken."""


def itself(output: Any) -> Any:
    """Return the output: for models whose forward returns the tensor itself."""
    return output


@dataclass(frozen=True)
class Case:
    """One model with inputs. Everything in it can be pickled, so that other processes can build the same model.

    `build` returns the same model at every call, in evaluation mode. Each input is passed by its name; its first axis
    is the batch of at least three rows, and each row of `primary(model(**inputs))` depends on its own inputs only.
    `targets` stand in for a method's "all-linear". `tokens` names the input (batch, positions) of a model whose output
    (batch, positions, …) looks at earlier positions only; `generate(model, cached)` decodes greedily. `rounding` is
    how far two ways to compute one output lie apart on this model, as a share of the largest output.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    primary: Callable[[Any], Tensor] = itself
    targets: str | None = None
    tokens: str | None = None
    generate: Callable[[nn.Module, bool], Tensor] | None = None
    rounding: float = ROUNDING

    @property
    def derived(self) -> float:
        """How far results of several steps lie apart: gradients, and outputs of weights that were rounded once more."""
        return 10.0 * self.rounding

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

    def calibration(self, method: Method) -> Batches | None:
        """Return data around the case's inputs for a method that starts from data, None for any other."""
        if not starts_from_data(method):
            return None
        generator = torch.Generator().manual_seed(0)
        data = []
        for _ in range(CALIBRATION_BATCHES):
            noise = {
                k: torch.randn(v.shape, generator=generator).to(v)
                for k, v in self.inputs.items()
                if v.is_floating_point()
            }
            data.append({k: v + noise[k] if k in noise else v for k, v in self.inputs.items()})
        return Batches(data, lambda model, batch: objective(self.primary(model(**batch))))

    def converted(self, dtype: torch.dtype) -> Case:
        """Return the case with its real-valued inputs in another precision."""
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        return dataclasses.replace(self, inputs=inputs)


def doubled(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model in double precision."""
    return build().double()


def in_double(case: Case) -> tuple[Case, torch.dtype]:
    """Return the case in double precision, where two ways to compute the same differ visibly less than two formulas.

    A model that cannot compute in it (quantised; grouped matrix products of experts) stays as it is.
    """
    if any(is_packed(module, name) for module in case.build().modules() for name in module._parameters):
        return case, torch.float32
    double = dataclasses.replace(case.converted(torch.float64), build=partial(doubled, case.build))
    try:
        double.output(double.build())
    except RuntimeError:
        return case, torch.float32
    return double, torch.float64


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
    chosen = case.method(method)
    return attach(case.build(), chosen, name=name, seed=seed, base_mode="eval", calibration=case.calibration(chosen))


def attaches(method: Method, case: Case) -> None:
    """The method accepts the model; a model that it refuses is not asked for anything else."""
    attached(case, method)


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


def expect_near(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Stop unless two outputs differ by rounding only; tolerance is a share of the largest expected number."""
    found_difference = difference(found, expected)
    if not found_difference <= tolerance:
        raise ContractViolation(f"{what}: relative difference {found_difference:.2g}, at most {tolerance:.0e} allowed")


def expect_same(what: str, found: Tensor, expected: Tensor) -> None:
    """Stop unless two tensors hold the same bits."""
    found, expected = plain_numbers(found), plain_numbers(expected)
    if found.shape != expected.shape or found.dtype != expected.dtype or not torch.equal(found, expected):
        raise ContractViolation(f"{what}: not the same bits (relative difference {difference(found, expected):.2g})")


def expect_near_gradients(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Stop unless the gradients of every tensor agree, each relative to its own largest entry (or to a thousandth of
    the largest of all, below which rounding rules); four roundings of the largest of all are always allowed."""
    largest = max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest, 1e-12)
        apart = float((found[name].double() - gradient.double()).abs().max()) / scale
        rounding = 4.0 * torch.finfo(gradient.dtype).eps * largest / scale
        if not apart <= max(tolerance, rounding):
            raise ContractViolation(
                f"{what}: gradient of {name!r} differs by {apart:.2g}, at most {tolerance:.0e} allowed"
            )


def capabilities_of(method: Method) -> Capabilities:
    """Return what a method promises; a composition of several promises what its weakest part does."""
    return weakest(method.parts())


def require_base_kept(method: Method) -> None:
    """Leave out methods that build a new model on purpose."""
    if not capabilities_of(method).keeps_base:
        raise NotApplicable("keeps_base=False: the method builds a new model")


def require_weight_kind(method: Method) -> None:
    """Leave out methods that do not change weights."""
    if not all(isinstance(part, WeightMethod) for part in method.parts()):
        raise NotApplicable("not a weight method")
