"""RandLoRA against peft (huggingface/peft, run live): bases, outputs, gradients, training and counts."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

import trimtab
from golden.peft_models import (
    Pair,
    assert_same_training,
    leaf_at,
    randomise,
    reshaped,
    trainable_count,
    twins,
)

peft = pytest.importorskip("peft")

PLACES = ("linear", "transposed", "head")  # tall (12 × 8), wide (6 × 12), wide (3 × 4)


def attached_twins(
    bases: Literal["dense", "sparse", "very_sparse"] = "dense", seed: int = 7
) -> tuple[Any, trimtab.Adapter, Any]:
    """Return our model, its adapter and peft's model over the same places, in float32 as peft keeps its bases."""
    method = trimtab.RandLoRA(
        rank=3, alpha=5, convention="peft", bases=bases, projection_seed=seed, targets=" | ".join(PLACES)
    )
    model, adapter, bare = twins(method, torch.float32)
    config = peft.RandLoraConfig(
        r=3,
        randlora_alpha=5,
        projection_prng_key=seed,
        sparse=bases == "sparse",
        very_sparse=bases == "very_sparse",
        target_modules=list(PLACES),
    )
    return model, adapter, peft.get_peft_model(bare, config)


def randlora_pairs(adapter: trimtab.Adapter, wrapped: Any) -> list[Pair]:
    """Pair Λ and Γ at each place."""
    pairs = []
    for place in PLACES:
        layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
        pairs.append(reshaped(leaf.Lambda, layer.randlora_lambda["default"]))
        pairs.append(reshaped(leaf.Gamma, layer.randlora_gamma["default"]))
    return pairs


@pytest.mark.parametrize("bases", ["dense", "sparse", "very_sparse"])
def test_the_bases_are_drawn_as_in_peft(bases: Literal["dense", "sparse", "very_sparse"]) -> None:
    _, adapter, wrapped = attached_twins(bases)
    A, B = wrapped.base_model.randlora_A["default"], wrapped.base_model.randlora_B["default"]
    (part,) = adapter.parts
    assert torch.equal(part.shared("A"), A[:, 0])
    assert torch.equal(part.shared("B"), B)
    assert part.shared("B").unique().numel() > (3 if bases == "dense" else 2)


def test_the_start_is_that_of_peft() -> None:
    _, adapter, wrapped = attached_twins()
    for pair in randlora_pairs(adapter, wrapped):
        torch.testing.assert_close(pair.ours, pair.view(pair.theirs), rtol=0, atol=0)


def test_randlora_trains_as_in_peft() -> None:
    model, adapter, wrapped = attached_twins()
    pairs = randlora_pairs(adapter, wrapped)
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped)
    for place in PLACES:
        leaf = leaf_at(adapter, place)
        theirs = wrapped.base_model.model.get_submodule(place).get_delta_weight("default")
        ours = leaf.site.layout.stored(leaf.method.delta(leaf), theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_same_training(model, wrapped, pairs, tolerance=2e-6)
