"""TMoE: figures of the authors' code, what it is equal to, finite differences, counts, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, linear, numbers, official

VARIANTS = {"tmoe": {}, "tmoe_shared": {"shared_expert": True}, "tmoe_own": {"own_compression": True}}


@pytest.mark.parametrize("run", VARIANTS)
def test_figures_are_those_of_the_authors_code(run: str) -> None:
    model, theirs, settings = linear(8, 6), official(run), VARIANTS[run]
    x = numbers(2, 3, 6, phase=0.9).requires_grad_()
    base = model(x).detach() - model[0].bias.detach()
    method = trimtab.TMoE(rank=2, alpha=3.0, experts=3, targets="0", **settings)
    leaf: Any = trimtab.attach(model, method, dtype=DOUBLE).parts[0].leaves[0]
    assert torch.equal(model(x), base + model[0].bias)
    with torch.no_grad():
        leaf.down.copy_(torch.stack([numbers(2, 6, phase=0.1 + i) for i in range(len(leaf.down))]))
        leaf.up.copy_(torch.stack([numbers(8, 2, phase=0.2 + i) for i in range(3)]))
        leaf.router.copy_(numbers(3, 6, phase=0.3))
        if run == "tmoe_shared":
            leaf.shared_up.copy_(numbers(8, 2, phase=0.4))
        model[0].weight.zero_()  # the stored gradient of x is that of the update alone
        model[0].bias.zero_()
    output = model(x)
    output.square().sum().backward()
    ours = {"update": output, "x": x.grad, "down": leaf.down.grad, "up": leaf.up.grad, "router": leaf.router.grad}
    ours |= {"shared": leaf.shared_up.grad} if run == "tmoe_shared" else {}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("run", VARIANTS)
def test_gradients_are_those_of_finite_differences(run: str) -> None:
    assert_finite_differences(trimtab.TMoE(rank=2, experts=3, targets="0", **VARIANTS[run]))


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 8), lambda: Conv1D(8, 6)])
def test_a_router_of_zeros_gives_the_mean_expert_and_one_expert_gives_lora(layer: Any) -> None:
    def outputs(method: trimtab.Method, fill: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(layer()).double()
        fill(trimtab.attach(model, method, dtype=DOUBLE).parts[0].leaves[0])
        return model(numbers(2, 3, 6, phase=0.9))

    experts = torch.stack([numbers(8, 2, phase=0.2 + i) for i in range(3)])

    def fill(leaf: Any) -> None:
        with torch.no_grad():
            leaf.down.copy_(numbers(1, 2, 6, phase=0.1))
            leaf.up.copy_(experts[: len(leaf.up)])
            leaf.router.zero_()

    def fill_lora(up: torch.Tensor) -> Any:
        def fill_one(leaf: Any) -> None:
            with torch.no_grad():
                leaf.A.copy_(numbers(2, 6, phase=0.1))
                leaf.B.copy_(up)

        return fill_one

    mixed = outputs(trimtab.TMoE(rank=2, alpha=3.0, experts=3, targets="0"), fill)
    torch.testing.assert_close(mixed, outputs(trimtab.LoRA(rank=2, alpha=3, targets="0"), fill_lora(experts.mean(0))))
    one = outputs(trimtab.TMoE(rank=2, alpha=3.0, experts=1, targets="0"), fill)
    torch.testing.assert_close(one, outputs(trimtab.LoRA(rank=2, alpha=3, targets="0"), fill_lora(experts[0])))


def test_the_authors_start_is_not_the_base() -> None:
    model, x = nn.Sequential(nn.Linear(768, 768)), torch.randn(50, 768, generator=torch.Generator().manual_seed(0))
    base = model(x)
    adapter = trimtab.attach(model, trimtab.TMoE(initial="bert", targets="0"))
    branch = (model(x) - base).norm() / base.norm()
    assert 0.02 < branch < 0.2  # about 8 % at this width
    for parameter in adapter.parts[0].leaves[0].down, adapter.parts[0].leaves[0].up:
        assert parameter.abs().max() <= 0.04
    assert trimtab.TMoE(initial="bert").promises().starts_at_base == "no"


def test_what_it_cannot_do_is_refused() -> None:
    model = linear(8, 6)
    adapter = trimtab.attach(model, trimtab.TMoE(rank=2, targets="0"))
    with pytest.raises(trimtab.AttachError, match="TMoE cannot be merged: its update depends on the input"):
        adapter.merge()
    with pytest.raises(trimtab.SettingError, match="own_compression must be off"):
        trimtab.attach(linear(8, 6), trimtab.TMoE(rank=2, shared_expert=True, own_compression=True))
    with pytest.raises(trimtab.TargetError, match="'0:weight', which is no linear map that is called"):
        trimtab.attach(nn.Sequential(nn.Conv2d(8, 8, 1)), trimtab.TMoE(rank=2, targets="0"))


def test_counts_are_those_of_the_card() -> None:
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=518, patch_size=14))
    assert trimtab.plan(model, trimtab.TMoE(rank=64, targets="attention | mlp")).trainable == 26_873_856


def test_it_learns_two_maps_for_two_kinds_of_tokens_that_lora_cannot() -> None:
    torch.manual_seed(0)
    kinds = torch.randint(0, 2, (256, 1)).double()
    x = torch.cat([torch.randn(256, 14, dtype=DOUBLE), kinds, 1 - kinds], dim=1)
    maps = [torch.randn(16, 2, dtype=DOUBLE) @ torch.randn(2, 16, dtype=DOUBLE) / 4 for _ in range(2)]
    weight = torch.randn(16, 16, dtype=DOUBLE) / 4
    target = x @ weight.t() + torch.where(kinds > 0, x @ maps[0].t(), x @ maps[1].t())

    def fitted(method: trimtab.Method) -> tuple[float, int]:
        model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
        with torch.no_grad():
            model[0].weight.copy_(weight)
        adapter = trimtab.attach(model, method, dtype=DOUBLE)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
        for _ in range(600):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
        return float(loss.detach()), adapter.trainable_count

    mixture, count = fitted(trimtab.TMoE(rank=4, experts=2, targets="0"))
    alone, larger = fitted(trimtab.LoRA(rank=8, targets="0"))
    assert count < larger
    assert mixture < 0.1 * alone
