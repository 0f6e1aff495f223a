"""The documentation does what it says: every block runs, every measured number names its command, pages match results.

How pages are written for this is in CONTRIBUTING.md, "Documentation". New pages join by existing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import trimtab as tt
from trimtab.cli.main import app
from trimtab.cli.settings import method_from, read_config
from trimtab.cli.train import _settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LANGUAGES = {"python", "sh", "toml", "text", "csv"}
MARK = re.compile(r"^<!-- (?P<kind>not run|file|not measured): (?P<text>.+) -->$")
MEASURED_WITH = re.compile(r"^Measured with: `(?P<command>[^`]+)`$", re.M)
# A number with a unit in running text is a measured one, or belongs to a section that says how it was found.
QUANTITY = re.compile(r"\d[\d.,]*\s?(%|ms\b|s\b|seconds\b|minutes\b|hours\b|[KMG]iB\b|points\b|times\b)")
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text, first line in the page (from 1), and the comment above it."""

    language: str
    text: str
    line: int
    kind: str | None
    comment: str


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def blocks_of(name: str) -> tuple[Block, ...]:
    return tuple(blocks_in(text_of(name)))


def blocks_in(text: str) -> list[Block]:
    found, lines = [], text.split("\n")
    opened: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        mark = MARK.match(lines[opened - 1]) if opened else None
        content = "\n".join(lines[opened + 1 : number]) + "\n"
        kind, comment = (mark["kind"], mark["text"]) if mark else (None, "")
        found.append(Block(lines[opened][3:].strip(), content, opened + 1, kind, comment))
        opened = None
    assert opened is None, f"the block on line {opened} is never closed"
    return found


def prose_of(text: str) -> str:
    """The page without its fenced blocks, line by line."""
    return re.sub(r"^```.*?^```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.M | re.S)


def folder_of(name: str, folder: Path) -> Path:
    """Write the files that a page shows, as its reader would."""
    for block in blocks_of(name):
        if block.kind == "file":
            (folder / block.comment).write_text(block.text, encoding="utf-8")
    return folder


def pages_with(language: str) -> list[str]:
    return [name for name in NAMES if any(b.language == language and b.kind != "not run" for b in blocks_of(name))]


def runnable(name: str, language: str) -> list[Block]:
    return [block for block in blocks_of(name) if block.language == language and block.kind != "not run"]


def environment(folder: Path) -> dict[str, str]:
    """The reader's: `trimtab` and `python` are commands; there is no network."""
    commands = folder / ".bin"
    commands.mkdir()
    for command, call in (("trimtab", "-m trimtab.cli"), ("python", "")):
        (commands / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (commands / command).chmod(0o755)
    paths = {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT / 'src'}"}
    return {**os.environ, **paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


# blocks


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_what_it_is_and_why_it_is_not_run(name: str) -> None:
    for block in blocks_of(name):
        assert block.language in LANGUAGES, f"{name}:{block.line}: a block of the language {block.language!r}"
        if block.kind == "not run":
            assert len(block.comment.split()) >= 3, f"{name}:{block.line}: give a reason"
        if block.kind == "file":
            assert Path(block.comment).name == block.comment
    lines = text_of(name).split("\n")
    for number, line in enumerate(lines):
        if "<!-- not " in line and not line.strip().startswith("`"):
            mark = MARK.match(line)
            below = lines[number + 1] if number + 1 < len(lines) else ""
            assert mark or "`<!--" in line, f"{name}:{number + 1}: write <!-- not run: reason -->"
            assert not mark or below.startswith("```" if mark["kind"] == "not run" else "|"), f"{name}:{number + 1}"


@pytest.mark.parametrize("name", pages_with("python"))
def test_python_blocks_run_as_one_script(name: str, tmp_path: Path) -> None:
    script = "\n".join(block.text for block in runnable(name, "python"))
    ended = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:trimtab", "-c", script], cwd=folder_of(name, tmp_path),
        env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", pages_with("sh"))
def test_shell_blocks_run(name: str, tmp_path: Path) -> None:
    script = "\n".join(block.text for block in runnable(name, "sh"))
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder_of(name, tmp_path), env=environment(tmp_path),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout


@pytest.mark.parametrize("name", pages_with("toml"))
def test_toml_blocks_are_valid(name: str, tmp_path: Path) -> None:
    for block in runnable(name, "toml"):
        content = tomllib.loads(block.text)
        if "project" in content:
            (group,) = content["project"]["entry-points"]
            called = ast.walk(ast.parse((ROOT / "src/trimtab/method.py").read_text()))
            assert group in {node.value for node in called if isinstance(node, ast.Constant)}, group
            continue
        file = tmp_path / "run.toml"
        file.write_text(block.text)
        config = read_config(file)
        method_from(None, [], None, config.get("method", {}))
        if "train" in config:
            none = dict.fromkeys(("method", "settings", "targets"))
            assert _settings({**none, "config": file}).data == config["train"]["data"]


def test_the_layers_are_those_of_the_package() -> None:
    """The diagram in docs/architecture.md names every file and folder of the package, and no other."""
    (diagram,) = [b.text for b in blocks_of("docs/architecture.md") if b.language == "text" and "───" in b.text]
    named = set(re.findall(r"\b([a-z_]+)(?:\.py\b|/)", diagram)) - {"kind", "name"}
    package = ROOT / "src" / "trimtab"
    there = {entry.stem for entry in package.iterdir() if not entry.name.startswith(("_", "."))}
    there = {stem for stem in there if (package / f"{stem}.py").is_file() or any((package / stem).glob("*.py"))}
    assert named - there == set()
    assert there - named <= {"version"}  # a constant


# commands, names and links in the text


def trimtab_commands(name: str) -> list[list[str]]:
    """Every `trimtab …` command line of a page: in its blocks, and in its running text where it has a command."""
    in_blocks = [line for b in blocks_of(name) if b.language == "sh" for line in b.text.split("\n")]
    in_text = re.findall(r"`(trimtab [^`]+)`", prose_of(text_of(name)))
    lines = [shlex.split(line, comments=True) for line in [*in_blocks, *in_text]]
    return [words[1:] for words in lines if words[:1] == ["trimtab"]]


@pytest.mark.parametrize("name", [name for name in NAMES if trimtab_commands(name)])
def test_command_lines_have_only_commands_and_options_that_exist(name: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in trimtab_commands(name):
        assert words[0] in commands, words
        known = {option for param in commands[words[0]].params for option in param.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, words


def python_commands(name: str) -> list[list[str]]:
    """Every `python SCRIPT …` of a page, in its text and its blocks."""
    found = re.findall(r"`(python [^`…]+\.py[^`…]*)`", text_of(name))
    found += [line for b in blocks_of(name) for line in b.text.split("\n") if line.startswith("python ")]
    return [shlex.split(command, comments=True)[1:] for command in found if "NAME.py" not in command]


@pytest.mark.parametrize("name", [name for name in NAMES if python_commands(name)])
def test_scripts_that_are_named_exist_and_have_their_options(name: str) -> None:
    for script, *words in python_commands(name):
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in source, f"{script} has no option {option}"


@pytest.mark.parametrize("name", NAMES)
def test_names_and_links_lead_somewhere(name: str) -> None:
    for attribute in re.findall(r"`(?:tt|trimtab)\.([A-Za-z_]+)\(?", text_of(name)):
        assert hasattr(tt, attribute) or importlib.util.find_spec(f"trimtab.{attribute}"), attribute
    for link in re.findall(r"\]\(([^)#]+)", text_of(name)):
        assert "://" in link or ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.]+)`", text_of(name)):
        assert (ROOT / path).exists(), path


# measured numbers


def sections_of(text: str) -> list[str]:
    """The parts of a page between headings of the second level, without its blocks."""
    return re.split(r"^(?=## )", prose_of(text), flags=re.M)


def unnamed_measurements(text: str) -> list[str]:
    """Tables with numbers, pictures and quantities of sections that name no command, unless marked as not measured."""
    found = []
    for section in sections_of(text):
        if MEASURED_WITH.search(section):
            continue
        excused = False
        for before, line in zip(["", *section.split("\n")], section.split("\n"), strict=False):
            mark = MARK.match(before)
            excused = (excused and line.startswith("|")) or bool(mark and mark["kind"] == "not measured")
            plain = re.sub(r"`[^`]*`", "", line)
            numbers = re.search(r"\d", plain) if line.startswith("|") else QUANTITY.search(plain)
            if (numbers or "![" in line) and not excused and not line.startswith("<!--"):
                found.append(line)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_measured_numbers_name_their_command(name: str) -> None:
    assert unnamed_measurements(text_of(name)) == []


def measuring_scripts() -> list[tuple[str, str]]:
    """(page, script) for every command that pages name as the origin of their numbers."""
    found = []
    for name in NAMES:
        for match in MEASURED_WITH.finditer(prose_of(text_of(name))):
            words = shlex.split(match["command"])
            assert words[0] == "python", match["command"]
            found.append((name, words[1]))
    return found


@pytest.mark.parametrize(("name", "script"), measuring_scripts())
def test_pages_are_what_the_kept_results_give(name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module: Any = importlib.import_module(Path(script).stem)
    results = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    if vars(module).get("PAGE", ROOT / name) != ROOT / name:  # the script writes a part of another page too
        part: Any = importlib.import_module(f"reliability_parts.{Path(name).stem}")
        table = text_of(name).partition(part.BEGIN)[2].partition(part.END)[0].strip().split("\n")
        assert len(table) > 2
        assert {row.count("|") for row in table} == {5}
        return
    if "page" in vars(module):
        written, expected = text_of(name), module.page(results)
    else:
        begin, end = f"<!-- {module.SECTION}: begin -->", f"<!-- {module.SECTION}: end -->"
        written, expected = text_of(name).partition(begin)[2].partition(end)[0].strip(), module.section(results).strip()
    assert DATE.sub("DATE", written) == DATE.sub("DATE", expected)


# the checks themselves


def test_there_is_something_to_check() -> None:
    assert {"README.md", "docs/banking77.md", "docs/performance.md"} <= {name for name, _ in measuring_scripts()} | {
        name for name in pages_with("python") if pages_with("sh")
    }


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("# A\n\n| a |\n| - |\n| 3 |\n", 1),
        ("# A\n\n<!-- not measured: a list of versions -->\n| a |\n| - |\n| 3 |\n", 0),
        ("# A\n\nMeasured with: `python a.py`\n\n| a |\n| - |\n| 3 |\n", 0),
        ("# A\n\nMeasured with: `python a.py`\n\n## B\n\n| a |\n| - |\n| 3 |\n", 1),
        ("It takes 3.5 s, or 20 % less.\n", 1),
        ("At most 120 lines; `sleep 3 s`.\n", 0),
        ("```text\n3 s\n```\n", 0),
        ("![a picture](a.png)\n", 1),
    ],
)
def test_the_measure_of_measurements(text: str, count: int) -> None:
    assert len(unnamed_measurements(text)) == count


def test_blocks_are_found_with_the_comment_above_them() -> None:
    text = "a\n<!-- not run: no network here -->\n```sh\nmake\n```\n\n```python\nx = 1\n```\n"
    first, second = blocks_in(text)
    assert (first.language, first.text, first.kind, first.comment) == ("sh", "make\n", "not run", "no network here")
    assert (second.language, second.kind, second.line) == ("python", None, 7)
