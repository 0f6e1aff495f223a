"""Prefix tuning against huggingface/peft (PrefixTuningConfig), live: same tables, same logits, same training."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import trimtab
from golden.peft_prompts import (
    MOVED_POSITIONS,
    TASKS,
    VIRTUAL_TOKENS,
    Pair,
    largest_difference,
    make_pair,
    positions_after,
    train,
)
from zoo import ZOO

# peft 0.21 repeats its table for cross-attention in an order that gives every layer's self-attention the first pair of
# the table, and every cross-attention the second, which transformers 5 never reads.
TARGETS = {"t5": "re:decoder.*SelfAttention"}


def copy_prefix(table: Tensor, adapter: trimtab.Adapter) -> None:
    """peft's table is (l, layers · (key, value) · width)."""
    leaves = adapter.parts[0].leaves
    pairs = table.view(len(table), len(leaves), 2, -1)
    for number, leaf in enumerate(leaves):
        pair = 0 if leaf.site.path.startswith("decoder.") else number
        leaf.key.copy_(pairs[:, pair, 0])
        leaf.value.copy_(pairs[:, pair, 1])


def without_position_bias(model: nn.Module) -> None:
    """T5 adds a bias by distance to attention; peft's prefix takes part in it, ours carries no position."""
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.zeros_(parameter)


def make_prefixes(name: str) -> Pair:
    config = peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=VIRTUAL_TOKENS)
    method = trimtab.PrefixTuning(length=VIRTUAL_TOKENS, targets=TARGETS.get(name, "attention-core"))
    return make_pair(name, config, method, copy_prefix, without_position_bias)


def own_inputs(name: str, pair: Pair) -> dict[str, Tensor]:
    """peft moves the real tokens by l, which learned and rotary positions see; ours are told the same positions."""
    return pair.inputs | ({"position_ids": positions_after(VIRTUAL_TOKENS)} if name in MOVED_POSITIONS else {})


@pytest.mark.parametrize("name", TASKS)
def test_logits_are_those_of_peft(name: str) -> None:
    pair = make_prefixes(name)
    theirs, ours = pair.theirs(**pair.inputs), pair.ours(**own_inputs(name, pair))
    assert largest_difference(ours, theirs, pair.inputs) < 5e-6
    with pair.adapter.disabled():
        assert largest_difference(pair.ours(**own_inputs(name, pair)), theirs, pair.inputs) > 0.05


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_training_follows_peft(name: str) -> None:
    pair = make_prefixes(name)
    theirs = train(pair.theirs, [pair.table], pair.inputs)
    ours = train(pair.ours, list(pair.adapter.parameters()), own_inputs(name, pair))
    assert ours == pytest.approx(theirs, rel=1e-4)
    expected = make_prefixes(name)
    with torch.no_grad():
        copy_prefix(pair.table, expected.adapter)
        copy_gradients(pair.table.grad, expected.adapter)
    for found, wanted in zip(pair.adapter.parameters(), expected.adapter.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-2, atol=1e-4)


def copy_gradients(gradient: Tensor, adapter: trimtab.Adapter) -> None:
    values = [parameter.clone() for parameter in adapter.parameters()]
    copy_prefix(gradient, adapter)
    for parameter, value in zip(adapter.parameters(), values, strict=True):
        parameter.grad = parameter.detach().clone()
        parameter.copy_(value)


def test_gradients_of_a_decoder_sum_up_to_those_of_peft() -> None:
    pair = make_prefixes("t5")
    pair.theirs(**pair.inputs).loss.backward()
    pair.ours(**pair.inputs).loss.backward()
    leaves = pair.adapter.parts[0].leaves
    shared = pair.table.grad.view(VIRTUAL_TOKENS, len(leaves), 2, -1)[:, 0]
    torch.testing.assert_close(torch.stack([leaf.key.grad for leaf in leaves]).sum(0), shared[:, 0])
    torch.testing.assert_close(torch.stack([leaf.value.grad for leaf in leaves]).sum(0), shared[:, 1])


@pytest.mark.parametrize("name", TASKS)
def test_counts_are_those_of_peft(name: str) -> None:
    pair = make_prefixes(name)
    assert pair.adapter.trainable_count == pair.table.numel()


@pytest.mark.parametrize("name", MOVED_POSITIONS)
def test_positions_are_moved_by_peft_and_not_by_us(name: str) -> None:
    pair = make_prefixes(name)
    assert largest_difference(pair.ours(**pair.inputs), pair.theirs(**pair.inputs), pair.inputs) > 0.01


def test_an_encoder_has_a_prefix_of_its_own() -> None:
    """peft's seq-to-seq prefix leaves the encoder out; ours covers every attention unless targets say otherwise."""
    entry = ZOO["t5"](0, 0.0)
    paths = [row.site for row in trimtab.plan(entry.model, trimtab.PrefixTuning(length=VIRTUAL_TOKENS)).rows]
    assert sum(path.startswith("encoder.") for path in paths) == 2
    assert sum(path.startswith("decoder.") for path in paths) == 4
