"""What the tests of weight methods share: figures of the authors' code, formulas, finite differences, learning checks.

The figures in `official_figures.json` were produced by running each authors' repository at the commit named there, on
inputs that `numbers` makes, so that they can be made again without their random generators.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from test_weight_methods import DOUBLE, PLACES, attached, gradients, inputs, perturb

Formula = Callable[[Any, Tensor], Tensor]
"""W′ (*lead, out, in) from the leaf's tensors and W, written out without the library's own code."""


def numbers(*shape: int, phase: float, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Return fixed numbers in [−1, 1]: sin(0.37·k² + phase) over the flat position k; matrices have full rank."""
    count = torch.Size(shape).numel()
    return torch.sin(0.37 * torch.arange(count, dtype=DOUBLE).square() + phase).view(shape).to(dtype)


@cache
def _figures() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("official_figures.json").read_text())  # type: ignore[no-any-return]


def official(name: str) -> dict[str, Tensor]:
    """Return the stored tensors of one run of an authors' code."""
    return {key: torch.tensor(value, dtype=DOUBLE) for key, value in _figures()[name]["tensors"].items()}


def linear(out_features: int, in_features: int, phase: float = 0.3, bias: bool = True) -> nn.Sequential:
    """Return a model of one linear map with fixed numbers, in float64."""
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias)).double()
    with torch.no_grad():
        model[0].weight.copy_(numbers(out_features, in_features, phase=phase))
        if bias:
            model[0].bias.copy_(numbers(out_features, phase=phase + 1.0))
    return model


def assert_formula(
    method: Callable[[str], trimtab.Method],
    formula: Formula,
    place: str,
    *,
    at_base: bool = True,
    bias: Callable[[Any, Tensor | None], Tensor | None] | None = None,
    rows: int = 5,
) -> None:
    """Start, output, gradients, and the merged output at one place are those of the formula."""
    here = PLACES[place]
    model, adapter, leaf = attached(method, here)
    model.eval()
    bare = copy.deepcopy(model)
    trimtab.adapters(bare)["default"].detach()
    x = inputs(here, rows)
    if at_base:
        with torch.no_grad():
            torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-14)
    perturb(adapter)
    weight = getattr(bare[0], here.parameter).detach()
    changed = {f"0.{here.parameter}": here.stored(formula(leaf, here.matrices(weight)), weight)}
    if bias is not None and (new := bias(leaf, bare[0]._parameters.get("bias"))) is not None:
        bare[0].register_parameter("bias", nn.Parameter(torch.zeros_like(new)))
        changed["0.bias"] = new
    expected, output = torch.func.functional_call(bare, changed, (x,)), model(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    wanted = [*adapter.parameters(), *([x] if x.requires_grad else [])]
    for ours, theirs in zip(gradients(output, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    adapter.merge()
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)
    adapter.unmerge()


def assert_finite_differences(method: trimtab.Method, model: nn.Module | None = None, rows: int = 3) -> None:
    """Every gradient of a small layer, of its input too, is that of finite differences."""
    model = linear(6, 4) if model is None else model
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    perturb(adapter)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layer: Any = next(m for m in model.modules() if isinstance(m, nn.Linear))

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in named.values()]
    x = numbers(rows, layer.in_features, phase=0.1).requires_grad_()
    assert len(values) == len(list(adapter.parameters())) > 0
    assert torch.autograd.gradcheck(call, (x, *values))


def fit(method: trimtab.Method, weight: Tensor, target: Tensor, steps: int, lr: float = 0.02) -> tuple[float, float]:
    """Train one linear map W (out, in) towards a target weight with Adam; return the mean squared error before, after.

    The input is the identity, so that the output is the effective weight itself.
    """
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False)).to(weight.dtype)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    adapter = trimtab.attach(model, method, dtype=weight.dtype)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    eye, losses = torch.eye(weight.shape[1], dtype=weight.dtype), []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(eye), target.t())
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]
