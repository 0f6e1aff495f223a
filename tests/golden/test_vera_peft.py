"""VeRA against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_starts_as_in_peft,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    reshaped,
)

peft = pytest.importorskip("peft")

PLACES = ("linear", "transposed", "head")  # 12 × 8, 6 × 12, 3 × 4
METHOD = trimtab.VeRA(rank=20, d_initial=0.2, projection_seed=7, targets=" | ".join(PLACES))
CONFIG = {"r": 20, "d_initial": 0.2, "projection_prng_key": 7, "target_modules": list(PLACES)}


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.d, layer.vera_lambda_d["default"]), reshaped(leaf.b, layer.vera_lambda_b["default"])]


def test_the_matrices_are_drawn_and_the_vectors_start_as_in_peft() -> None:
    beside = beside_peft(METHOD, peft.VeraConfig(**CONFIG), PLACES, pairs_at, torch.float32)
    for name, theirs in (("A", beside.wrapped.base_model.vera_A), ("B", beside.wrapped.base_model.vera_B)):
        assert torch.equal(beside.adapter.parts[0].shared(name), theirs["default"])
    assert_starts_as_in_peft(beside)


def test_vera_trains_and_merges_as_in_peft() -> None:
    beside = beside_peft(METHOD, peft.VeraConfig(**CONFIG), PLACES, pairs_at, torch.float32)
    assert_trains_and_merges_as_in_peft(beside, PLACES, tolerance=1e-5)


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.VeRA(rank=5, targets="linear"))


@pytest.mark.parametrize(("width", "layers", "rank", "count"), [(768, 12, 1024, 43_008), (1024, 24, 256, 61_440)])
def test_the_counts_are_those_of_the_paper(width: int, layers: int, rank: int, count: int) -> None:
    """RoBERTa-base and -large, query and value: the paper prints 0.043 and 0.061 million."""
    config = transformers.RobertaConfig(
        vocab_size=100, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.RobertaModel(config)
    assert trimtab.plan(model, trimtab.VeRA(rank=rank, targets="query | value")).trainable == count
