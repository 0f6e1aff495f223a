"""PiSSA and OLoRA against peft (huggingface/peft, run live): the same start, gradients and training.

peft writes the residual into its base; ours stays, so both models are the same function all along.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import TOKENS, Layers, Pair, assert_same_training, leaf_at, reshaped, trainable_count

peft = pytest.importorskip("peft")

METHODS = {"pissa": trimtab.PiSSA, "olora": trimtab.OLoRA}
PLACES = ["linear", "transposed"]


def wrapped_twins(
    start: str, place: str, alpha: float, rank_stabilized: bool
) -> tuple[Any, trimtab.Adapter, Any, list[Pair]]:
    """Our model in double precision, attached from its weights; peft's, decomposed in float32 as it must be."""
    method = METHODS[start](rank=4, alpha=alpha, rank_stabilized=rank_stabilized, targets=place)
    model = Layers()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        use_rslora=rank_stabilized,
        init_lora_weights=start,
        target_modules=[place],
        fan_in_fan_out=place == "transposed",
    )
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    adapter = trimtab.attach(model, method)
    layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
    pairs = [reshaped(leaf.A, layer.lora_A["default"].weight), reshaped(leaf.B, layer.lora_B["default"].weight)]
    return model, adapter, wrapped, pairs


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_pissa_starts_and_trains_as_in_peft(place: str, rank_stabilized: bool) -> None:
    model, adapter, wrapped, pairs = wrapped_twins("pissa", place, 6, rank_stabilized)
    assert adapter.trainable_count == trainable_count(wrapped)
    for pair in pairs:
        torch.testing.assert_close(pair.ours, pair.view(pair.theirs), rtol=1e-5, atol=1e-5)
    assert_same_training(model, wrapped, pairs, tolerance=2e-5)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_olora_starts_and_trains_as_in_peft(rank_stabilized: bool) -> None:
    model, adapter, wrapped, pairs = wrapped_twins("olora", "linear", 6, rank_stabilized)
    assert adapter.trainable_count == trainable_count(wrapped)
    for pair in pairs:
        torch.testing.assert_close(pair.ours, pair.view(pair.theirs), rtol=1e-5, atol=1e-5)
    assert_same_training(model, wrapped, pairs, tolerance=2e-5)


def test_olora_starts_with_orthonormal_columns() -> None:
    adapter = trimtab.attach(Layers(), trimtab.OLoRA(rank=4, targets="transposed | plain"))
    for leaf in adapter.leaves():
        torch.testing.assert_close(leaf.B.mT @ leaf.B, torch.eye(4).expand(*leaf.B.shape[:-2], 4, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["linear", "transposed", "plain", "grouped"])
def test_pissa_holds_the_leading_singular_values(place: str) -> None:
    model = Layers()
    rank = 2
    adapter = trimtab.attach(model, trimtab.PiSSA(rank=rank, alpha=3.0, targets=place))
    (leaf,) = adapter.leaves()
    residual = leaf.weight() - 3.0 / rank * leaf.B @ leaf.A  # what the paper leaves in the base
    expected = torch.linalg.svdvals(leaf.weight())[..., leaf.A.shape[-2] :]
    torch.testing.assert_close(
        torch.linalg.svdvals(residual)[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-5
    )


def test_the_randomised_start_is_near_the_exact_one_and_follows_the_seed() -> None:
    products = []
    for iterations, seed in ((None, 0), (16, 0), (16, 0)):
        method = trimtab.PiSSA(rank=3, power_iterations=iterations, targets="linear")
        torch.manual_seed(seed + len(products))  # the global generator plays no part
        adapter = trimtab.attach(Layers(), method, seed=seed)
        (leaf,) = adapter.leaves()
        products.append(leaf.B @ leaf.A)
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-4)
    assert torch.equal(products[1], products[2])


def test_the_start_is_the_base_bit_for_bit_and_the_base_is_not_edited() -> None:
    model = Layers()
    before, state = model(TOKENS), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in (trimtab.PiSSA(rank=4, targets="linear"), trimtab.OLoRA(rank=4, alpha=7.0, targets="linear")):
        adapter = trimtab.attach(model, method)
        assert torch.equal(model(TOKENS), before)
        adapter.detach()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
