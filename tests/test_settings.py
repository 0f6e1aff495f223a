"""Settings, targets and command lines, random and misspelt: a result, or one error that helps; never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trimtab as tt
from contract_cases import build

pytest.importorskip("typer")

import misspellings
import random_command_lines as lines
import random_settings as drawn
from trimtab.cli.flags import with_flags
from trimtab.cli.settings import SECTIONS, read_config
from trimtab.errors import nearest
from trimtab.structure import Structure
from trimtab.targets import resolve
from trimtab.training.schedule import LoopSettings
from trimtab.training.tasks import task_from_dict

QUICK, LONG = 3, 50


def examples(count: int) -> Callable[[Any], Any]:
    """The same examples in every run; no deadline, since machines differ."""
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def try_method(name: str, count: int) -> None:
    @examples(count)
    @given(drawn.attempts(tt.methods()[name]))
    def tried(attempt: drawn.Attempt) -> None:
        drawn.run(attempt)

    tried()


@pytest.mark.parametrize("name", drawn.known_methods())
def test_any_settings_run_or_end_in_one_error(name: str) -> None:
    try_method(name, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", drawn.known_methods())
def test_any_settings_run_or_end_in_one_error_at_length(name: str) -> None:
    try_method(name, LONG)


def test_draws_reach_both_ends() -> None:
    """Were everything refused, or nothing, the tests above would prove little."""
    ended = []

    @examples(60)
    @given(drawn.attempts(tt.LoRA))
    def tried(attempt: drawn.Attempt) -> None:
        ended.append(drawn.run(attempt))

    tried()
    assert ended.count("ran") >= 10
    assert len([end for end in ended if end != "ran"]) >= 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: tt.attach(m, tt.LoRA(rank=10**5000)), "LoRA(rank=<int too long to print>): must be a finite"),
        (lambda m: tt.attach(m, tt.LoRA(alpha=float("inf"))), "LoRA(alpha=inf): must be a finite number"),
        (lambda m: tt.attach(m, tt.HoulsbyAdapter(bottleneck=2**44)), "cannot be allocated; choose smaller settings."),
        (lambda m: tt.attach(m, tt.LoRA(), seed=-1), "seed must be a whole number from 0 to 2**64 - 1, found -1."),
        (lambda m: tt.attach(m, tt.LoRA(), dtype="float32"), "dtype='float32'; adapters are trained in torch.float32,"),
        (lambda m: tt.attach(m, tt.LoRA(), base_mode="evil"), "base_mode='evil'; choose 'follow', 'eval' or None."),
        (lambda m: tt.attach(m, tt.LoRA(), name="a\n"), "adapter name 'a\\n': use letters, digits, '_' and '-' only."),
        (lambda m: tt.attach(m, tt.Compose(tt.Compose())), "Compose() needs at least one method."),
        (lambda m: tt.attach(m, tt.Compose(methods=3)), "Compose(methods=3): expected tuple[trimtab.method.Method"),
        (
            lambda m: tt.attach(m, tt.Compose([tt.LoRA(), tt.IA3()])),
            "found tuple of list (methods: the parts, each an argument of its own: Compose(LoRA(), IA3()), or Compose(",
        ),
        (lambda m: tt.attach(m, tt.LoRA(targets=["key"])), "found list of str (targets: places to adapt)."),
        (lambda m: tt.attach(m, tt.LoRA(rank="8")), "LoRA(rank='8'): expected int, found str (rank: rank of the up"),
        (lambda m: tt.attach(m, tt.LoRA(targets=len)), "the target function <built-in function len> failed: len()"),
        (lambda m: tt.attach(m, tt.LoRA()).parameter_groups(lr=float("nan")), "lr must be a number from 0, found nan."),
        (lambda m: tt.attach(m, tt.LoRA()).parameter_groups(1, True), "weight_decay must be a number from 0, found Tr"),
    ],
)
def test_what_was_asked_is_named(make: Callable[[Any], object], message: str) -> None:
    model = build("bert")
    before = drawn.state_of(model)
    with pytest.raises(tt.TrimtabError) as refusal:
        make(model)
    assert message in str(refusal.value)
    for adapter in tt.adapters(model).values():
        adapter.detach()
    drawn.assert_unchanged(model, before)


def targeted(model: torch.nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    return [str(item) for item in resolve(Structure(model), targets)]


def test_an_expression_takes_all_that_follows() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    assert targeted(model, "0 | re:(1|2)") == targeted(model, ("0", "re:(1|2)")) == ["0", "1", "2"]
    assert targeted(model, "* - re:1|2") == ["0"]
    assert targeted(model, " re:0|2") == ["0", "2"]
    assert targeted(model, "0 | =2") == ["0", "2"]
    with pytest.raises(tt.TargetError, match=r"target '0 - ' ends with an operator\."):
        targeted(model, "0 - ")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("0 | re:(1", "target 're:(1' is not a regular expression: missing ), unterminated subpattern at position 0."),
        ("re:layer | 0", "no module or role is called 're:layer | 0'."),
        ("=0 | 1", "no module or role is called '=0 | 1'."),
    ],
)
def test_what_an_expression_took_is_said(targets: str, message: str) -> None:
    with pytest.raises(tt.TargetError) as refusal:
        targeted(torch.nn.Sequential(torch.nn.Linear(2, 2)), targets)
    advice = " 're:' and '=' take all that follows: write them last, or give a tuple of targets."
    assert message + advice in str(refusal.value)


def test_loading_under_a_name_that_is_taken_is_no_fault_of_the_file(tmp_path: Path) -> None:
    adapter = tt.attach(build("bert"), tt.LoRA())
    file = adapter.save(tmp_path / "a.safetensors")
    message = r"^an adapter named 'default' is attached already; detach it, or give load\(…, name=…\)\.$"
    with pytest.raises(tt.AttachError, match=message):
        tt.load(adapter.model, file)
    tt.attach(adapter.model, tt.LoRA(), name="other")
    with pytest.raises(tt.AttachError, match="an adapter named 'other' is attached already"):
        tt.load(adapter.model, file, name="other")
    assert list(tt.adapters(adapter.model)) == ["default", "other"]


def test_binding_checks_its_arguments() -> None:
    adapter = tt.attach(build("bert"), tt.LoRA())
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1), lr=0.1)
    with pytest.raises(tt.TrainingError, match=r"bind: penalty='setp'; choose 'step' or 'loss'\."):
        adapter.bind(optimizer, penalty="setp")  # type: ignore[arg-type]
    with pytest.raises(tt.TrainingError, match=r"total_steps=…\) needs the number of optimizer steps, found 2\.5\."):
        adapter.bind(optimizer, total_steps=2.5)  # type: ignore[arg-type]


# command lines, run files, data files


def try_command(command: str, count: int) -> None:
    @examples(count)
    @given(lines.command_lines(command))
    def tried(arguments: list[str]) -> None:
        lines.check(arguments)

    tried()


@pytest.mark.parametrize("command", lines.COMMANDS)
def test_any_command_line_ends_in_a_result_or_one_error(command: str) -> None:
    try_command(command, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("command", lines.COMMANDS)
def test_any_command_line_ends_in_a_result_or_one_error_at_length(command: str) -> None:
    try_command(command, 40)


@pytest.mark.slow
@pytest.mark.parametrize("command", lines.COMMANDS)
def test_every_value_of_every_option_ends_in_a_result_or_one_error(command: str) -> None:
    ended = [lines.check(arguments) for arguments in lines.single_values(command)]
    assert {"done", "refused"} == set(ended)


def try_run_files(count: int) -> None:
    @examples(count)
    @given(lines.run_files())
    def tried(text: str) -> None:
        lines.check_run_file(text)

    tried()


def test_any_run_file_trains_or_ends_in_one_error() -> None:
    try_run_files(10)


@pytest.mark.slow
def test_any_run_file_trains_or_ends_in_one_error_at_length() -> None:
    try_run_files(150)


def try_data_files(count: int) -> None:
    ended: set[str] = set()
    for files, names in ((lines.delimited_files(), ("d.csv", "d.tsv")), (lines.json_files(), ("d.json", "d.jsonl"))):

        @examples(count)
        @given(files, st.sampled_from(names))
        def tried(content: bytes, name: str) -> None:
            ended.add(lines.read(content, name))

        tried()
    assert ended == {"read", "refused"}


def test_any_data_file_is_read_or_refused_by_name() -> None:
    try_data_files(60)


@pytest.mark.slow
def test_any_data_file_is_read_or_refused_by_name_at_length() -> None:
    try_data_files(1500)


@examples(80)
@given(lines.blamed_files())
def test_the_line_to_blame_is_named(file: lines.Blamed) -> None:
    lines.check_blamed(file)


def test_a_field_that_csv_cannot_hold_is_named(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text(f"text,label\na,b\n{'x' * 200_000},b\n")
    with pytest.raises(lines.DataError, match=r"d\.csv, line 3: .*longer than 131,072 characters.*JSON Lines"):
        lines.read_table(file)


# misspelt names


def check_told(told: Iterable[misspellings.Told]) -> None:
    everything = list(told)
    assert everything
    assert [each for each in everything if not each.helps] == []


def test_a_misspelt_setting_shows_the_right_one() -> None:
    check_told(misspellings.settings())


def test_a_misspelt_method_shows_the_right_one() -> None:
    check_told(misspellings.methods())


def test_a_misspelt_name_of_the_package_shows_the_right_one() -> None:
    check_told(misspellings.public_names())


def test_a_misspelt_choice_shows_the_right_one() -> None:
    model = build("mlp")
    for words, use in (
        (("kaiming", "gaussian"), lambda wrong: tt.plan(model, tt.LoRA(initial=wrong))),
        (("linear", "cosine", "constant"), lambda wrong: LoopSettings(lr=1, steps=1, schedule=wrong)),
        (("classification", "causal-lm", "seq2seq"), lambda wrong: task_from_dict({"task": wrong})),
    ):
        for word in words:
            check_told(misspellings.told_about(word, words.__contains__, use))


@pytest.mark.parametrize("model", ["bert", "cnn"])
def test_a_misspelt_role_shows_the_right_one(model: str) -> None:
    check_told(misspellings.roles(build(model)))


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_a_misspelt_module_shows_the_right_one(model: str) -> None:
    check_told(misspellings.modules(build(model), every=False, step=3))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "vit", "mixtral", "cnn", "mlp"])
def test_a_module_misspelt_anywhere_shows_the_right_one(model: str) -> None:
    check_told(misspellings.modules(build(model), every=True))


def test_a_misspelt_last_name_shows_where_it_is() -> None:
    structure = Structure(build("llama"))
    for word in (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "embed_tokens",
        "lm_head",
    ):
        for told in misspellings.told_about(word, lambda wrong: False, lambda wrong: resolve(structure, wrong)):
            assert told.text is not None
            assert f"{word}'" in told.text, told


@pytest.mark.parametrize("word", ["Lora", "lora", "LORA", "Lorra", "loRa"])
def test_case_does_not_hide_the_nearest(word: str) -> None:
    assert nearest(word, tt.methods())[0] == "LoRA"
    with pytest.raises(AttributeError, match=rf"has no attribute '{word}'\. Did you mean 'LoRA'"):
        getattr(tt, word)
    assert nearest("YES", ["no", "yes", "Yes"]) == ["yes", "Yes"]
    assert nearest("Query", ["a.query", "b.query"]) == ["a.query", "b.query"]


def test_swapped_letters_come_first() -> None:
    assert nearest("kp_roj", ["v_proj", "q_proj", "o_proj", "k_proj"])[0] == "k_proj"


@pytest.mark.parametrize("command", lines.COMMANDS)
def test_a_misspelt_command_or_option_shows_the_right_one(command: str) -> None:
    check_told(misspellings.options(command, every=False))


@pytest.mark.slow
@pytest.mark.parametrize("command", lines.COMMANDS)
def test_a_command_or_option_misspelt_anywhere_shows_the_right_one(command: str) -> None:
    check_told(misspellings.options(command, every=True))


def test_a_misspelt_section_or_option_of_a_run_file_shows_the_right_one(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"

    def read_section(wrong: str) -> None:
        file.write_text(f'["{wrong}"]\n')
        read_config(file)

    for word in SECTIONS:
        check_told(misspellings.told_about(word, SECTIONS.__contains__, read_section))
    check_told(misspellings.run_options())


# how the command line says it


@pytest.mark.parametrize(
    ("command", "arguments", "text", "said"),
    [
        ("train", (), "lr=-1.0; it must be", "--lr -1.0; it must be"),
        ("train", (), "Name it: label=…", "Name it: --column label=…"),
        ("train", (), "give delimiter=';'", "give --delimiter ';'"),
        ("train", (), "or state bottleneck=…", "or state --set bottleneck=…"),
        ("train", (), "LoRA(rank=0): must be", "LoRA(rank=0): must be"),
        ("train", (), "the file 'lr=3' is", "the file 'lr=3' is"),
        ("train", (), "for example --set rank=8.", "for example --set rank=8."),
        ("train", ("--config", "run.toml"), "epochs=True: expected", "epochs=True: expected"),
        ("train", ("--config", "run.toml", "--lr", "-1"), "lr=-1.0; it", "--lr -1.0; it"),
        ("predict", (), "or pass accept_other_base=True if", "or pass --accept-other-base if"),
        ("export", (), "choose rank=… to write", "choose --rank … to write"),
        ("methods", (), "rank=3", "rank=3"),
    ],
)
def test_errors_name_the_flag(command: str, arguments: tuple[str, ...], text: str, said: str) -> None:
    assert with_flags(text, lines.COMMANDS[command], [command, *arguments]) == said


def test_the_gradient_norm_may_be_unlimited(tmp_path: Path) -> None:
    from trimtab.cli.train import _given

    assert _given({"clip": "none"}) == {"clip": None}
    assert _given({"clip": "0.5"}) == {"clip": 0.5}
    assert _given({"clip": None}) == {}
    assert lines.check_run_file(
        '[method]\nname = "LoRA"\n[train]\nmodel = "bert"\ndata = "data.csv"\nclip = "none"\n'
    ) == ("done")


def test_running_out_of_memory_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.cli.train as command

    for exhaust in (lambda _: torch.empty(2**50), lambda _: bytearray(2**60)):
        monkeypatch.setattr(command, "prepare", exhaust)
        with lines.inside(lines.workplace()):
            ended = lines.run(["train", "bert", "data.csv", "--method", "LoRA", "--steps", "1", "--output", "new"])
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith("error: not enough memory.")
        assert "Give a smaller --batch-size" in ended.err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.cli.train as command

    def fail(_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(command, "prepare", fail)
    with lines.inside(lines.workplace()), pytest.raises(RuntimeError, match="a mistake"):
        lines.run(["train", "bert", "data.csv", "--method", "LoRA", "--output", "new"])


def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        [sys.executable, "-m", "trimtab.cli", *arguments], text=True, check=False, env=environment, **options
    )


def test_a_terminal_without_the_characters_gets_escapes() -> None:
    ended = started("methods", "LoRA", capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert "\\u0394W = s" in ended.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        ended = started("methods", stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2
    assert "error: " in ended.stderr
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
