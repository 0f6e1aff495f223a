"""Random command lines, run files and data files; and what must hold for each: a result, or one clear error.

Commands and options are read off the program itself, so that new ones join by existing. `trimtab demo` trains for
minutes and is left out here.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
import typer
from hypothesis import strategies as st

import trimtab as tt
from random_settings import BROKEN_TARGETS, ROLES
from trimtab.cli.main import app, main
from trimtab.training.data import read_table
from trimtab.training.errors import DataError
from trimtab.training.run_settings import option_types

WORDS = ("[PAD]", "[EOS]", "[UNK]", "red", "green", "blue", "one", "two", "three")
ROWS = (("red green", "colour"), ("one two", "number"), ("blue", "colour"), ("three two one", "number"))
OFFLINE = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
COMMANDS: dict[str, Any] = {
    name: command
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if name != "demo"
}
# Values that mean a run which never ends, or a look at the network, are no mistakes and are not drawn.
VALUES: dict[str, tuple[str, ...]] = {
    "model": ("bert", "bert", "bert", "./bert", "brt", "run", "data.csv", ".", "", "./none"),
    "data": ("data.csv", "data.csv", "./data.csv", "dta.csv", ".", "bert", "broken.csv", "empty.jsonl", ""),
    "method": ("LoRA", "BitFit", "lora", "FullTuning", "IA3", "LRA", "", "Compose", "é", *tt.methods()),
    "settings": ("rank=2", "rank=2", "rank=0", "rnak=2", "rank", "=", "rank=", "rank=two", "rank=9" + "9" * 5000,
                 "alpha=nan", "alpha=none", "alpha=1e999", "dropout=-0", "targets=query", "methods=LoRA,BitFit",
                 "methods=Nothing", "initial=gausian", "rank_stabilized=yes", "length=1", "bottleneck=2"),
    "targets": (*ROLES, *BROKEN_TARGETS[:-4], "query, value"),
    "task": ("classification", "causal-lm", "seq2seq", "clasification", ""),
    "columns": ("label=label", "text=text", "lable=label", "label=lable", "label", "=", "label=", "labels=x"),
    "validation": ("0.25", "0.25", "0", "data.csv", "1", "-1", "nan", "inf", "0.0001", "0.9999", "no.csv", "", "١"),
    "test": ("0", "0.25", "data.csv", "1", "nan", "1e-300", "-0.0"),
    "split": ("train", "test", ""),
    "data_config": ("default", ""),
    "delimiter": (",", ",", ";", "", ",,", "\n", '"', "é", "\t", "\\t", "a"),
    "header": ("text,label", "text,label", "label,text", "text", "", ",", "text,text", "a,b,c"),
    "max_length": ("8", "8", "1", "2", "0", "-1", "99", "x", "9" * 30, "1.5"),
    "precision": ("auto", "float32", "bfloat16", "float16", "float23", "int8", ""),
    "lr": ("1e-3", "1e-3", "0", "-1", "nan", "inf", "1e308", "1e-320", "x", ""),
    "epochs": ("0.01", "0.01", "0", "-1", "nan", "inf", "1.7e308", "x"),
    "steps": ("1", "1", "2", "0", "-1", "1.5", "x", ""),
    "batch_size": ("2", "2", "1", "0", "-3", "9" * 30, "x"),
    "accumulation": ("1", "2", "0", "-1", "9" * 30, "x"),
    "weight_decay": ("0", "0.1", "-1", "nan", "1e308", "x"),
    "warmup": ("0", "0.5", "1", "-0.1", "nan", "x"),
    "schedule": ("linear", "cosine", "constant", "linaer", ""),
    "clip": ("1", "none", "0", "-1", "nan", "inf", "1e308", "x", ""),
    "seed": ("0", "7", "-1", "9" * 15, "9" * 19, "9" * 30, "x", "1.0"),
    "evaluate_every": ("1", "5", "0", "-1", "9" * 30),
    "checkpoint_every": ("1", "5", "0", "-1", "9" * 30),
    "config": ("run.toml", "broken.toml", "no.toml", ".", "data.csv"),
    "output": ("new", "new", "new/deeper", "run", "data.csv", "data.csv/new", "new.safetensors", "n" * 300, ""),
    "labels": ("2", "3", "1", "0", "-1", "x", "9" * 4),
    "into": ("lora", "lora", "lorra", ""),
    "add": ("run", "adapter.safetensors", "nowhere", "data.csv"),
    "factors": ("0.5,0.5", "1", "1,-1", "nan,1", "x", "", ","),
    "rank": ("1", "2", "0", "-1", "x", "9" * 30),
    "file": ("run", "run/adapter.safetensors", "adapter.safetensors", "data.csv", "nowhere", ".", "bert", "no\nfile"),
    "folder": ("new", "exported", "run", "data.csv", "bert", "", "."),
    "run": ("run", "run", "bert", ".", "nowhere", "data.csv", ""),
    "texts": ("red one", "", " ", "x" * 3000, "\udcff", "-", "é\u0000".strip("\0")),
    "column": ("text", "label", "txt", ""),
    "max_new_tokens": ("1", "0", "-1", "99", "9" * 30),
    "name": ("LoRA", "lora", "LRA", "", "é"),
}  # fmt: skip


@cache
def workplace() -> Path:
    """A folder with a tiny model, data, a run and its adapter; tests work on copies of it."""
    folder = Path(tempfile.mkdtemp(prefix="trimtab-command-lines-"))
    torch.manual_seed(0)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "bert")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder / "bert")
    lines = ["text,label", *(",".join(row) for row in ROWS * 3)]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    (folder / "broken.csv").write_text('text,label\nred,"colour\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "run.toml").write_text('[method]\nname = "LoRA"\nrank = 2\n[train]\nsteps = 1\nmodel = "bert"\n')
    (folder / "broken.toml").write_text("[method\n")
    model = transformers.BertModel.from_pretrained(folder / "bert")
    tt.attach(model, tt.LoRA(rank=2, targets="query")).save(folder / "adapter.safetensors")
    with inside(folder):
        ended = run(["train", "bert", "data.csv", "--method", "LoRA", "--steps", "1", "--output", "run"])
        assert ended.status == 0, ended.err
        ended = run(["export", "bert", "adapter.safetensors", "exported"])
        assert ended.status == 0, ended.err
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    status: int
    out: str
    err: str


def run(arguments: list[str]) -> Ended:
    """Run one command line in this process, through the entry that the installed command has, without a network."""
    out, err, typed = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("red one\n")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), OFFLINE:
            status = main(arguments)
    finally:
        sys.stdin = typed
    return Ended(status, out.getvalue(), err.getvalue())


def check(arguments: list[str]) -> str:
    """Run a command line in a copy of the workplace; returns 'done' or 'refused'. Everything else fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "here"
        shutil.copytree(workplace(), folder)
        with inside(folder):
            ended = run(arguments)
    assert "Traceback" not in ended.err
    if ended.status == 0:
        assert ended.out
        return "done"
    assert ended.status == 2, ended
    assert ended.err.count("error: ") == 1, ended.err
    assert len(ended.err.partition("error: ")[2].strip()) > 10
    return "refused"


def check_run_file(text: str) -> str:
    """Train a step by the run file of this text, in a copy of the workplace."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(text, encoding="utf-8")
        return check(["train", "--config", str(file), "--steps", "1", "--output", "new"])


# what is drawn


@st.composite
def command_lines(draw: st.DrawFn, command: str) -> list[str]:
    """A command line of `command`: its arguments, some of its options, seldom a word too many."""
    given: list[str] = []
    for param in COMMANDS[command].params:
        option = _option(param)
        if option is None:
            given.append(draw(_value(command, param.name)))
        elif param.name != "help" and draw(st.integers(0, 9)) < _TIMES_OF_TEN.get((command, param.name), 1):
            given += [option] if param.is_flag else [option, draw(_value(command, param.name))]
    given += draw(st.sampled_from(((),) * 30 + (("extra",), ("--nothing",), ("--", "-x"))))
    short = ["--steps", "1"] if command == "train" and not {"--steps", "--epochs", "--config"} & {*given} else []
    return [command, *given, *short]


def _value(command: str, name: str) -> st.SearchStrategy[str]:
    """A value of an argument or option: the first one, which is right, four times in five."""
    values = _values(command, name)
    return st.sampled_from(values[:1] * 4 * len(values) + values)


def _values(command: str, name: str) -> tuple[str, ...]:
    return ("exported", *VALUES[name]) if (command, name) == ("import", "folder") else VALUES[name]


def single_values(command: str) -> Iterator[list[str]]:
    """Command lines that are right but perhaps for one value: every one of every argument and option in turn."""
    params = [param for param in COMMANDS[command].params if param.name != "help"]
    right = {param.name: _values(command, param.name)[0] for param in params if not _option(param)}
    needed = [("--method", "LoRA")] * (command in ("train", "plan")) + [("--steps", "1")] * (command == "train")
    for param in params:
        option = _option(param)
        flag = option is not None and param.is_flag
        for value in ("",) if flag else dict.fromkeys(_values(command, param.name)):
            given = right if option else right | {param.name: value}
            chosen = [] if option is None else [option] if flag else [option, value]
            pairs = [pair for pair in needed if pair[0] != option and (pair[0], option) != ("--steps", "--epochs")]
            yield [command, *given.values(), *(word for pair in pairs for word in pair), *chosen]


def _option(param: Any) -> str | None:
    return next((name for name in param.opts if name.startswith("--")), None)


# Options without which a command hardly does anything are given more often.
_TIMES_OF_TEN = {("train", "method"): 9, ("plan", "method"): 7, ("train", "settings"): 3, ("predict", "file"): 0}


@st.composite
def run_files(draw: st.DrawFn) -> str:
    """The text of a TOML run file: sections, names and values right and wrong."""
    values = st.one_of(
        st.sampled_from(("1", "0.5", "true", "nan", "inf", "-inf", "-0.0", '""', '"none"', "[]", "{}", "1979-05-27",
                         "[1, 2]", '["query", "value"]', '{label = "label"}', '{name = "LoRA"}', '"a\\u0000b"',
                         '[{name = "LoRA"}, {name = "BitFit"}]', '[{rank = 1}]', '{name = 3}', "9" * 5000, "9" * 30)),
        st.sampled_from(('"bert"', '"data.csv"', '"linear"', '"LoRA"', '"query"', '"classification"')),
    )  # fmt: skip
    names = st.sampled_from((*_run_file_names(), "rnak", "targts", "a.b", '""', '"é"'))
    lines = []
    for section in draw(st.sampled_from((("method", "train"),) * 9 + (("method", "metod"), ("method",)))):
        lines.append(f"[{section}]")
        lines += {"method": ['name = "LoRA"'], "train": ['model = "bert"', 'data = "data.csv"']}.get(section, [])
        lines += [f"{name} = {value}" for name, value in draw(st.dictionaries(names, values, max_size=4)).items()]
    return "\n".join(lines) + "\n"


def _run_file_names() -> tuple[str, ...]:
    settings = {entry.name for cls in (tt.LoRA, tt.Compose, tt.PrefixTuning) for entry in fields(cls)}
    # Lengths of a run are given on the command line, so that none runs for ever.
    return tuple(sorted({"name", *settings, *option_types()} - {"name", "model", "data", "epochs", "steps"}))


# data files


def read(content: bytes, name: str) -> str:
    """Read a data file; returns 'read', or 'refused' where it ended in one DataError that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        try:
            table = read_table(file)
            for column in table.columns:
                with contextlib.suppress(DataError):
                    table.texts(column)
                    table.labels(column)
        except DataError as error:
            refusal = str(error)
        else:
            return "read"
    assert name in refusal
    return "refused"


def delimited_files() -> st.SearchStrategy[bytes]:
    """CSV-like files: fields, quotes and line ends in any order, whatever the encoding."""
    pieces = st.sampled_from(
        ("text", "label", ",", "\n", "\r\n", "\r", '"', '""', "\t", ";", " ", "\0", "\ufeff", "é", "😀", "\ud800",
         "\u2028", "\x0b", "\x1c", "a" * 140_000, "=1+1", "NaN", "-"),
    )  # fmt: skip
    rows = st.sampled_from(("a,b\n", "a,b\n", "c\tb\n", '"a, ""b""\n",b\r\n', "\n", "é,😀\n"))
    whole = st.builds(
        lambda header, parts: header + "".join(parts),
        st.sampled_from(("text,label\n", "text\tlabel\n", "text,text\n", "text,\n", "")),
        st.lists(st.one_of(*[rows] * 7, pieces), max_size=8),
    )
    encoded = st.builds(
        lambda text, encoding: text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace"),
        whole,
        st.sampled_from(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")),
    )
    return st.one_of(encoded, encoded, st.binary(max_size=40))


def json_files() -> st.SearchStrategy[bytes]:
    """JSON and JSON Lines files: tokens in any order, and rows that are nearly right."""
    pieces = st.sampled_from(
        ("{", "}", "[", "]", ",", ":", '"text"', '"label"', '"a"', "1", "1e999", "NaN", "-Infinity", "null", "true",
         " ", "\n", '"\\ud800"', '"\\u0000"', "9" * 5000, "[" * 3000, '{"text": "a", "label": 1}', '{"text": "a"}',
         '{"a": {"b": []}}', '{"text": 1, "text": 2}', "\ufeff", "é", "//", "'"),
    )  # fmt: skip
    rows = st.sampled_from(('{"text": "a", "label": 1}\n', '{"text": "b"}\n', '[{"text": "a"}, {"label": null}]', "\n"))
    whole = st.lists(st.one_of(*[rows] * 5, pieces), max_size=9)
    whole = whole.map(lambda parts: "".join(parts).encode())
    return st.one_of(whole, whole, whole, st.binary(max_size=40))


@dataclass(frozen=True)
class Blamed:
    """A file with one mistake on a known line."""

    name: str
    content: bytes
    line: int


@st.composite
def blamed_files(draw: st.DrawFn) -> Blamed:
    """A file whose rows are right but for one, and that one's line."""
    count, csv_file = draw(st.integers(1, 30)), draw(st.booleans())
    at = draw(st.integers(0, count - 1))
    end = draw(st.sampled_from((b"\n", b"\r\n")))
    if csv_file:
        right, head = "some text é,label".encode(), [b"text,label"]
        wrong = (b"alone", b"a,b,c", b"caf\xe9,label", b'"open,label', b'"a"b,label', b"a,b\0,c")
    else:
        right, head = '{"text": "some text é", "label": 1}'.encode(), []
        wrong = (b"{", b'{"text": 1,}', b"[1]", b"3", b"caf\xe9", b'{"a": 1, "a": 2}', b'{"text": "a"} {}', b"nan")
    lines = [*head, *[right] * count]
    lines[len(head) + at] = draw(st.sampled_from(wrong))
    mark = draw(st.sampled_from((b"", b"\xef\xbb\xbf")))
    return Blamed("d.csv" if csv_file else "d.jsonl", mark + end.join(lines) + end, len(head) + at + 1)


def check_blamed(file: Blamed) -> None:
    """The file is refused, and the line to blame is named."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file.name
        path.write_bytes(file.content)
        with pytest.raises(DataError, match=rf"{file.name}, line {file.line}:"):
            read_table(path)
