"""RepAdapter: figures of the authors' code with its merge, finite differences, counts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trimtab
from golden.weight_checks import DOUBLE, numbers, official


class Attention(nn.Module):
    """One fused projection of two heads, or three of their own."""

    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(8, 24, bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return self.proj(F.scaled_dot_product_attention(*parts))


class Block(nn.Module):
    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(8), nn.LayerNorm(8), Attention(fused, bias)
        self.mlp = nn.Sequential(nn.Linear(8, 16, bias=bias), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def model_of(fused: bool = True, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(fused, bias), Block(fused, bias)).double()


def fill(leaf: Any) -> None:
    with torch.no_grad():
        for tensor, phase in ((leaf.A, 0.1), (leaf.a, 0.2), (leaf.B, 0.3), (leaf.b, 0.4)):
            tensor.copy_(numbers(*tensor.shape, phase=phase))


def test_figures_are_those_of_the_authors_code() -> None:
    theirs = official("repadapter")
    model = model_of().eval()
    method = trimtab.RepAdapter(bottleneck=4, groups=2, scale=0.7, targets="feed-forward")
    leaf: Any = trimtab.attach(model, method, dtype=DOUBLE).parts[0].leaves[0]
    fill(leaf)
    x = numbers(2, 3, 8, phase=0.9).requires_grad_()
    output = leaf(x, None)
    output.square().sum().backward()
    ours = {"output": output, "x": x.grad, "A": leaf.A.grad, "a": leaf.a.grad, "B": leaf.B.grad, "b": leaf.b.grad}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-8, atol=1e-8)
    reader = nn.Linear(8, 6).double()
    with torch.no_grad():
        reader.weight.copy_(numbers(6, 8, phase=0.5))
        reader.bias.copy_(numbers(6, phase=0.6))
        model[0].mlp[0] = reader
        weight, bias = leaf.edits()
    torch.testing.assert_close(weight.value, theirs["merged_weight"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bias.value, theirs["merged_bias"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_starts_at_the_base_and_merges_exactly(fused: bool, bias: bool, groups: int) -> None:
    model, x = model_of(fused, bias).eval(), numbers(2, 3, 8, phase=0.9)
    base = model(x)
    adapter = trimtab.attach(model, trimtab.RepAdapter(bottleneck=4, groups=groups, scale=0.7), dtype=DOUBLE)
    assert len(adapter.parts[0].sites) == 4
    assert torch.equal(model(x), base)
    for leaf in adapter.parts[0].leaves:
        fill(leaf)
    output = model(x)
    assert (output - base).abs().max() > 0.1
    model.train()
    receipt = adapter.merge()  # in training mode: merging drops nothing
    assert bool(receipt.created) is not bias
    torch.testing.assert_close(model(x), output, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    torch.testing.assert_close(model.eval()(x), output, rtol=0, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    model = model_of().eval()
    adapter = trimtab.attach(model, trimtab.RepAdapter(bottleneck=2, targets="attention-core[0:1]"), dtype=DOUBLE)
    leaf: Any = adapter.parts[0].leaves[0]
    fill(leaf)
    x = numbers(1, 2, 8, phase=0.9).requires_grad_()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        names = ("A", "a", "B", "b")
        return torch.func.functional_call(leaf, dict(zip(names, values, strict=True)), (x, None))

    assert torch.autograd.gradcheck(call, (x, *(tensor.detach().requires_grad_() for tensor in leaf.parameters())))


def test_dropout_acts_on_the_hidden_numbers_in_training_alone() -> None:
    model, x = model_of(), numbers(2, 3, 8, phase=0.9)
    adapter = trimtab.attach(model, trimtab.RepAdapter(bottleneck=4, dropout=0.5), dtype=DOUBLE)
    for leaf in adapter.parts[0].leaves:
        fill(leaf)
    assert not torch.allclose(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(
        trimtab.SettingError, match=r"RepAdapter\(groups=3\) must divide the bottleneck 4 and the width"
    ):
        trimtab.attach(model_of(), trimtab.RepAdapter(bottleneck=4, groups=3))
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, vocab_size=32, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(trimtab.TargetError, match=r"'decoder.block.0.layer.1.EncDecAttention' has none \(its key and"):
        trimtab.attach(model, trimtab.RepAdapter())


def test_counts_are_those_of_the_card() -> None:
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig())
    assert trimtab.plan(model, trimtab.RepAdapter()).trainable == 239_808
    assert trimtab.plan(model, trimtab.RepAdapter(targets="attention-core")).trainable == 119_904


def test_it_learns() -> None:
    model, x = model_of().eval(), torch.randn(16, 3, 8, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    teacher = model_of().eval()
    there = trimtab.attach(teacher, trimtab.RepAdapter(bottleneck=2), dtype=DOUBLE)
    for leaf in there.parts[0].leaves:
        fill(leaf)
    target = teacher(x).detach()
    adapter = trimtab.attach(model, trimtab.RepAdapter(bottleneck=2, dropout=0.0), dtype=DOUBLE)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
