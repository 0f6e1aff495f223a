"""The command line through its own entry: what each command gives, and the one clear error for each bad input."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

import trimtab as tt  # noqa: E402
import trimtab.cli.train as train_command  # noqa: E402
from trimtab.cli.console import program, time_text  # noqa: E402
from trimtab.cli.main import app, main  # noqa: E402
from trimtab.cli.settings import describe_settings, make_method  # noqa: E402
from trimtab.training.classification import Classification  # noqa: E402
from trimtab.training.heads import HEAD_LR_SCALE, default_learning_rate, with_fresh_head  # noqa: E402
from trimtab.training.metrics import accuracy_metrics  # noqa: E402
from trimtab.training.progress import Progress  # noqa: E402

WORDS = ["[PAD]", "[EOS]", "[BOS]", "[UNK]", "red", "green", "blue", "one", "two", "three", "is", "a", "colour"]
ROWS = [("red is a colour", "colour"), ("one is two", "number"), ("a green one", "colour"), ("three two one", "number")]


def save_tokenizer(folder: Path) -> None:
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)


def save_model(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24,
    )  # fmt: skip
    return transformers.BertModel(config)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny-bert", make_bert()))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=24, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=1
    )
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny-gpt2", transformers.GPT2LMHeadModel(config)))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny-t5"
    return str(save_model(folder, transformers.T5ForConditionalGeneration(config)))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_csv(tmp_path / "data.csv", ("text", "label"), ROWS * 5)


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    path.write_text("\n".join(",".join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    return str(path)


class Ended:
    """How a command line ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def document(self) -> Any:
        """What was printed on stdout as one JSON document."""
        assert self.status == 0, self.err
        return json.loads(self.out)


Trimtab = Callable[..., Ended]


@pytest.fixture
def trimtab(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trimtab:
    """Run a command line in a folder of its own, as the installed command does."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Ended(status, *capsys.readouterr())

    return run


def refused(ended: Ended, *parts: str) -> None:
    """One error on stderr that holds each part, status 2, and nothing on stdout."""
    assert (ended.status, ended.out) == (2, ""), ended.err
    assert ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err
    for part in parts:
        assert part in ended.err


def trained(trimtab: Trimtab, *arguments: object) -> Any:
    return trimtab("train", *arguments, "--json").document


SELDOM = ("--evaluate-every", "100", "--checkpoint-every", "100")  # only at the end: these runs have tiny epochs


# methods


def test_every_method_is_listed_with_kind_and_paper(trimtab: Trimtab) -> None:
    listed = {entry["name"]: entry for entry in trimtab("methods", "--json").document["methods"]}
    assert set(listed) == set(tt.methods())
    assert (listed["LoRA"]["kind"], listed["LoRA"]["paper"]) == ("weight", "arXiv 2106.09685")
    assert (listed["Compose"]["kind"], listed["BitFit"]["kind"]) == ("composition", "selection")
    assert (listed["PiSSA"]["kind"], listed["OFT"]["kind"]) == ("weight", "weight")  # by way of what several share
    assert listed["PromptTuning"]["capabilities"]["merge"] == "none"
    table = CliRunner().invoke(app, ["methods"])
    assert table.exit_code == 0
    assert all(name in table.stdout for name in tt.methods())


def test_one_method_shows_card_settings_and_ranges(trimtab: Trimtab) -> None:
    shown = trimtab("methods", "lora").out
    assert "ΔW = s·B·A" in shown
    assert "rank of the update" in shown
    assert "kaiming or gaussian" in shown
    found = {entry.name: entry for entry in describe_settings(tt.LoRA)}
    assert (found["rank"].type, found["rank"].default, found["rank"].range) == ("whole number", "8", "≥ 1")
    assert (found["alpha"].type, found["alpha"].default) == ("number or none", "none")
    assert found["dropout"].range == "≥ 0, ≤ 0.99"


def test_every_method_can_be_described() -> None:
    for cls in tt.methods().values():
        assert all(entry.name and entry.type for entry in describe_settings(cls)), cls


def test_a_misspelt_method_shows_the_nearest(trimtab: Trimtab) -> None:
    refused(trimtab("methods", "LoRAx"), "there is no method 'LoRAx'.", "Did you mean 'LoRA'")


# settings


def test_values_are_typed_by_the_method() -> None:
    method = make_method("LoRA", {"rank": "4", "alpha": "8", "rank_stabilized": "true", "initial": "gaussian"})
    assert method == tt.LoRA(rank=4, alpha=8.0, rank_stabilized=True, initial="gaussian")
    assert make_method("LoRA", {"alpha": "none", "targets": ["query", "value"]}) == tt.LoRA(targets=("query", "value"))
    parts = [{"name": "LoRA", "rank": 2}, {"name": "BitFit"}]
    assert make_method("Compose", {"methods": parts}) == tt.Compose(tt.LoRA(rank=2), tt.BitFit())


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rnak=8", "LoRA has no setting 'rnak'. Did you mean 'rank'?"),
        ("rank=eight", "LoRA(rank='eight'): expected a whole number, found 'eight'."),
        ("rank=0", "LoRA(rank=0): must be at least 1."),
        ("rank", "--set 'rank': write name=value, for example --set rank=8."),
        ("initial=kaimin", "LoRA(initial='kaimin'): choose one of kaiming, gaussian. Did you mean 'kaiming'?"),
        ("rank_stabilized=yes", "choose one of true, false."),
        ("dropout=1.5", "LoRA(dropout=1.5): must be at most 0.99."),
        ("rank=40", "rank"),
    ],
)
def test_wrong_settings_are_refused(trimtab: Trimtab, bert: str, assignment: str, message: str) -> None:
    refused(trimtab("plan", bert, "--method", "LoRA", "--set", assignment), message)


def test_the_version_is_shown(trimtab: Trimtab) -> None:
    assert trimtab("--version").out == f"{tt.__version__}\n"


def test_ctrl_c_is_answered_in_every_command(trimtab: Trimtab, bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.cli.plan.make_skeleton", mock.Mock(side_effect=KeyboardInterrupt))
    ended = trimtab("plan", bert, "--method", "LoRA")
    assert (ended.status, ended.err.strip()) == (130, "interrupted")


def test_a_setting_given_twice_or_as_a_flag_is_refused(trimtab: Trimtab, bert: str) -> None:
    refused(trimtab("plan", bert, "--method", "LoRA", "--set", "rank=2", "--set", "rank=3"), "'rank' is given twice")
    refused(
        trimtab("plan", bert, "--method", "LoRA", "--rank", "2"),
        "--rank",
        "'rank' is a setting of methods: --set rank=…",
    )


def test_flags_come_before_the_file(trimtab: Trimtab, bert: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[method]\nname = 'LoRA'\nrank = 2\ntargets = ['query', 'value']\n")
    plan = trimtab("plan", bert, "--config", "run.toml", "--json").document["plan"]
    assert {row["size"] for row in plan["rows"]} == {"2×16 16×2"}
    assert len(plan["rows"]) == 4
    plan = trimtab("plan", bert, "--config", "run.toml", "--set", "rank=1", "--json").document["plan"]
    assert {row["size"] for row in plan["rows"]} == {"1×16 16×1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[method\n", "run.toml: is not valid:"),
        ("[metod]\nname = 'LoRA'\n", "there is no section 'metod'. Did you mean 'method'?"),
        ("method = 'LoRA'\n", "'method' is a section of settings: write [method]."),
        ("[method]\nname = 'BitFit'\n", "--method LoRA, but the configuration describes BitFit"),
        ("[method]\nname = 3\n", "[method] name=3: write the name of a method"),
        ("[method]\nrank = 'x'\n", "LoRA(rank='x'): expected a whole number"),
        ("[train]\nlearning_rate = 1\n", "training has no setting 'learning_rate'."),
        ("[train]\nbatch_size = 'many'\n", "batch_size='many': expected int, found str."),
        ("[train]\nepochs = true\n", "epochs=True: expected float, found bool."),
        ("[train]\nepochs = 1\nsteps = 2\n", "give either steps or epochs"),
    ],
)
def test_wrong_files_are_refused(
    trimtab: Trimtab, bert: str, data: str, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "run.toml").write_text(text)
    refused(trimtab("train", bert, data, "--method", "LoRA", "--config", "run.toml"), message)
    assert not (tmp_path / "runs").exists()


def test_an_absent_file_is_refused(trimtab: Trimtab, bert: str) -> None:
    refused(
        trimtab("plan", bert, "--config", "no.toml"), "--config no.toml: cannot be read (No such file or directory)"
    )


# plan


def test_plan_counts_what_training_trains(trimtab: Trimtab, bert: str, data: str) -> None:
    planned = trimtab("plan", bert, "--method", "LoRA", "--task", "classification", "--labels", "2", "--json").document
    report = trained(trimtab, bert, data, "--method", "LoRA", "--steps", "2", "--output", "run")
    assert planned["plan"]["trainable"] == report["trainable"]
    assert planned["model_class"] == "BertForSequenceClassification"
    shown = trimtab("plan", bert, "--method", "LoRA", "--task", "classification").out
    assert "a new one is trained with the adapter (classifier.bias, classifier.weight)" in shown


def test_plan_reads_no_weights(trimtab: Trimtab, bert: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_bytes((Path(bert) / "config.json").read_bytes())
    plan = trimtab("plan", "empty", "--method", "LoRA", "--set", "rank=4", "--targets", "attention", "--json").document
    assert plan["plan"]["trainable"] == 2 * 4 * 4 * (16 + 16)


def test_sites_lists_places_and_roles(trimtab: Trimtab, bert: str) -> None:
    listed = trimtab("plan", bert, "--sites", "--json").document
    roles = {entry["place"]: entry["roles"] for entry in listed["places"]}
    assert {"all-linear", "attention", "query"} <= set(roles["encoder.layer.1.attention.self.query"])
    assert listed["roles"]["block"] == ["encoder.layer.0", "encoder.layer.1"]
    assert "encoder.layer.0.output.dense" in trimtab("plan", bert, "--sites").out


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ("atention", ("no module or role is called 'atention'.", "Did you mean 'attention'", "trimtab plan --sites")),
        ("convolution", ("this model has no part in the role 'convolution'",)),
        ("attention[0:9]", ("the model has the blocks 0 to 1, not 0 to 8",)),
    ],
)
def test_targets_that_match_nothing_are_refused(
    trimtab: Trimtab, bert: str, targets: str, parts: tuple[str, ...]
) -> None:
    refused(trimtab("plan", bert, "--method", "LoRA", "--targets", targets), *parts)


def test_plan_without_anything_to_plan_is_refused(trimtab: Trimtab, bert: str) -> None:
    refused(trimtab("plan", bert), "nothing to plan: give --method LoRA")
    refused(trimtab("plan", bert, "--sites", "--task", "clasification"), "Did you mean 'classification'?")


# the command line itself


def test_wrong_command_lines_show_the_nearest(trimtab: Trimtab, bert: str) -> None:
    refused(trimtab("trian"), "trian", "train")
    refused(trimtab("plan", bert, "--metod", "LoRA"), "--metod", "--method", "See: trimtab plan --help")
    refused(trimtab("train", bert, "d.csv", "--epochs", "three"), "--epochs", "a valid number")
    refused(trimtab("inspect"), "Missing argument")
    assert trimtab().status == 2


def test_help_names_every_command(trimtab: Trimtab) -> None:
    shown = trimtab("--help")
    assert shown.status == 0
    for name in ("methods", "plan", "train", "predict", "inspect", "merge", "export", "import"):
        assert f"  {name} " in shown.out


def test_only_the_main_process_prints(trimtab: Trimtab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert trimtab("methods").out == ""
    monkeypatch.setenv("RANK", "0")
    assert "LoRA" in trimtab("methods").out


# train and predict


def test_classification_from_data_to_prediction(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    ended = trimtab(
        "train", bert, data, "--method", "LoRA", "--set", "rank=4", "--lr", "0.02", "--epochs", "15", "--batch-size",
        "4", *SELDOM, "--validation", "0.2", "--output", "run",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    record = json.loads((tmp_path / "run/run.json").read_text())
    report = record["report"]
    assert report["metrics"]["values"]["accuracy"] == 1.0
    assert report["baseline"]["values"]["accuracy"] == 0.5
    assert report["new_head"] == ["classifier.bias", "classifier.weight"]
    # 12 linear layers in two blocks, the pooler, and the head
    lora = 2 * (4 * 4 * 32 + 2 * 4 * 48) + 4 * 32
    assert report["trainable"] == lora + 2 * 16 + 2
    for part in ("trained", "LoRA(rank=4) and a new head", "validation", "baseline", "time", "peak memory", "file"):
        assert part in ended.out
    for part in ("16 rows for train, 4 rows for validation", "step 1/60", "step 60/60", "loss", "left", "peak"):
        assert part in ended.err
    command = shlex.split(ended.out.strip().splitlines()[-1])
    assert command[:3] == ["trimtab", "predict", "run"]
    assert trimtab(*command[1:]).status == 0
    found = trimtab("predict", "run", "a green one", "three two one", "--json").document["predictions"]
    assert [entry["output"] for entry in found] == ["colour", "number"]
    assert all(0.5 < entry["probability"] <= 1 for entry in found)


def test_predictions_are_those_of_the_attached_model(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    trained(trimtab, bert, data, "--method", "BitFit", "--steps", "3", "--output", "run")
    config = {"num_labels": 2, "id2label": {0: "colour", 1: "number"}, "label2id": {"colour": 0, "number": 1}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, **config).eval()
    tt.load(model, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("a red one")["input_ids"]])).logits
    (found,) = trimtab("predict", "run", "a red one", "--json").document["predictions"]
    assert found["probability"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)
    write_csv(tmp_path / "texts.csv", ("text",), [("a red one",), ("two",)])
    rows = trimtab("predict", "run", "--file", "texts.csv", "--json").document["predictions"]
    assert rows[0] == pytest.approx(found)
    assert len(rows) == 2


def test_language_model(trimtab: Trimtab, gpt2: str, tmp_path: Path) -> None:
    rows = [(json.dumps({"prompt": "one", "completion": " two three"})) for _ in range(12)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows) + "\n")
    report = trained(
        trimtab, gpt2, "d.jsonl", "--task", "causal-lm", "--method", "FullTuning", "--steps", "60", "--lr", "0.02",
        *SELDOM, "--validation", "0.25", "--output", "run",
    )  # fmt: skip
    assert report["new_head"] == []
    assert report["metrics"]["values"]["loss"] < 0.2 < 1 < report["baseline"]["values"]["loss"]
    (found,) = trimtab("predict", "run", "one", "--max-new-tokens", "5", "--json").document["predictions"]
    assert found == {"text": "one", "output": "two three", "probability": None}
    refused(trimtab("predict", "run", "one", "--max-new-tokens", "24"), "leaves no room for a prompt")


def test_sequence_to_sequence(trimtab: Trimtab, t5: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "d.csv", ("source", "target"), [("red", "green"), ("one", "two")] * 6)
    report = trained(
        trimtab, t5, "d.csv", "--task", "seq2seq", "--method", "FullTuning", "--steps", "80", "--lr", "0.02",
        *SELDOM, "--validation", "0.25", "--output", "run",
    )  # fmt: skip
    assert report["metrics"]["values"]["exact_match"] == 1.0
    shown = trimtab("predict", "run", "red", "one")
    assert shown.out == "red → green\none → two\n"


def test_everything_may_come_from_a_file(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        "[method]\nname = 'Compose'\n"
        "methods = [{name = 'LoRA', rank = 2}, {name = 'BitFit', targets = 'bias - head'}]\n"
        f"[train]\nmodel = {bert!r}\ndata = {data!r}\nsteps = 2\nvalidation = 0.2\ncolumns = {{label = 'label'}}\n"
    )
    test = write_csv(tmp_path / "test.csv", ("text", "label"), ROWS[:3])
    report = trained(trimtab, "--config", "run.toml", "--test", test, "--output", "run")
    assert "LoRA(rank=2)" in report["method"]
    assert "BitFit" in report["method"]
    assert (report["evaluated_on"], report["metrics"]["rows"]) == ("test", 3)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["rows"] == {"train": 16, "validation": 4, "test": 3}
    assert record["settings"]["loop"]["steps"] == 2


def test_the_report_is_of_the_saved_state(
    trimtab: Trimtab, bert: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of the same accuracy: the lower loss decides, and the run says after which step it was."""
    losses = iter((0.9, 0.2, 0.5))
    monkeypatch.setattr(Classification, "evaluate", lambda *_: accuracy_metrics([0, 1], [0, 1], next(losses)))
    options = ("--method", "LoRA", "--steps", "3", "--evaluate-every", "1", "--output", "run")
    shown = trimtab("train", bert, data, *options).out
    assert "the state after step 2 of 3, the best on validation" in shown
    assert "loss 0.2000" in shown
    report = json.loads(Path("run/run.json").read_text())["report"]
    assert (report["saved_step"], report["steps"], report["metrics"]["values"]["loss"]) == (2, 3, 0.2)
    again = trimtab("train", "--resume", "--output", "run", "--json").document
    assert again["saved_step"] == 2


def test_the_last_state_is_saved_without_validation(trimtab: Trimtab, bert: str, data: str) -> None:
    shown = trimtab("train", bert, data, "--method", "LoRA", "--steps", "2", "--validation", "0", "--output", "run")
    assert "the state after step 2 of 2, the last" in shown.out


@pytest.mark.parametrize("option", ["--validation", "--test"])
def test_training_data_are_refused_for_figures(trimtab: Trimtab, bert: str, data: str, option: str) -> None:
    ended = trimtab("train", bert, data, "--method", "LoRA", option, "data.csv", "--output", "run")
    refused(
        ended, f"{option} {data}: holds the rows that are trained on, so its figures would", f"example {option} 0.1."
    )


def test_the_numbers_of_a_new_head_are_told_apart(trimtab: Trimtab, bert: str, data: str) -> None:
    ended = trimtab("train", bert, data, "--method", "LoRA", "--steps", "1", "--output", "run")
    assert "numbers, 34 of them the new head: " in ended.err
    assert "numbers, 34 of them the new head: " in ended.out
    planned = trimtab("plan", bert, "--method", "LoRA", "--task", "classification")
    assert "numbers are trained, 34 of them the new head (" in planned.out
    document = trimtab("plan", bert, "--method", "LoRA", "--json").document
    assert document["new_head_numbers"] == 0
    assert "of them" not in trimtab("plan", bert, "--method", "LoRA").out


def test_the_learning_rate_has_its_long_name(trimtab: Trimtab, bert: str, data: str) -> None:
    trained(trimtab, bert, data, "--method", "LoRA", "--steps", "1", "--learning-rate", "0.5", "--output", "run")
    assert json.loads(Path("run/run.json").read_text())["settings"]["loop"]["lr"] == 0.5
    refused(trimtab("train", bert, data, "--learning_rate", "1"), "Did you mean '--learning-rate'")


def test_the_learning_rate_follows_the_method() -> None:
    assert default_learning_rate(tt.LoRA()) == 1e-3
    assert default_learning_rate(tt.FullTuning()) == 5e-5
    assert default_learning_rate(tt.FullTuning(targets="head")) == 1e-3
    assert default_learning_rate(tt.Compose(tt.LoRA(), tt.FullTuning())) == 5e-5


def test_a_new_head_is_trained_whole_and_once() -> None:
    model = transformers.BertForSequenceClassification(make_bert().config)
    fresh = ("classifier.bias", "classifier.weight")
    head = tt.FullTuning(targets=("classifier:bias", "classifier:weight"), lr_scale=HEAD_LR_SCALE)
    assert with_fresh_head(model, tt.LoRA(), fresh) == tt.Compose(tt.LoRA(), head)
    assert with_fresh_head(model, tt.FullTuning(), fresh) == tt.FullTuning()
    assert with_fresh_head(model, tt.LoRA(), ()) == tt.LoRA()
    rest = tt.FullTuning(targets=("classifier:weight",), lr_scale=HEAD_LR_SCALE)
    assert with_fresh_head(model, tt.BitFit(), fresh) == tt.Compose(tt.BitFit(), rest)


# bad data and models


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "", "d.csv is empty; at least one row of data is needed."),
        ("d.csv", "text,label\n", "d.csv holds a header (text, label) but no rows"),
        ("d.csv", "text,label\nred,colour\none\n", "d.csv, line 3: found 1 field, but the header on line 1 has 2"),
        ("d.csv", "text,label\nred,colour\n,number\n" + "one,number\n" * 9, "d.csv, line 3: column 'text' is empty."),
        ("d.csv", "text,label\nred,colour\nblue,colour\n", "has the label 'colour'; at least two classes are needed"),
        ("d.csv", "text,kind\nred,colour\none,number\n", "which of them is the label cannot be told from the names"),
        ("d.jsonl", '{"text": "red", "label": "a"}\n{"text": \n', "d.jsonl, line 2: invalid JSON"),
        ("d.xml", "<a/>", "names no known format"),
    ],
)
def test_bad_data_is_refused(
    trimtab: Trimtab, bert: str, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    refused(trimtab("train", bert, name, "--method", "LoRA", "--output", "run"), message)
    assert not (tmp_path / "run").exists()


def test_absent_data_a_wrong_column_and_swapped_arguments_are_refused(trimtab: Trimtab, bert: str, data: str) -> None:
    refused(
        trimtab("train", bert, "dta.csv", "--method", "LoRA"), "no file or folder 'dta.csv'. Did you mean 'data.csv'"
    )
    refused(trimtab("train", bert, data, "--method", "LoRA", "--column", "label=lable"), "Did you mean 'label'?")
    refused(trimtab("train", bert, data, "--method", "LoRA", "--column", "lable=label"), "has no column 'lable'.")
    refused(trimtab("train", "data.csv", "--method", "LoRA"), "data.csv is data; give the model first")
    refused(trimtab("train", "--method", "LoRA"), "no model was given")
    refused(trimtab("train", bert, data), "no method was given; for example --method LoRA.")
    refused(
        trimtab("train", bert, data, "--method", "LoRA", "--task", "clasification"), "Did you mean 'classification'?"
    )
    refused(trimtab("train", bert, data, "--method", "LoRA", "--max-length", "99"), "has positions for 24 tokens")
    refused(trimtab("train", bert, data, "--method", "LoRA", "--precision", "float23"), "Did you mean 'float32'")
    refused(
        trimtab("train", bert, data, "--method", "LoRA", "--lr", "-1"), "--lr -1.0; it must be a number above 0 and"
    )
    refused(trimtab("train", bert, data, "--method", "LoRA", "--validation", "1.5"), "--validation 1.5; it is a share")


def test_a_label_unseen_in_training_is_refused(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "v.csv", ("text", "label"), [("red", "colour"), ("one", "numbr")])
    refused(
        trimtab("train", bert, data, "--method", "LoRA", "--validation", "v.csv"),
        "v.csv, line 3: the label 'numbr' does not occur in the training data", "nearest: 'number'",
    )  # fmt: skip


def test_a_missing_model_is_refused(trimtab: Trimtab, data: str) -> None:
    refused(trimtab("train", "./tiny-bret", data, "--method", "LoRA"), "there is no model folder './tiny-bret'.")


def test_a_missing_extra_names_the_way_to_install_it(
    trimtab: Trimtab, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(trimtab("train", bert, "d.parquet", "--method", "LoRA"), "'pyarrow'", "pip install 'trimtab[hf]'")


# the folder of a run


def test_a_run_is_never_overwritten_unasked(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    options = (bert, data, "--method", "LoRA", "--steps", "2", "--output", "run")
    trained(trimtab, *options)
    before = (tmp_path / "run/adapter.safetensors").read_bytes()
    refused(
        trimtab("train", *options, "--seed", "1"), "run holds a finished run. Give another --output, or --overwrite"
    )
    refused(trimtab("train", *options, "--resume", "--overwrite"), "give one of them")
    refused(trimtab("train", *options, "--overwrite", "--targets", "atention"), "Did you mean 'attention'")
    assert (tmp_path / "run/adapter.safetensors").read_bytes() == before
    again = trimtab("train", "--output", "run", "--resume", "--json")
    assert again.document["steps"] == 2
    assert "this run was finished before" in again.err
    (tmp_path / "run/notes.txt").write_text("mine")
    trained(trimtab, *options, "--seed", "1", "--overwrite")
    assert (tmp_path / "run/adapter.safetensors").read_bytes() != before
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_refused(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    options = ("train", bert, data, "--method", "LoRA", "--steps", "2", "--output")
    refused(trimtab(*options, data), "data.csv is a file; a run needs a folder of its own. Give another --output.")
    refused(trimtab(*options, f"{data}/run"), "cannot be written (Not a directory)")


def test_the_folder_has_a_telling_name(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    assert trained(trimtab, bert, data, "--method", "LoRA", "--steps", "2")["file"] == (
        "runs/tiny-bert-lora/adapter.safetensors"
    )


@contextmanager
def interrupting(step: int) -> Iterator[Callable[[Progress], None]]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    yield on_progress


def test_an_interrupted_run_goes_on_to_the_same_bits(
    trimtab: Trimtab, bert: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (bert, data, "--method", "LoRA", "--set", "dropout=0.1", "--steps", "8", "--output")
    unbroken = trained(trimtab, *options, "unbroken")
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "shown_progress", lambda: interrupting(3))
        stopped = trimtab("train", *options, "run")
    assert (stopped.status, stopped.out) == (130, "")
    assert "interrupted. The checkpoint is run/checkpoints/step-0000000" in stopped.err
    command = shlex.split(stopped.err.strip().splitlines()[-1])
    assert command == ["trimtab", "train", "--resume", "--output", "run"]
    refused(trimtab("train", *options, "run"), "was interrupted. Continue it with --resume")
    refused(trimtab("predict", "run", "red"), "holds a run that was interrupted; finish it with --resume")
    refused(trimtab(*command[1:], "--lr", "0.5"), "lr: 0.001 then, 0.5 now", "Leave these options out")
    refused(trimtab(*command[1:], "--method", "BitFit"), "leave --method out")
    resumed = trimtab(*command[1:], "--json").document
    assert 3 <= resumed["resumed_from"] < 8
    assert resumed["steps"] == 8
    assert resumed["metrics"] == unbroken["metrics"]
    assert tensors_of(tmp_path / "run") == tensors_of(tmp_path / "unbroken")


def test_resuming_needs_the_same_data(
    trimtab: Trimtab, bert: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "shown_progress", lambda: interrupting(2))
        assert trimtab("train", bert, data, "--method", "LoRA", "--steps", "9", "--output", "run").status == 130
    write_csv(Path(data), ("text", "label"), ROWS * 6)
    refused(trimtab("train", "--resume", "--output", "run"), "the run to resume is another one: rows:")
    refused(trimtab("train", "--resume"), "--resume needs --output")
    refused(trimtab("train", "--resume", "--output", "rnu"), "--resume: rnu holds no run")
    (tmp_path / "run/run.json").write_text("{")
    refused(trimtab("train", "--resume", "--output", "run"), "run.json: is not a readable description of a run")


def tensors_of(folder: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    return {name: tensor.tolist() for name, tensor in load_file(folder / "adapter.safetensors").items()}


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    options = [bert, data, "--method", "LoRA", "--steps", "30", "--checkpoint-every", "1", "--output", "run"]
    command = [sys.executable, "-m", "trimtab.cli", "train", *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run/checkpoints").glob("step-*/training.safetensors")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    out, err = process.communicate()
    assert (process.returncode, out) == (-signal.SIGKILL, ""), err
    noise = [line for line in err.splitlines() if not line.startswith(("step ", str(data), "LoRA()", "the checkpoint"))]
    assert noise == []
    resumed = trimtab("train", "--resume", "--output", "run", "--json").document
    assert 1 <= resumed["resumed_from"] < 30
    assert resumed["steps"] == 30
    assert trimtab("predict", "run", "red").status == 0


def test_a_full_disk_ends_in_one_error_and_loses_nothing(bert: str, data: str, tmp_path: Path) -> None:
    def limit_file_size() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    command = [sys.executable, "-m", "trimtab.cli", "train", bert, data, "--method", "LoRA", "--steps", "2"]
    ended = subprocess.run(
        [*command, "--output", "run"], cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT,
        preexec_fn=limit_file_size,
    )  # fmt: skip
    refused(Ended(ended.returncode, ended.stdout, ended.stderr), "cannot be written (File too large)")
    assert (tmp_path / "run/run.json").exists()
    assert not list(tmp_path.rglob("*.part"))


# adapter files


@pytest.fixture
def run(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> Path:
    trained(trimtab, bert, data, "--method", "LoRA", "--steps", "3", "--output", "run")
    return tmp_path / "run"


def test_inspect_needs_no_model(trimtab: Trimtab, run: Path) -> None:
    found = trimtab("inspect", "run", "--json").document
    assert found["size"] == (run / "adapter.safetensors").stat().st_size
    assert found["method"].startswith("Compose(methods=(LoRA(), FullTuning(")
    assert sum(torch.Size(entry["shape"]).numel() for entry in found["tensors"]) == found["numbers"]
    shown = trimtab("inspect", "run/adapter.safetensors").out
    assert f"{found['size']:,} bytes\n" in shown
    for part in ("base digest", "lineage", "versions", "1/classifier:bias/value", "float32"):
        assert part in shown


def test_a_damaged_adapter_is_refused(trimtab: Trimtab, bert: str, run: Path) -> None:
    file = run / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    refused(trimtab("inspect", "run"), "its bytes do not match their checksum; the file is damaged")
    refused(trimtab("predict", "run", "red"), "the file is damaged")
    refused(trimtab("merge", bert, "run", "merged"), "the file is damaged")
    file.write_bytes(content[:100])
    refused(trimtab("inspect", "run"), "is not a safetensors file, or is cut short")
    refused(trimtab("inspect", "rn"), "rn: cannot be read: No such file or directory")


def test_another_base_is_refused(trimtab: Trimtab, run: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", make_bert(seed=1))
    message = "was trained on another base model: the weights of"
    refused(trimtab("predict", "run", "red", "--model", other), message)
    refused(trimtab("merge", other, "run", "merged"), message)
    assert not (tmp_path / "merged").exists()
    assert trimtab("predict", "run", "red", "--model", other, "--accept-other-base").status == 0


def test_merged_models_give_what_the_adapter_gave(trimtab: Trimtab, bert: str, run: Path, tmp_path: Path) -> None:
    (expected,) = trimtab("predict", "run", "a red one", "--json").document["predictions"]
    merged = trimtab("merge", bert, "run", "merged", "--json").document
    assert len(merged["receipt"]["parameters"]) == 15
    assert merged["receipt"]["largest_difference"] < 1e-5
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        probabilities = model(torch.tensor([tokenizer("a red one")["input_ids"]])).logits.softmax(-1)[0]
    assert model.config.id2label[int(probabilities.argmax())] == expected["output"]
    assert probabilities.max().item() == pytest.approx(expected["probability"], rel=1e-4)
    refused(trimtab("merge", bert, "run", "merged"), "merged is not empty; a model is written to a new folder only.")
    refused(trimtab("merge", bert, "run", "run/run.json"), "is a file; give a new folder for the model")


def test_an_adapter_without_a_run_is_merged_into_the_model_as_saved(
    trimtab: Trimtab, gpt2: str, tmp_path: Path
) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
    adapter = tt.attach(model, tt.LoRA(targets="attention"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.1)
    adapter.save(tmp_path / "a.safetensors")
    shown = trimtab("merge", gpt2, "a.safetensors", "merged").out
    assert "read back and found equal" in shown
    assert "transformers.GPT2LMHeadModel.from_pretrained('merged')" in shown
    ids = torch.tensor([[4, 5, 6]])
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_adapters_are_merged_into_one_lora(trimtab: Trimtab, bert: str, data: str, tmp_path: Path) -> None:
    for name, method in (("first", "LoRA"), ("second", "DoRA")):
        trained(trimtab, bert, data, "--method", method, "--steps", "3", "--output", name)
    options = ("--into", "lora", "--rank", "16", "--add", "second", "--factors")
    shown = trimtab("merge", bert, "first", "both", *options, "0.25,0.75")
    assert "combined at 13 places in rank 16, 2 tensors averaged whole; relative error" in shown.out, shown.err
    assert "  adapter = trimtab.load(base, 'both')" in shown.out
    found = trimtab("merge", bert, "first", "again", *options, "0.25,0.75", "--json").document
    assert found["receipt"]["relative_error"] < 1e-4  # sixteen is the width
    refused(trimtab("merge", bert, "first", "new", *options, "1,1"), "is trained whole", "must sum to 1, found 2")
    refused(trimtab("merge", bert, "first", "new", *options, "1"), "--factors 1: give 2 numbers joined by commas")
    refused(trimtab("merge", bert, "first", "new", "--into", "lora"), "--into lora needs --rank")
    refused(trimtab("merge", bert, "first", "new", "--into", "lorra"), "Did you mean 'lora'")
    refused(trimtab("merge", bert, "first", "new", "--rank", "4"), "--rank is for adapters as one LoRA: give --into")
    refused(trimtab("merge", bert, "first", "both", *options, "0.5,0.5"), "both is not empty")
    assert not (tmp_path / "new").exists()


def test_a_merge_that_the_model_cannot_express_is_refused(trimtab: Trimtab, t5: str, tmp_path: Path) -> None:
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5)
    adapter = tt.attach(model, tt.SSF(targets="attention"))  # T5's projections have no bias
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    adapter.save(tmp_path / "a.safetensors")
    refused(trimtab("merge", t5, "a.safetensors", "merged"), "cannot be saved as an ordinary model", ".bias")
    assert not (tmp_path / "merged").exists()


def test_a_method_that_cannot_be_merged_is_refused(trimtab: Trimtab, bert: str, data: str) -> None:
    trained(trimtab, bert, data, "--method", "PrefixTuning", "--set", "length=2", "--steps", "2", "--output", "run")
    refused(trimtab("merge", bert, "run", "merged"), "PrefixTuning cannot be merged")


def test_exchange_with_peft(trimtab: Trimtab, gpt2: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "d.csv", ("text",), [("one two three",), ("red green blue",)] * 6)
    trained(trimtab, gpt2, "d.csv", "--task", "causal-lm", "--method", "LoRA", "--steps", "4", "--output", "run")
    shown = trimtab("export", gpt2, "run", "exported")
    assert "wrote 4 modules of rank 8 to exported; relative error" in shown.out, shown.err
    assert (tmp_path / "exported/adapter_config.json").is_file()
    imported = trimtab("import", gpt2, "exported", "imported", "--json").document
    assert imported["file"] == "imported/adapter.safetensors"
    models = [transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval() for _ in range(2)]
    for model, folder in zip(models, ("run", "imported"), strict=True):
        tt.load(model, tmp_path / folder)
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(models[1](ids).logits, models[0](ids).logits, rtol=1e-5, atol=1e-6)
    refused(trimtab("export", gpt2, "run", "exported"), "exported is not empty")
    refused(trimtab("import", gpt2, "exported", "imported"), "exists already and is left as it is")


def test_exchange_of_a_classifier_with_peft(trimtab: Trimtab, bert: str, run: Path, tmp_path: Path) -> None:
    shown = trimtab("export", bert, "run", "exported").out
    built = f"transformers.BertForSequenceClassification.from_pretrained({bert!r}, num_labels=2)"
    assert f"  base = {built}\n  model = peft.PeftModel.from_pretrained(base, 'exported')\n" in shown
    ended = trimtab("import", bert, "exported", "imported")
    assert f"  base = {built}\n  adapter = trimtab.load(base, 'imported')\n" in ended.out, ended.err

    def logits(folder: str) -> torch.Tensor:
        model = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
        tt.load(model, tmp_path / folder)
        return model(torch.tensor([[4, 5, 6]])).logits

    torch.testing.assert_close(logits("imported"), logits("run"), rtol=1e-5, atol=1e-6)
    assert trimtab("merge", bert, "imported", "merged").status == 0
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(torch.tensor([[4, 5, 6]])).logits, logits("run"), rtol=1e-5, atol=1e-6)
    peft = pytest.importorskip("peft")
    base = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    found = peft.PeftModel.from_pretrained(base, tmp_path / "exported").eval()(torch.tensor([[4, 5, 6]])).logits
    torch.testing.assert_close(found, logits("run"), rtol=1e-5, atol=1e-6)


def test_a_classifier_that_peft_wrote_is_imported(trimtab: Trimtab, bert: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "written")
    ended = trimtab("import", bert, "written", "imported")
    assert "from_pretrained(" in ended.out, ended.err
    assert "num_labels=3)" in ended.out


def test_an_import_names_the_task_that_it_misses(trimtab: Trimtab, bert: str, run: Path, tmp_path: Path) -> None:
    trimtab("export", bert, "run", "exported")
    file = tmp_path / "exported/adapter_config.json"
    config = json.loads(file.read_text())
    assert config["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    assert trimtab("import", bert, "exported", "asked", "--task", "classification").status == 0
    file.write_text(json.dumps(config | {"auto_mapping": None}))  # the head's name says it, too
    assert trimtab("import", bert, "exported", "named").status == 0
    file.write_text(json.dumps(config | {"auto_mapping": {"base_model_class": "BertModel"}}))
    ended = trimtab("import", bert, "exported", "imported")
    refused(ended, "this model has no module 'bert.encoder", "(`trimtab import`: give its --task)")
    refused(
        trimtab("import", bert, "exported", "imported", "--task", "clasification"), "Did you mean 'classification'?"
    )


def test_an_import_without_its_head_is_refused(trimtab: Trimtab, bert: str, run: Path, tmp_path: Path) -> None:
    trimtab("export", bert, "run", "exported")
    file = tmp_path / "exported/adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    weight, bias = "base_model.model.classifier.weight", "base_model.model.classifier.bias"
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if name != bias}, file)
    refused(trimtab("import", bert, "exported", "imported"), "does not hold 'classifier.bias', and", "trained head.")
    safetensors.torch.save_file({n: tensor for n, tensor in tensors.items() if n not in (weight, bias)}, file)
    refused(trimtab("import", bert, "exported", "imported"), "holds no head 'classifier' for a classification, and")
    assert not (tmp_path / "imported").exists()


# printing


def test_predict_wants_texts_or_a_file(trimtab: Trimtab, run: Path) -> None:
    refused(trimtab("predict", "run"), "give texts, or --file with the data that holds them; found neither.")
    refused(trimtab("predict", "run", "red", "--file", "d.csv"), "found both.")
    refused(trimtab("predict", "run", " "), "the command line, line 1: column 'text' is empty.")
    refused(trimtab("predict", "nowhere", "red"), "give the folder in which `trimtab train` left a run")


def test_durations_are_readable() -> None:
    assert [time_text(value) for value in (0.04, 59.94, 65, 3725)] == ["0.0 s", "59.9 s", "1 min 05 s", "1 h 02 min"]


@pytest.mark.parametrize(
    ("called", "printed"),
    [
        ("elsewhere/bin/trimtab", "elsewhere/bin/trimtab"),
        ("on-path/trimtab", "trimtab"),
        ("package/trimtab/cli/__main__.py", f"{sys.executable} -m trimtab.cli"),
    ],
)
def test_commands_to_copy_name_the_program_as_it_can_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: str, printed: str
) -> None:
    script = tmp_path / "on-path" / "trimtab"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == printed
