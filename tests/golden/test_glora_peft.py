"""GLoRA against peft (huggingface/peft, run live)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    reshaped,
)

peft = pytest.importorskip("peft")

FORMS = [
    *itertools.product(("lora", "vector", "constant"), ("lora", "vector", "none"), ("vector", "constant", "none")),
    ("none", "vector", "vector"),
    ("none", "lora", "none"),
]


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    pairs = []
    for name in leaf.method.tensors(leaf.site):
        path = getattr(layer, f"glora_{name[0]}")["default"]
        theirs = {"up": "Xd", "down": "Xu"}.get(name[2:], "X")
        pairs.append(reshaped(getattr(leaf, name), getattr(path, theirs)))
    return pairs


@pytest.mark.parametrize(
    ("place", "pieces", "prompt", "bias"),
    [
        *(("linear", *form) for form in FORMS),
        ("head", "lora", "lora", "constant"),
        ("head", "vector", "none", "vector"),
    ],
)
def test_glora_trains_and_merges_as_in_peft(place: str, pieces: Any, prompt: Any, bias: Any) -> None:
    method = trimtab.GLoRA(rank=2, scale_and_add=pieces, prompt=prompt, bias_form=bias, targets=place)
    config = peft.GloraConfig(r=2, config_A_B=pieces, config_C=prompt, config_D_E=bias, target_modules=[place])
    beside = beside_peft(method, config, (place,), pairs_at)
    for pair in beside.pairs:
        assert bool(pair.ours.any()) == bool(pair.theirs.any())
    assert_trains_and_merges_as_in_peft(beside, (place,), spread=1.0)


def test_the_count_is_the_formula_s() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 3, bias=False))
    adapter = trimtab.attach(model, trimtab.GLoRA(rank=2, targets="0 | 1"))
    assert adapter.trainable_count == 2 * 2 * (12 + 8) + 2 * (8 + 1) + 2 + 2 * 2 * (12 + 3)


@pytest.mark.parametrize(("pieces", "prompt", "bias"), [("lora", "lora", "constant"), ("vector", "vector", "vector")])
def test_gradients_are_those_of_differences(pieces: Any, prompt: Any, bias: Any) -> None:
    method = trimtab.GLoRA(rank=2, scale_and_add=pieces, prompt=prompt, bias_form=bias, targets="linear")
    assert_gradients_are_those_of_differences(method)
