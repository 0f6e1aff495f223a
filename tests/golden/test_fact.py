"""FacT: figures of the authors' code for both forms, the formula, finite differences, counts, and that it learns."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, numbers, official

Form = Literal["tensor_train", "tucker"]
FORMS: tuple[Form, ...] = ("tensor_train", "tucker")


class Block(nn.Module):
    """Attention with a fused projection and a feed-forward part, without norms and residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)
        self.double()
        with torch.no_grad():
            for layer, phase in zip(self.children(), (0.3, 0.4, 0.5, 0.6), strict=True):
                layer.weight.copy_(numbers(*layer.weight.shape, phase=phase))
                layer.bias.copy_(numbers(*layer.bias.shape, phase=phase + 1.0))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = ((query @ key.mT) * 0.5).softmax(-1) @ value
        return self.fc2(F.gelu(self.fc1(self.proj(mixed.transpose(1, 2).flatten(2)))))


def fill(adapter: trimtab.Adapter, form: Form) -> dict[str, Tensor]:
    """Give the adapter's tensors the numbers of the stored run, and return them by the names there."""
    part = adapter.parts[0]
    named: dict[str, Any] = {"U": part.shared("U"), "V": part.shared("V")}
    if form == "tucker":
        named |= {"C": part.shared("C"), "P": part.shared("P")}
    else:
        named |= {site.path: leaf.core for site, leaf in zip(part.sites, part.leaves, strict=True)}
    phases = {"U": 0.1, "V": 0.2, "C": 0.8, "P": 0.9, "proj": 0.74, "fc1": 0.75, "fc2": 0.76}
    with torch.no_grad():
        for name, tensor in named.items():
            if name == "qkv":
                tensor.copy_(torch.cat([numbers(2, 2, phase=phase) for phase in (0.70, 0.71, 0.72)]))
            else:
                tensor.copy_(numbers(*tensor.shape, phase=phases[name]))
    return named


@pytest.mark.parametrize("form", FORMS)
def test_figures_are_those_of_the_authors_code(form: Form) -> None:
    model, theirs = Block(), official({"tensor_train": "fact_tt", "tucker": "fact_tk"}[form])
    method = trimtab.FacT(rank=2, form=form, scale=0.5, compat="official", targets="qkv | proj | fc1 | fc2")
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    named = fill(adapter, form)
    model.eval()
    output = model(numbers(2, 3, 8, phase=1.1))
    torch.testing.assert_close(output, theirs["output"], rtol=1e-8, atol=1e-8)
    output.square().sum().backward()
    assert {*named, "output"} == theirs.keys()
    for name, tensor in named.items():
        torch.testing.assert_close(tensor.grad, theirs[name], rtol=1e-7, atol=1e-6)


def blocks(leaf: Any, form: Form) -> Tensor:
    """ΔW block by block: V·Σ_ij·U."""
    site, U, V, r = leaf.site, leaf.shared("U"), leaf.shared("V"), leaf.method.rank
    rows = []
    for i in range(site.outputs):
        row = []
        for j in range(site.inputs):
            if form == "tensor_train":
                core = leaf.core[i * r : (i + 1) * r, j * r : (j + 1) * r]
            else:
                column = leaf.shared("P")[:, site.first + i * site.inputs + j]
                core = torch.einsum("pqk,k->qp", leaf.shared("C"), column)
            row.append(V @ core @ U)
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


class Layers(nn.Module):
    """Wide, tall, transposed, and one that is only read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.transposed, self.square = nn.Linear(12, 4), Conv1D(8, 4), nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.square(F.gelu(self.transposed(self.wide(x))))
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("form", FORMS)
def test_output_gradients_and_merge_are_those_of_the_formula(form: Form) -> None:
    model, bare = Layers().double(), Layers().double()
    x = numbers(2, 3, 12, phase=0.2).requires_grad_()
    targets = "wide | transposed | square | attention.out_proj"
    method = trimtab.FacT(rank=3, form=form, scale=1.5, dropout=0.0, targets=targets)
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-15)
    with torch.no_grad():
        for phase, parameter in enumerate(adapter.parameters()):
            parameter.copy_(numbers(*parameter.shape, phase=phase))
    changed = {}
    for site, leaf in zip(adapter.parts[0].sites, adapter.parts[0].leaves, strict=True):
        weight = bare.get_parameter(str(site).replace(":", "."))
        delta = 1.5 * blocks(leaf, form)
        changed[str(site).replace(":", ".")] = weight + (delta.t() if site.path == "transposed" else delta)
    output, expected = model(x), torch.func.functional_call(bare, changed, (x,))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    wanted = [x, *adapter.parameters()]
    theirs = torch.autograd.grad(expected.square().sum(), wanted)
    for ours, other in zip(torch.autograd.grad(output.square().sum(), wanted), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-9)
    adapter.merge()
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: Form) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    assert_finite_differences(trimtab.FacT(rank=2, form=form, dropout=0.0, targets="0 | 2"), model)


@pytest.mark.parametrize("form", FORMS)
def test_shared_factors_change_every_weight_and_dropout_acts_on_the_core_s_output(form: Form) -> None:
    model = Block()
    method = trimtab.FacT(rank=2, form=form, dropout=0.5, targets="qkv | proj | fc1 | fc2")
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    x = numbers(2, 3, 8, phase=1.1)
    model.train()
    assert torch.equal(model(x), model(x))  # V is zero: whatever is dropped is zero too
    fill(adapter, form)
    leaves: list[Any] = adapter.parts[0].leaves
    before = [leaf.method.delta(leaf).clone() for leaf in leaves]
    assert not torch.allclose(model(x), model(x))
    with torch.no_grad():
        adapter.parts[0].shared("U").add_(0.1)
    assert all(not torch.allclose(leaf.method.delta(leaf), was) for leaf, was in zip(leaves, before, strict=True))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(trimtab.TargetError, match="blocks of the smallest width, 4; '1:weight' of shape 6×4"):
        trimtab.attach(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6)), trimtab.FacT(rank=2, targets="0 | 1"))
    with pytest.raises(trimtab.SettingError, match=r"FacT\(rank=16\) is larger than the smallest width 8"):
        trimtab.attach(Block(), trimtab.FacT(targets="qkv"))
    with pytest.raises(trimtab.TargetError, match="'0:weight', which is no single linear map"):
        trimtab.attach(nn.Sequential(nn.Conv2d(8, 8, 1)), trimtab.FacT(rank=2, targets="0"))


@pytest.mark.parametrize(
    ("form", "rank", "count"), [("tensor_train", 16, 61_440), ("tucker", 32, 86_528), ("tucker", 16, 30_976)]
)
def test_counts_are_those_of_the_paper(form: Form, rank: int, count: int) -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    assert trimtab.plan(model, trimtab.FacT(rank=rank, form=form)).trainable == count


def test_it_learns_an_update_that_all_layers_share_with_fewer_numbers_than_lora() -> None:
    """Twelve layers whose updates share their two outer factors: 2·r·d + 12·r² numbers suffice."""
    torch.manual_seed(0)
    weights, U, V = torch.randn(12, 16, 16), torch.randn(2, 16) / 4, torch.randn(16, 2) / 4
    wanted = [weight + V @ torch.randn(2, 2) @ U for weight in weights]

    def fitted(method: trimtab.Method) -> tuple[float, int]:
        model = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in weights)
        with torch.no_grad():
            for layer, weight in zip(model, weights, strict=True):
                layer.weight.copy_(weight)
        adapter = trimtab.attach(model, method)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            losses = [F.mse_loss(layer(torch.eye(16)), target.t()) for layer, target in zip(model, wanted, strict=True)]
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach()), adapter.trainable_count

    shared, count = fitted(trimtab.FacT(rank=2, form="tensor_train", dropout=0.0, targets="re:.*"))
    apart, larger = fitted(trimtab.LoRA(rank=1, targets="re:.*"))
    assert count < larger
    assert shared < 0.01 * apart
