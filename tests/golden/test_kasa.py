"""KaSA: peft run live, the authors' penalty, the formula, finite differences, counts, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import trimtab
from golden.peft_models import Pair, assert_same_training, leaf_at, randomise, reshaped, trainable_count, twins
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, fit, linear, numbers, official
from test_weight_methods import PLACES

PLACES_OF_PEFT = ("linear", "head")  # tall (12 × 8), wide (3 × 4); peft refuses transposed weights


def test_it_trains_as_in_peft_and_has_its_penalty() -> None:
    peft = pytest.importorskip("peft")
    method = trimtab.KaSA(rank=2, alpha=3, beta=0.3, gamma=0.7, reduction="sum", targets=" | ".join(PLACES_OF_PEFT))
    model, adapter, bare = twins(method, torch.float32)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7), target_modules=list(PLACES_OF_PEFT)
    )
    wrapped = peft.get_peft_model(bare, config)
    pairs: list[Pair] = []
    for place in PLACES_OF_PEFT:
        layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
        pairs += [
            reshaped(leaf.A, layer.lora_A["default"].weight),
            reshaped(leaf.B, layer.lora_B["default"].weight),
            reshaped(leaf.diagonal, layer.lora_diag["default"]),
        ]
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped) == 2 * (8 + 12 + 1) + 2 * (4 + 3 + 1)
    ours, theirs = adapter.penalty(), wrapped.base_model._get_kasa_loss()
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(theirs, [pair.theirs for pair in pairs])
    for gradient, expected in zip(torch.autograd.grad(ours, [pair.ours for pair in pairs]), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    # Training asks for a binding, which takes the penalty; here the steps are those of an optimizer without it.
    adapter.bind(torch.optim.SGD(adapter.parameters(), lr=1.0), total_steps=1, penalty="loss")
    assert_same_training(model, wrapped, pairs, tolerance=2e-6)


def test_the_penalty_of_the_authors_code() -> None:
    """Its Grams are out × out and in × in; here the same value comes from those of r × r."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(7, 4)).double()
    method = trimtab.KaSA(rank=2, beta=0.3, gamma=0.7, compat="official", targets="0 | 1")
    adapter, theirs = trimtab.attach(model, method, dtype=DOUBLE), official("kasa_penalty")
    leaves: list[Any] = adapter.parts[0].leaves
    with torch.no_grad():
        for i, leaf in enumerate(leaves):
            for tensor, phase in ((leaf.A, 0.2), (leaf.B, 0.5), (leaf.diagonal, 0.8)):
                tensor.copy_(numbers(*tensor.shape, phase=phase + i))
    value = method.penalty(adapter.parts[0])
    assert value is not None
    torch.testing.assert_close(value, theirs["value"], rtol=1e-9, atol=0)
    wanted = {"A0": leaves[0].A, "B0": leaves[0].B, "d0": leaves[0].diagonal, "A1": leaves[1].A, "B1": leaves[1].B}
    for name, gradient in zip(wanted, torch.autograd.grad(value, list(wanted.values())), strict=True):
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-9)


def test_the_penalty_is_zero_and_smooth_where_the_factors_are_orthonormal() -> None:
    model = linear(6, 4)
    adapter = trimtab.attach(model, trimtab.KaSA(rank=2, beta=0.0, gamma=1.0, targets="0"), dtype=DOUBLE)
    leaf: Any = adapter.parts[0].leaves[0]
    with torch.no_grad():
        leaf.A.copy_(torch.eye(2, 4))
        leaf.B.copy_(torch.eye(6, 2))
    value = adapter.penalty()
    assert value is not None
    assert float(value.detach()) == 0.0
    for gradient in torch.autograd.grad(value, [leaf.A, leaf.B]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def truncated(weight: Tensor, kept: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[..., :kept] @ torch.diag_embed(S[..., :kept]) @ Vh[..., :kept, :]


@pytest.mark.parametrize("place", [place for place in PLACES if place != "embedding"])
def test_output_and_gradients_are_those_of_the_formula(place: str) -> None:
    def formula(leaf: Any, weight: Tensor) -> Tensor:
        kept = min(weight.shape[-2:]) - leaf.A.shape[-2]
        return truncated(weight, kept) + 1.5 * leaf.B @ torch.diag_embed(leaf.diagonal) @ leaf.A

    assert_formula(lambda at: trimtab.KaSA(rank=2, alpha=3, targets=at), formula, place, at_base=False)


def test_gradients_are_those_of_finite_differences() -> None:
    assert_finite_differences(trimtab.KaSA(rank=2, targets="0"))


@pytest.mark.parametrize(("shape", "dropped"), [((6, 4), 2), ((4, 4), 2), ((4, 5), 1), ((3, 8), 0)])
@pytest.mark.parametrize("compat", ["paper", "official"])
def test_the_start_is_the_truncated_model_and_disabling_gives_the_base(
    shape: tuple[int, int], dropped: int, compat: Any
) -> None:
    model, x = linear(*shape), numbers(5, shape[1], phase=0.9)
    base = model(x)
    adapter = trimtab.attach(model, trimtab.KaSA(rank=2, compat=compat, targets="0"), dtype=DOUBLE)
    dropped = 2 if compat == "paper" else dropped
    weight, bias = model[0].weight, model[0].bias
    kept = truncated(weight, min(shape) - dropped)
    torch.testing.assert_close(model(x), x @ kept.t() + bias, rtol=0, atol=1e-12)
    lost = torch.linalg.svdvals(weight)[min(shape) - dropped :].square().sum()
    torch.testing.assert_close((weight - kept).square().sum(), lost)
    assert (lost > 1e-3) == (dropped > 0)
    with adapter.disabled():
        assert torch.equal(model(x), base)


def test_dropout_acts_on_the_update_alone() -> None:
    model, x = linear(6, 4), numbers(400, 4, phase=0.9)
    adapter = trimtab.attach(model, trimtab.KaSA(rank=2, dropout=0.5, beta=0.0, gamma=0.0, targets="0"), dtype=DOUBLE)
    model.train()
    start = model(x)  # B is zero: nothing of the input is dropped
    with torch.no_grad():
        adapter.parts[0].leaves[0].B.fill_(0.3)
    torch.testing.assert_close(start, model.eval()(x) - (model(x) - start), rtol=0, atol=1e-12)
    dropped = model.train()(x) - start
    whole = model.eval()(x) - start
    assert not torch.allclose(dropped, whole)
    assert (dropped.mean() - whole.mean()).abs() < 0.2 * whole.abs().mean()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(trimtab.SettingError, match=r"KaSA\(rank=4\) would drop every singular value of '0:weight'"):
        trimtab.attach(linear(6, 4), trimtab.KaSA(rank=4, targets="0"))
    model = linear(6, 4)
    trimtab.attach(model, trimtab.KaSA(rank=2, targets="0"), name="one")
    with pytest.raises(trimtab.AttachError, match="not additive"):
        trimtab.attach(model, trimtab.KaSA(rank=2, targets="0"), name="two")


def test_counts_are_those_of_the_card() -> None:
    with torch.device("meta"):
        roberta = transformers.RobertaModel(transformers.RobertaConfig())
        config = transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=1000
        )
        llama = transformers.LlamaModel(config)
    assert trimtab.plan(roberta, trimtab.KaSA(rank=8, targets="query | value")).trainable == 295_104
    places = "*.q_proj | *.k_proj | *.v_proj | *.up_proj | *.down_proj"
    assert trimtab.plan(llama, trimtab.KaSA(rank=32, targets=places)).trainable == 56_628_224


def test_it_learns_on_a_noisy_base_what_lora_of_equal_rank_cannot() -> None:
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(32, 32, dtype=DOUBLE))
    clean = U[:, :28] @ torch.diag(torch.linspace(1.0, 0.5, 28, dtype=DOUBLE)) @ Vh[:28]
    weight = clean + 0.3 * U[:, 28:] @ Vh[28:]
    target = clean + 0.1 * torch.randn(32, 4, dtype=DOUBLE) @ torch.randn(4, 32, dtype=DOUBLE)
    _, end = fit(trimtab.KaSA(rank=4, beta=0.0, gamma=0.0, targets="0"), weight, target, 800)
    _, lora = fit(trimtab.LoRA(rank=4, targets="0"), weight, target, 800)
    assert end < 1e-6 < 1e-5 < lora
