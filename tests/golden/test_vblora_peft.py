"""VB-LoRA against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    reshaped,
    twins,
)

peft = pytest.importorskip("peft")

PLACES = ("linear", "transposed")  # 12 × 8, 6 × 12


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    logits = [(leaf.logits_A, layer.vblora_logits_A), (leaf.logits_B, layer.vblora_logits_B)]
    pairs = [reshaped(ours, theirs["default"]) for ours, theirs in logits]
    if leaf.site.path == PLACES[0]:  # the bank is shared; pair it once
        pairs.append(reshaped(leaf.shared("bank"), layer.vblora_vector_bank["default"]))
    return pairs


@pytest.mark.parametrize("top_k", [2, 3])
def test_vblora_trains_and_merges_as_in_peft(top_k: int) -> None:
    method = trimtab.VBLoRA(rank=3, vectors=7, vector_length=2, top_k=top_k, targets=" | ".join(PLACES))
    config = peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=2, topk=top_k, target_modules=list(PLACES))
    beside = beside_peft(method, config, PLACES, pairs_at)
    assert beside.adapter.trainable_count == 7 * 2 + 3 * 7 * ((12 + 8) + (6 + 12)) // 2
    assert_trains_and_merges_as_in_peft(beside, PLACES)


def test_the_start_is_drawn_as_in_peft() -> None:
    method = trimtab.VBLoRA(rank=4, vectors=256, vector_length=2, targets="linear")
    _, adapter, _ = twins(method)
    leaf, bank = leaf_at(adapter, "linear"), adapter.parts[0].shared("bank")
    assert 0.019 < float(bank.abs().max()) <= 0.02
    logits = torch.cat([leaf.logits_A.flatten(), leaf.logits_B.flatten()])
    assert logits.std().item() == pytest.approx(0.1, rel=4 / len(logits) ** 0.5)


def test_gradients_are_those_of_differences() -> None:
    method = trimtab.VBLoRA(rank=2, vectors=4, vector_length=4, bank_bound=0.5, targets="linear")
    assert_gradients_are_those_of_differences(method)


def test_a_width_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(
        trimtab.SettingError, match=r"VBLoRA: the width 8 of 'linear:weight' \(12×8\) is not a multiple of 5"
    ):
        twins(trimtab.VBLoRA(vector_length=5, targets="linear"))
