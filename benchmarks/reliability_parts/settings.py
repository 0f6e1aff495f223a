"""Random settings, command lines, run files and data files, and misspelt names.

Each example ends in a result or in exactly one error of Trimtab's, which leaves model and files as they were; each
misspelling (two letters swapped, one dropped, one doubled, at every place) is stopped with the right name in view.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

import misspellings
import random_command_lines as lines
import random_settings as drawn
import trimtab as tt
from contract_cases import build
from reliability_parts import Row
from zoo import ZOO

EITHER = "a result or one TrimtabError"


def rows(full: bool) -> list[Row]:
    """Return the rows; `full` draws some twenty thousand examples instead of a few hundred."""
    found = [
        _drawn(f"{name}: settings, targets and arguments", drawn.attempts(cls), drawn.run, 500 if full else 5)
        for name, cls in tt.methods().items()
    ]
    for command in lines.COMMANDS:
        strategy, count = lines.command_lines(command), 400 if full else 4
        found.append(_drawn(f"`trimtab {command}`: command lines", strategy, lines.check, count))
        found += [_every_value(command)] if full else []
    for what, strategy, act in (
        ("run files", lines.run_files(), lines.check_run_file),
        ("CSV files", lines.delimited_files(), lambda content: lines.read(content, "d.csv")),
        ("TSV files", lines.delimited_files(), lambda content: lines.read(content, "d.tsv")),
        ("JSON files", lines.json_files(), lambda content: lines.read(content, "d.json")),
        ("JSON Lines files", lines.json_files(), lambda content: lines.read(content, "d.jsonl")),
        ("files with one wrong line, which the error names", lines.blamed_files(), _blamed),
    ):
        few = what == "run files"
        found.append(_drawn(what, strategy, act, (1000 if few else 5000) if full else 20))
    return found + _misspelt(full)


def _blamed(file: lines.Blamed) -> str:
    lines.check_blamed(file)
    return "refused by line"


def _drawn(what: str, strategy: SearchStrategy[Any], act: Callable[[Any], str], count: int) -> Row:
    """Try `count` examples, always the same ones, and count how they end."""
    ended: Counter[str] = Counter()
    failed: list[str] = []

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def tried(example: Any) -> None:
        _count(act, example, ended, failed)

    tried()
    return _row(what, ended, failed)


def _every_value(command: str) -> Row:
    ended: Counter[str] = Counter()
    failed: list[str] = []
    for arguments in lines.single_values(command):
        _count(lines.check, arguments, ended, failed)
    return _row(f"`trimtab {command}`: every value of every option, one at a time", ended, failed)


def _count(act: Callable[[Any], str], example: Any, ended: Counter[str], failed: list[str]) -> None:
    try:
        ended[act(example)] += 1
    except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
        failed.append(f"{type(error).__name__} for {example!r:.300}")


def _row(what: str, ended: Counter[str], failed: list[str]) -> Row:
    counts = ", ".join(f"{count:,} {end}" for end, count in ended.most_common())
    trouble = f"; {len(failed):,} otherwise, first: {failed[0]}" if failed else ""
    return Row(f"{what}, {ended.total() + len(failed):,} examples", EITHER, f"{counts}{trouble}", not failed)


def _misspelt(full: bool) -> list[Row]:
    models = list(ZOO) if full else ["mlp"]
    kinds: list[tuple[str, Iterable[misspellings.Told]]] = [
        ("settings of every method", misspellings.settings()),
        ("methods", misspellings.methods()),
        ("public names", misspellings.public_names()),
        ("options of a run file", misspellings.run_options()),
        ("roles", misspellings.roles(build("bert"))),
        *((f"modules of {name}", misspellings.modules(build(name), every=True)) for name in models),
        *(
            (f"`trimtab {command}` and its options", misspellings.options(command, every=full))
            for command in lines.COMMANDS
        ),
    ]
    found = []
    for what, told in kinds:
        everything = list(told)
        bad = [each for each in everything if not each.helps]
        first = f", first: {bad[0].wrong!r} for {bad[0].word!r}" if bad else ""
        measured = f"{len(everything) - len(bad):,} of {len(everything):,}{first}"
        found.append(Row(f"{what}, misspelt", "all stopped, with the right name", measured, not bad))
    return found
