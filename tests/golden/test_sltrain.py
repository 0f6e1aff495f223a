"""SLTrain: figures of the authors' code, the formula, finite differences, memory, counts, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, linear, numbers, official
from test_weight_methods import PLACES, perturb


@pytest.mark.parametrize("run", ["sltrain", "sltrain_trained_scale"])
def test_figures_are_those_of_the_authors_code(run: str) -> None:
    model, theirs, trained = linear(8, 6), official(run), run == "sltrain_trained_scale"
    method = trimtab.SLTrain(rank=2, alpha=5.0, density=0.25, train_scale=trained, targets="0")
    leaf: Any = trimtab.attach(model, method, dtype=DOUBLE).parts[0].leaves[0]
    assert leaf.index.shape == (12,)
    with torch.no_grad():
        leaf.index.copy_(torch.tensor([1, 4, 9, 13, 20, 22, 27, 31, 33, 38, 44, 47]))
        for tensor, phase in ((leaf.A, 0.1), (leaf.B, 0.2), (leaf.value, 0.3), (leaf.own_bias, 0.4)):
            tensor.copy_(numbers(*tensor.shape, phase=phase))
        if trained:
            leaf.scale.fill_(0.8)
    x = numbers(2, 3, 6, phase=0.9).requires_grad_()
    output = model(x)
    output.square().sum().backward()
    ours = {"output": output, "x": x.grad, "A": leaf.A.grad, "B": leaf.B.grad, "value": leaf.value.grad}
    ours |= {"bias": leaf.own_bias.grad} | ({"scale": leaf.scale.grad} if trained else {})
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-8, atol=1e-8)


def changed(leaf: Any, weight: Tensor, scale: float) -> Tensor:
    dense = scale * torch.einsum("...or,...ri->...oi", leaf.B, leaf.A)
    rows = zip(dense.reshape(-1, *weight.shape[-2:]), leaf.value.view(-1, leaf.value.shape[-1]),
               leaf.index.view(-1, leaf.index.shape[-1]), strict=True)  # fmt: skip
    sparse = [torch.sparse_coo_tensor(
        torch.stack([index.long() // weight.shape[-1], index.long() % weight.shape[-1]]), value, weight.shape[-2:]
    ).to_dense() for _, value, index in rows]  # fmt: skip
    return dense + torch.stack(sparse).view(weight.shape)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "embedding"])
@pytest.mark.parametrize("on_base", [False, True])
def test_output_and_gradients_are_those_of_the_formula(place: str, on_base: bool) -> None:
    def bias(leaf: Any, base: Tensor | None) -> Tensor | None:
        return base if on_base or base is None else leaf.own_bias

    assert_formula(
        lambda at: trimtab.SLTrain(rank=2, alpha=3.0, density=0.2, on_base=on_base, targets=at),
        lambda leaf, weight: (weight if on_base else 0) + changed(leaf, weight, 1.5),
        place,
        at_base=on_base,
        bias=bias if place != "experts" else None,
    )


@pytest.mark.parametrize("on_base", [False, True])
def test_gradients_are_those_of_finite_differences(on_base: bool) -> None:
    method = trimtab.SLTrain(rank=2, density=0.3, train_scale=True, on_base=on_base, targets="0")
    assert_finite_differences(method)


def test_nothing_as_large_as_the_weight_is_kept_for_backward() -> None:
    model = linear(16, 24)
    trimtab.attach(model, trimtab.SLTrain(rank=2, density=0.1, targets="0"), dtype=DOUBLE)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(numbers(3, 24, phase=0.1)).sum().backward()
    assert kept
    assert max(kept) < 16 * 24


def test_the_start_is_a_sparse_matrix_and_the_base_comes_back() -> None:
    model, x = linear(12, 10), numbers(4, 10, phase=0.9)
    base = model(x)
    adapter = trimtab.attach(model, trimtab.SLTrain(rank=3, density=0.1, targets="0"), dtype=DOUBLE)
    leaf: Any = adapter.parts[0].leaves[0]
    start = leaf.method.weight(leaf, leaf.weight())
    assert torch.count_nonzero(start) == 12
    assert start.abs().max() <= 10**-0.5
    assert len(leaf.index.unique()) == 12
    assert torch.equal(leaf.index, leaf.index.sort().values)
    assert leaf.index.dtype == torch.uint8
    torch.testing.assert_close(model(x), x @ start.t() + leaf.own_bias)
    assert not torch.allclose(model(x), base)
    adapter.detach()
    assert torch.equal(model(x), base)


def test_the_support_stays_and_is_saved(tmp_path: Path) -> None:
    model, x = linear(8, 6), numbers(4, 6, phase=0.9)
    adapter = trimtab.attach(model, trimtab.SLTrain(rank=2, density=0.2, targets="0"), seed=3)
    index = adapter.parts[0].leaves[0].index.clone()
    perturb(adapter)
    output = model(x)
    adapter.save(tmp_path)
    adapter.detach()
    loaded = trimtab.load(model, tmp_path)
    assert torch.equal(loaded.parts[0].leaves[0].index, index)
    assert torch.equal(model(x), output)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(
        trimtab.SettingError, match=r"SLTrain\(density=0.01\) selects none of the 48 entries of '0:weight'"
    ):
        trimtab.attach(linear(8, 6), trimtab.SLTrain(rank=2, density=0.01, targets="0"))


def test_counts_are_those_of_the_paper() -> None:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=32000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    plan = trimtab.plan(model, trimtab.SLTrain(rank=128, density=0.03, targets="attention | mlp"))
    full = 2 * 32000 * 512 + 17 * 512
    assert round((plan.trainable + full) / 1e6, 2) == 43.53


def test_it_learns_a_sparse_addition_that_a_low_rank_cannot() -> None:
    torch.manual_seed(0)
    sparse = torch.zeros(32, 32, dtype=DOUBLE)
    support = torch.randperm(1024)[:51].sort().values
    sparse.view(-1)[support] = torch.randn(51, dtype=DOUBLE)
    target = torch.randn(32, 2, dtype=DOUBLE) @ torch.randn(2, 32, dtype=DOUBLE) / 2 + sparse

    def fitted(rank: int, density: float) -> float:
        model = linear(32, 32, bias=False)
        method = trimtab.SLTrain(rank=rank, alpha=None, density=density, targets="0")
        adapter = trimtab.attach(model, method, dtype=DOUBLE)
        with torch.no_grad():
            adapter.parts[0].leaves[0].index.copy_(support[: int(density * 1024)])
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
        for _ in range(1200):
            optimizer.zero_grad()
            loss = F.mse_loss(model(torch.eye(32, dtype=DOUBLE)), target.t())
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert fitted(2, 0.05) < 1e-6 < 1e-3 < fitted(4, 0.001)


@pytest.mark.slow
def test_a_small_language_model_trained_from_scratch_is_better_than_with_a_low_rank_alone() -> None:
    text = torch.randint(0, 32, (64, 17), generator=torch.Generator().manual_seed(0))
    text[:, 1:] = (3 * text[:, :-1] + 7) % 32  # each token is a function of the one before
    text[:, 2::2] = text[:, :-2:2]

    def loss_after_training(density: float) -> float:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=32
        )
        model = transformers.LlamaForCausalLM(config)
        method = trimtab.SLTrain(rank=2, alpha=None, density=density, targets="attention | mlp")
        rest = trimtab.FullTuning(targets="embedding | norm | head")
        adapter = trimtab.attach(model, trimtab.Compose(method, rest))
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
        for leaf in adapter.parts[0].leaves if density < 0.01 else ():
            torch.nn.init.uniform_(leaf.B, -(0.5**0.5), 0.5**0.5)  # without S, B = 0 would never learn
        for _ in range(80):
            optimizer.zero_grad()
            loss = model(input_ids=text, labels=text).loss
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert loss_after_training(0.1) < 0.9 * loss_after_training(0.001)
