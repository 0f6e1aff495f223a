"""DoRA against peft (huggingface/peft, run live): the same tensors give the same outputs, gradients and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import (
    TOKENS,
    Pair,
    assert_same_training,
    leaf_at,
    randomise,
    reshaped,
    trainable_count,
    twins,
)

peft = pytest.importorskip("peft")

PLACES = ("embedding", "linear", "transposed", "plain")


def dora_pairs(adapter: trimtab.Adapter, wrapped: Any, place: str) -> list[Pair]:
    """Pair A, B and the magnitude."""
    layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
    if place == "embedding":
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    return [reshaped(leaf.A, A), reshaped(leaf.B, B), reshaped(leaf.magnitude, magnitude)]


def attached_twins(place: str, dropout: float = 0.0) -> tuple[Any, trimtab.Adapter, Any, list[Pair]]:
    """Return our model, its adapter, peft's, and their pairs with equal values far from the start."""
    model, adapter, bare = twins(trimtab.DoRA(rank=4, alpha=6, dropout=dropout, targets=place))
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=dropout, target_modules=[place])
    wrapped = peft.get_peft_model(bare, config)
    pairs = dora_pairs(adapter, wrapped, place)
    torch.testing.assert_close(pairs[2].ours, pairs[2].view(pairs[2].theirs), rtol=0, atol=1e-12)  # the start
    randomise(pair.theirs for pair in pairs)
    with torch.no_grad():
        pairs[2].theirs.abs_().add_(0.2)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped)
    return model, adapter, wrapped, pairs


@pytest.mark.parametrize("place", PLACES)
def test_dora_trains_as_in_peft(place: str) -> None:
    model, _, wrapped, pairs = attached_twins(place)
    assert_same_training(model, wrapped, pairs, tolerance=1e-11)


@pytest.mark.parametrize("place", PLACES)
def test_the_merged_weight_is_that_of_peft(place: str) -> None:
    model, adapter, wrapped, _ = attached_twins(place)
    wrapped.merge_adapter()
    adapter.merge()
    theirs = wrapped.base_model.model.get_submodule(place).get_base_layer().weight
    torch.testing.assert_close(model.get_submodule(place).weight, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", ["linear", "transposed", "plain"])
def test_dropout_acts_on_the_same_terms_as_in_peft(place: str) -> None:
    """Both draw their mask by torch's dropout, so the same seed drops the same numbers."""
    model, _, wrapped, pairs = attached_twins(place, dropout=0.4)
    outputs = []
    for network in (model, wrapped):
        network.train()
        torch.manual_seed(5)
        outputs.append(network(TOKENS))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-11)
    for pair in pairs:
        torch.testing.assert_close(pair.ours.grad, pair.view(pair.theirs.grad), rtol=0, atol=1e-11)
    model.eval()
    assert (model(TOKENS) - outputs[0]).abs().max() > 1e-3
