"""Prompt tuning against huggingface/peft (PromptTuningConfig), live: same prompt, same logits, same training."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor

import trimtab
from golden.peft_prompts import TASKS, VIRTUAL_TOKENS, Pair, largest_difference, make_pair, train
from zoo import VOCABULARY


def copy_prompt(table: Tensor, adapter: trimtab.Adapter) -> None:
    adapter.parts[0].leaves[0].P.copy_(table)


def make_prompts(name: str) -> Pair:
    config = peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=VIRTUAL_TOKENS)
    config.num_transformer_submodules = 1  # the default of two for T5 trains a second prompt that nothing reads
    return make_pair(name, config, trimtab.PromptTuning(length=VIRTUAL_TOKENS), copy_prompt)


@pytest.mark.parametrize("name", TASKS)
def test_logits_are_those_of_peft(name: str) -> None:
    pair = make_prompts(name)
    theirs, ours = pair.theirs(**pair.inputs), pair.ours(**pair.inputs)
    assert largest_difference(ours, theirs, pair.inputs) < 5e-6
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    with pair.adapter.disabled():
        assert largest_difference(pair.ours(**pair.inputs), theirs, pair.inputs) > 0.05


@pytest.mark.parametrize("name", TASKS)
def test_training_follows_peft(name: str) -> None:
    pair = make_prompts(name)
    theirs = train(pair.theirs, [pair.table], pair.inputs)
    ours = train(pair.ours, list(pair.adapter.parameters()), pair.inputs)
    assert ours == pytest.approx(theirs, rel=1e-4)
    prompt = next(pair.adapter.parameters())
    torch.testing.assert_close(prompt, pair.table, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prompt.grad, pair.table.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_counts_are_those_of_peft(name: str) -> None:
    pair = make_prompts(name)
    assert pair.adapter.trainable_count == pair.table.numel()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_that_of_peft(name: str) -> None:
    """peft starts from embeddings and returns the new tokens behind the given ones, as we do."""
    pair = make_prompts(name)
    torch.manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    theirs = pair.theirs.generate(input_ids=ids, **settings)
    ours = pair.ours.generate(ids, **settings)
    assert torch.equal(ours, theirs)
    with pair.adapter.disabled():
        assert not torch.equal(pair.ours.generate(ids, **settings), theirs)
