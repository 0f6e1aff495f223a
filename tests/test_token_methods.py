"""Prefixes and prompts: the mathematics of the attention tap, generation, checkpointing, and how inputs grow."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trimtab
from trimtab.kinds.tokens import AttentionCall
from zoo import BATCH, CLASSES, HEADS, HIDDEN, IGNORED_LABEL, LAYERS, LENGTH, VOCABULARY, ZOO, ZooModel

PREFIX = trimtab.PrefixTuning(length=3, deviation=1.0)
PROMPT = trimtab.PromptTuning(length=3)
GENERATORS = ["llama", "gpt2", "t5", "mixtral"]
METHODS = pytest.mark.parametrize("method", [PREFIX, PROMPT], ids=lambda method: type(method).__name__)


def moved(adapter: trimtab.Adapter) -> trimtab.Adapter:
    """The adapter away from its start, so that nothing agrees by chance."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return adapter


def attention_masks(queries: int, keys: int) -> dict[str, dict[str, Any]]:
    padding = torch.ones(2, 1, queries, keys, dtype=torch.bool)
    padding[1, :, :, :2] = False
    scores = torch.where(padding, torch.randn(2, 1, queries, keys).double(), -torch.inf)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "padding": {"attn_mask": padding},
        "causal and padding": {"attn_mask": padding & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)},
        "added scores": {"attn_mask": scores},
    }


def dense_scores(call: AttentionCall, key: Tensor, masked: bool) -> Tensor:
    """q·k/√d with the call's mask, (B, H, L, S)."""
    scores = call.query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
    if masked and call.is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if masked and call.attn_mask is not None:
        own = call.attn_mask
        scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
    return scores


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", attention_masks(1, 1))
def test_a_prefix_is_a_gated_parallel_adapter(mask: str, groups: int) -> None:
    """attn([P_k; K], [P_v; V]) = (1−λ)·attn(K, V) + λ·softmax(q P_kᵀ/√d) P_v (arXiv 2110.04366, equation 7)."""
    torch.manual_seed(0)
    heads, size, queries, keys, length = 4, 5, 6, 8, 3
    query = torch.randn(2, heads, queries, size).double()
    key, value = torch.randn(2, 2, groups, keys, size).double()
    call = AttentionCall(query, key, value, **attention_masks(queries, keys)[mask], enable_gqa=groups != heads)
    prefix_key, prefix_value = torch.randn(2, length, groups * size).double()

    repeat = heads // groups
    shaped = [
        t.view(length, groups, size).transpose(0, 1).repeat_interleave(repeat, 0) for t in (prefix_key, prefix_value)
    ]
    to_prefix = dense_scores(call, shaped[0], masked=False)
    to_tokens = dense_scores(call, key.repeat_interleave(repeat, 1), masked=True)
    mass = to_prefix.exp().sum(-1, keepdim=True)
    gate = mass / (mass + to_tokens.exp().sum(-1, keepdim=True))
    expected = gate * (to_prefix.softmax(-1) @ shaped[1])
    tokens = (to_tokens.softmax(-1) @ value.repeat_interleave(repeat, 1)).nan_to_num()  # a row that sees nothing
    expected = expected + (1 - gate) * tokens

    torch.testing.assert_close(call.prepend(prefix_key, prefix_value).run(), expected, rtol=1e-10, atol=1e-12)
    assert (gate > 0.01).any()


def test_even_a_zero_prefix_takes_attention_away() -> None:
    entry = ZOO["llama"](0, 0.0)
    base = entry.output()
    trimtab.attach(entry.model, trimtab.PrefixTuning(length=3, deviation=0.0))
    assert (entry.output() - base).abs().max() > 0.1


@METHODS
def test_two_adapters_are_one_with_both_tables(method: trimtab.Method) -> None:
    apart, joined = ZOO["llama"](0, 0.0), ZOO["llama"](0, 0.0)
    longer = type(method)(length=5)
    first = moved(trimtab.attach(apart.model, type(method)(length=2), name="first"))
    second = moved(trimtab.attach(apart.model, type(method)(length=3), name="second"))
    whole = trimtab.attach(joined.model, longer)
    with torch.no_grad():
        for one, two, both in zip(first.parameters(), second.parameters(), whole.parameters(), strict=True):
            both.copy_(torch.cat([one, two]))
    torch.testing.assert_close(apart.output(), joined.output(), rtol=1e-4, atol=1e-5)


# ---- generation ----


def generation_inputs(entry: ZooModel) -> dict[str, Tensor]:
    return {name: entry.inputs[name] for name in ("input_ids", "attention_mask")}


def generated(entry: ZooModel, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """Six new tokens for each row, with no early end."""
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    result = entry.model.generate(**inputs, **(length | settings))
    assert isinstance(result, Tensor)
    return result


@METHODS
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", GENERATORS)
def test_every_cache_generates_what_no_cache_does(name: str, beams: int, method: trimtab.Method) -> None:
    entry = ZOO[name](0, 0.0)
    inputs = generation_inputs(entry)
    base = generated(entry, inputs, num_beams=beams)
    adapter = moved(trimtab.attach(entry.model, method))
    uncached = generated(entry, inputs, num_beams=beams, use_cache=False)
    assert torch.equal(generated(entry, inputs, num_beams=beams), uncached)
    assert torch.equal(generated(entry, inputs, num_beams=beams, cache_implementation="static"), uncached)
    assert not torch.equal(uncached, base)
    assert uncached.shape == base.shape
    with adapter.disabled():
        assert torch.equal(generated(entry, inputs, num_beams=beams), base)


@METHODS
@pytest.mark.parametrize("name", GENERATORS)
def test_a_padded_row_generates_what_it_does_alone(name: str, method: trimtab.Method) -> None:
    entry = ZOO[name](0, 0.0)
    moved(trimtab.attach(entry.model, method))
    inputs = generation_inputs(entry)
    kept = inputs["attention_mask"][1].bool()
    assert not kept.all()
    alone = {key: value[1:2, kept] for key, value in inputs.items()}
    new = 6
    assert torch.equal(generated(entry, inputs)[1, -new:], generated(entry, alone)[0, -new:])


@METHODS
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generation_follows_the_logits(name: str, method: trimtab.Method) -> None:
    """Greedy generation is the argmax of the aligned logits, token by token."""
    entry = ZOO[name](0, 0.0)
    moved(trimtab.attach(entry.model, method))
    ids = entry.inputs["input_ids"][[0, 2]]
    expected = ids
    for _ in range(4):
        logits = entry.model(input_ids=expected).logits
        assert logits.shape[:2] == expected.shape
        logits[:, -1, 2] = -torch.inf  # no early end
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    result = generated(entry, {"input_ids": ids}, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(result, expected)


def test_generation_returns_what_it_returns_without_a_prompt() -> None:
    entry = ZOO["llama"](0, 0.0)
    inputs = generation_inputs(entry)
    settings = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True, "max_length": 11}
    base = entry.model.generate(**inputs, **settings)
    moved(trimtab.attach(entry.model, PROMPT))
    found = entry.model.generate(**inputs, **settings)
    assert found["sequences"].shape[0] == base["sequences"].shape[0] == 2 * BATCH
    assert found["sequences"].shape[1] <= 11
    assert torch.equal(found["sequences"][:, :LENGTH], inputs["input_ids"].repeat_interleave(2, 0))
    assert entry.model.generate(**inputs, max_length=11, min_length=11).shape[1] == 11


@torch.no_grad()
def test_steps_by_hand_go_on_behind_the_prompt() -> None:
    """A cache made by one forward, then a single token with a mask that does not count the prompt."""
    entry = ZOO["llama"](0, 0.0)
    moved(trimtab.attach(entry.model, PROMPT))
    ids, mask = entry.inputs["input_ids"][[0, 2]], torch.ones(2, LENGTH, dtype=torch.long)
    whole = entry.model(input_ids=ids, attention_mask=mask).logits[:, -1]
    first = entry.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    for extra in (
        {},
        {"attention_mask": mask},
        {"attention_mask": mask, "position_ids": torch.full((2, 1), LENGTH - 1)},
    ):
        cache = copy.deepcopy(first.past_key_values)
        step = entry.model(input_ids=ids[:, -1:], past_key_values=cache, **extra).logits
        torch.testing.assert_close(step[:, 0], whole, rtol=1e-4, atol=1e-5)


# ---- activation checkpointing ----


@METHODS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "mixtral"])
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool, method: trimtab.Method) -> None:
    entry = ZOO[name](0, 0.0)
    adapter = moved(trimtab.attach(entry.model, method))
    entry.model.train()
    entry.loss().backward()
    expected = [parameter.grad.clone() for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    entry.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        entry.model.enable_input_require_grads()
    entry.loss().backward()
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


# ---- refusals ----


def test_attention_that_cannot_be_tapped_is_an_error() -> None:
    entry = ZOO["llama"](0, 0.0)
    entry.model.set_attn_implementation("eager")
    trimtab.attach(entry.model, PREFIX)
    with pytest.raises(trimtab.AttachError) as caught:
        entry.output()
    assert str(caught.value) == (
        "the attention 'model.layers.0.self_attn' never called scaled_dot_product_attention, so PrefixTuning would do "
        "nothing. Load the model with attn_implementation='sdpa'."
    )


def test_torchs_own_attention_module_is_refused() -> None:
    entry = ZOO["torch_encoder"](0, 0.0)
    with pytest.raises(
        trimtab.TargetError, match=r"'encoder\.layers\.0\.self_attn' is an nn\.MultiheadAttention, whose"
    ):
        trimtab.attach(entry.model, PREFIX)


def test_a_model_without_token_ids_is_refused() -> None:
    entry = ZOO["tied_embedding"](0, 0.0)
    with pytest.raises(trimtab.TargetError, match=r"TiedEmbeddingModel\.forward has no 'input_ids'"):
        trimtab.attach(entry.model, PROMPT)


def test_two_prompts_in_generate_are_refused() -> None:
    entry = ZOO["llama"](0, 0.0)
    trimtab.attach(entry.model, PROMPT, name="first")
    second = trimtab.attach(entry.model, PROMPT, name="second")
    with pytest.raises(trimtab.AttachError, match="several prompts in front of one input, found 'first', 'second'"):
        generated(entry, generation_inputs(entry))
    second.active = False
    generated(entry, generation_inputs(entry))


def test_given_encoder_outputs_are_refused() -> None:
    entry = ZOO["t5"](0, 0.0)
    encoded = entry.model.get_encoder()(input_ids=entry.inputs["input_ids"])
    trimtab.attach(entry.model, PROMPT)
    with pytest.raises(trimtab.AttachError, match="whether the given encoder_outputs hold it cannot be told"):
        entry.model(encoder_outputs=encoded, labels=entry.inputs["labels"])


def test_a_mask_by_pairs_is_refused() -> None:
    entry = ZOO["llama"](0, 0.0)
    trimtab.attach(entry.model, PROMPT)
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    with pytest.raises(trimtab.AttachError, match=r"attention_mask of shape \(batch, tokens\), found \(3, 1, 7, 7\)"):
        entry.model(input_ids=entry.inputs["input_ids"], attention_mask=mask)


def test_an_embedding_that_is_not_used_is_an_error() -> None:
    entry = ZOO["gpt2"](0, 0.0)
    entry.model.transformer.unused = nn.Embedding(100, HIDDEN)
    trimtab.attach(entry.model, trimtab.PromptTuning(length=3, targets="unused"))
    with pytest.raises(trimtab.AttachError, match=r"'transformer\.unused' was never called with the input tokens"):
        entry.output()


# ---- how inputs grow ----


def by_embeddings(entry: ZooModel, prompt: Tensor, labels: Tensor | None) -> Any:
    """The base on embeddings with the prompt in front: what a prompt means."""
    ids, mask = entry.inputs["input_ids"], entry.inputs["attention_mask"]
    embedded = torch.cat([prompt.expand(BATCH, -1, -1), entry.model.get_input_embeddings()(ids)], dim=1)
    return entry.model(inputs_embeds=embedded, attention_mask=F.pad(mask, (len(prompt), 0), value=1), labels=labels)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "mixtral", "t5"])
def test_a_prompt_is_what_the_base_makes_of_longer_embeddings(name: str) -> None:
    entry, reference = ZOO[name](0, 0.0), ZOO[name](0, 0.0)
    adapter = moved(trimtab.attach(entry.model, PROMPT))
    labels = entry.inputs["labels"]
    if name in ("llama", "gpt2", "mixtral"):
        labels = F.pad(labels, (3, 0), value=IGNORED_LABEL)
    (prompt,) = adapter.parameters()
    found, expected = entry.model(**entry.inputs), by_embeddings(reference, prompt.detach(), labels)
    torch.testing.assert_close(found.loss, expected.loss)
    logits = expected.logits[:, 3:] if name in ("llama", "gpt2", "mixtral") else expected.logits
    torch.testing.assert_close(found.logits, logits)


def test_outputs_for_single_tokens_come_without_the_prompt() -> None:
    entry = ZOO["llama"](0, 0.0)
    trimtab.attach(entry.model, PROMPT)
    named = entry.model(**entry.inputs, output_hidden_states=True)
    assert named.logits.shape[1] == LENGTH
    assert {state.shape[1] for state in named.hidden_states} == {LENGTH}
    loss, scores = entry.model(**entry.inputs, return_dict=False)[:2]
    assert torch.equal(loss, named.loss)
    assert torch.equal(scores, named.logits)
    del entry.inputs["labels"]
    assert entry.model(**entry.inputs, logits_to_keep=2).logits.shape[1] == 2


def test_inputs_by_place_and_as_embeddings_are_the_same() -> None:
    entry = ZOO["llama"](0, 0.0)
    moved(trimtab.attach(entry.model, PROMPT))
    ids, mask = entry.inputs["input_ids"], entry.inputs["attention_mask"]
    expected = entry.output()
    assert torch.equal(entry.model(ids, mask).logits, expected)
    embedded = entry.model.get_input_embeddings()(ids)
    assert torch.equal(entry.model(inputs_embeds=embedded, attention_mask=mask).logits, expected)


def test_positions_move_with_the_prompt() -> None:
    entry = ZOO["gpt2"](0, 0.0)
    moved(trimtab.attach(entry.model, PROMPT))
    ids = entry.inputs["input_ids"]
    given = torch.arange(LENGTH).expand(BATCH, -1)
    assert torch.equal(entry.model(ids, position_ids=given).logits, entry.model(ids).logits)
    assert not torch.allclose(entry.model(ids, position_ids=given + 1).logits, entry.model(ids).logits)


def test_positions_given_to_a_padded_row_make_it_what_it_is_alone() -> None:
    entry = ZOO["llama"](0, 0.0)
    moved(trimtab.attach(entry.model, PROMPT))
    ids, mask = entry.inputs["input_ids"], entry.inputs["attention_mask"]
    kept = mask[1].bool()
    alone = entry.model(input_ids=ids[1:2, kept]).logits[0]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = entry.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1, kept]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_labels_of_a_decoder_are_its_own() -> None:
    """Labels as long as the encoder's input are no reason to pad them."""
    entry, shorter = ZOO["t5"](0, 0.0), ZOO["t5"](0, 0.0)
    moved(trimtab.attach(entry.model, PROMPT))
    moved(trimtab.attach(shorter.model, PROMPT))
    labels = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    entry.inputs["labels"], shorter.inputs["labels"] = labels, labels[:, :-1].contiguous()
    assert entry.output().shape[1] == LENGTH
    torch.testing.assert_close(entry.output()[:, :-1], shorter.output())


def test_spans_move_with_the_prompt() -> None:
    torch.manual_seed(0)
    encoder = ZOO["bert"](0, 0.0)
    encoder.model.config.num_labels = 2
    model = transformers.BertForQuestionAnswering(encoder.model.config).eval()
    inputs = {name: encoder.inputs[name] for name in ("input_ids", "attention_mask")}
    start, end = torch.tensor([1, 2, 0]), torch.tensor([3, 2, 6])
    trimtab.attach(model, PROMPT)
    output = model(**inputs, start_positions=start, end_positions=end)
    assert output.start_logits.shape == (BATCH, LENGTH)
    adapter = trimtab.adapters(model)["default"]
    with adapter.disabled():
        (prompt,) = adapter.parameters()
        embedded = torch.cat([prompt.expand(BATCH, -1, -1), model.get_input_embeddings()(inputs["input_ids"])], dim=1)
        mask = F.pad(inputs["attention_mask"], (3, 0), value=1)
        expected = model(inputs_embeds=embedded, attention_mask=mask, start_positions=start + 3, end_positions=end + 3)
    torch.testing.assert_close(output.loss, expected.loss)


def test_a_decoder_that_classifies_pools_at_the_last_real_token() -> None:
    """It looks for padding among the ids, which embeddings would have hidden from it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=HIDDEN, pad_token_id=0, eos_token_id=2, num_labels=CLASSES, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).eval()
    moved(trimtab.attach(model, PROMPT))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH)) * mask
    alone = model(input_ids=ids[1:2, :4]).logits
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[1:2], alone, rtol=1e-4, atol=1e-5)


def test_the_places_of_a_prompt_hold_an_id_without_meaning() -> None:
    for name in ("bert", "llama", "t5", "clip"):
        entry = ZOO[name](0, 0.0)
        site = trimtab.attach(entry.model, PROMPT).parts[0].sites[0]
        config = entry.model.config
        meanings = {config.get_text_config().pad_token_id, config.get_text_config().eos_token_id}
        assert site.placeholder not in meanings
        assert 0 <= site.placeholder < VOCABULARY


@pytest.mark.parametrize("initial", ["vocabulary", "uniform", "normal"])
def test_where_a_prompt_starts(initial: str) -> None:
    entry = ZOO["llama"](0, 0.0)
    method = trimtab.PromptTuning(length=16, initial=initial)
    (prompt,) = trimtab.attach(entry.model, method, seed=5).parameters()
    table = entry.model.get_input_embeddings().weight
    from_table = all(any(torch.equal(row, other) for other in table) for row in prompt)
    assert from_table == (initial == "vocabulary")
    if initial == "uniform":
        assert 0.45 < prompt.abs().max() <= 0.5
    if initial == "normal":
        assert abs(prompt.std().item() - 1.0) < 0.1


def test_counts() -> None:
    entry = ZOO["llama"](0, 0.0)
    assert trimtab.plan(entry.model, trimtab.PrefixTuning(length=7)).trainable == 2 * 7 * (HIDDEN // 2) * LAYERS
    assert trimtab.plan(entry.model, trimtab.PromptTuning(length=7)).trainable == 7 * HIDDEN


# ---- the network that makes a prefix ----

NETWORK = trimtab.PrefixTuning(length=3, hidden=16)


def test_what_a_prefix_network_trains_and_what_it_leaves(tmp_path: Path) -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = trimtab.attach(entry.model, NETWORK)
    inside, attentions = 3 * HIDDEN + (HIDDEN + 1) * 16, LAYERS
    assert adapter.trainable_count == inside + attentions * 2 * (16 + 1) * HIDDEN
    optimizer = torch.optim.Adam(adapter.parameter_groups(lr=0.01))
    adapter.bind(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        entry.loss().backward()
        optimizer.step()
    trained = entry.output().detach()
    adapter.save(tmp_path / "finished")
    adapter.save(tmp_path / "checkpoint", training=True)
    adapter.detach()

    finished = trimtab.load(entry.model, tmp_path / "finished")
    assert finished.method == trimtab.PrefixTuning(length=3)
    assert sum(parameter.numel() for parameter in finished.parameters()) == attentions * 2 * 3 * HIDDEN
    torch.testing.assert_close(entry.output(), trained, rtol=1e-6, atol=1e-6)
    finished.detach()

    resumed = trimtab.load(entry.model, tmp_path / "checkpoint", trainable=True)
    assert resumed.method == NETWORK
    assert torch.equal(entry.output(), trained)


def test_a_prefix_network_is_its_formula() -> None:
    entry = ZOO["t5"](0, 0.0)
    adapter = trimtab.attach(entry.model, NETWORK)
    leaf = adapter.parts[0].leaves[-1]
    inner = torch.tanh(leaf.shared("table") @ leaf.shared("inner_weight").t() + leaf.shared("inner_bias"))
    key, value = NETWORK.prefix(leaf)
    torch.testing.assert_close(key, inner @ leaf.key_weight.t() + leaf.key_bias)
    torch.testing.assert_close(value, inner @ leaf.value_weight.t() + leaf.value_bias)
    entry.loss().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_a_composition_drops_the_network_of_its_prefix(tmp_path: Path) -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = trimtab.attach(entry.model, trimtab.Compose(NETWORK, trimtab.LoRA(rank=2)))
    moved(adapter)
    expected = entry.output().detach()
    adapter.save(tmp_path)
    adapter.detach()
    loaded = trimtab.load(entry.model, tmp_path)
    assert loaded.method == trimtab.Compose(trimtab.PrefixTuning(length=3), trimtab.LoRA(rank=2))
    torch.testing.assert_close(entry.output(), expected, rtol=1e-5, atol=1e-6)
