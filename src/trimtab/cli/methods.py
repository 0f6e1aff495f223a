"""`trimtab methods`: the catalogue, and the card of one method."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Annotated

import typer

from trimtab.cli.console import Grid, note, show, show_json
from trimtab.cli.options import AsJson
from trimtab.cli.settings import describe_settings
from trimtab.kinds import ENGINES
from trimtab.method import Method, find_method
from trimtab.method import methods as catalogue

LEGEND = (
    "✓: tried, and it holds. refused: it stops with an error that says why. –: there is nothing to try, or (averaging) "
    "the mean of two adapters is not the mean of what they do. ✗: the contract is broken. Conv, embedding, attention "
    "and 3-D (stacked experts) are places; routing is one adapter for each row of a batch."
)
MARK = "<!-- not measured: 3-D is the only number -->"
_ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def methods(
    name: Annotated[str | None, typer.Argument(help="Show the card and the settings of this method.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Try what methods can do, and show what was found.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --table: print a page of documentation.")] = False,
    json: AsJson = False,
) -> None:
    """List every method, or show one with its settings."""
    if table or markdown:
        _show_abilities(None if name is None else [find_method(name).__name__], json, markdown)
        return
    if name is not None:
        _show_one(find_method(name), json)
        return
    found = [_summary(cls) for cls in catalogue().values()]
    if json:
        show_json({"methods": found})
        return
    header = ("name", "kind", "paper", "starts at base", "merge")
    rows = tuple(_row(cls) for cls in catalogue().values())
    show(
        Grid(header, rows),
        f"\n{len(rows)} methods. `trimtab methods NAME` shows one with its settings and capabilities.",
    )


def _show_abilities(names: list[str] | None, json: bool, markdown: bool) -> None:
    from trimtab.contract.table import probe_capabilities  # takes a second to import, which no other command needs

    note("trying every method on small models; this takes some minutes …" if names is None else f"trying {names[0]} …")
    found = probe_capabilities(names)
    if json:
        show_json(found)
    elif markdown:
        show(capability_page(found))
    else:
        header, rows = _abilities_of(found)
        show(Grid(header, rows), "", LEGEND)


def _abilities_of(found: Mapping[str, Mapping[str, str]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    header = ("method", *next(iter(found.values())))
    return header, tuple((name, *cells.values()) for name, cells in found.items())


def capability_page(found: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page of documentation that shows what `probe_capabilities` found."""
    header, rows = _abilities_of(found)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    written = "Written by `trimtab methods --table --markdown`: every cell was tried, none is declared by hand."
    return "\n".join(["# What each method can do", "", written, "", LEGEND, "", MARK, *lines])


def _row(cls: type[Method]) -> tuple[str, ...]:
    summary, capabilities = _summary(cls), cls.capabilities
    paper = str(summary["paper"] or "–")
    return cls.__name__, kind_of(cls), paper, capabilities.starts_at_base, capabilities.merge


def kind_of(cls: type[Method]) -> str:
    """Return the engine that a method is built on: weight, activation, …; 'composition' for one without."""
    for base in cls.__mro__:
        package, _, kind = base.__module__.rpartition(".")
        if package == "trimtab.kinds" and kind in ENGINES:
            return kind
    return "composition"


def _summary(cls: type[Method]) -> dict[str, object]:
    card = inspect.getdoc(cls) or ""
    paper = _ARXIV.search(card)
    return {
        "name": cls.__name__,
        "kind": kind_of(cls),
        "title": card.split("\n", 1)[0],
        "paper": f"arXiv {paper[1]}" if paper else None,
        "capabilities": _capabilities(cls),
    }


def _capabilities(cls: type[Method]) -> dict[str, object]:
    return dataclasses.asdict(cls.capabilities)


def _show_one(cls: type[Method], json: bool) -> None:
    settings = describe_settings(cls)
    card = inspect.getdoc(cls) or ""
    if json:
        show_json(_summary(cls) | {"card": card, "settings": [dataclasses.asdict(entry) for entry in settings]})
        return
    header = ("setting", "type", "default", "range", "meaning")
    rows = tuple((entry.name, entry.type, entry.default, entry.range, entry.help) for entry in settings)
    facts = tuple((name.replace("_", " "), _plain(value)) for name, value in _capabilities(cls).items() if value != "")
    show(
        f"{cls.__name__} ({kind_of(cls)})\n\n{card}\n", Grid(header, rows), "", Grid(("capability", "value"), facts),
        f"\nUse it: trimtab train MODEL DATA --method {cls.__name__}" + (f" --set {_first(rows)}" if rows else ""),
    )  # fmt: skip


def _plain(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _first(rows: tuple[tuple[str, ...], ...]) -> str:
    return f"{rows[0][0]}={rows[0][2]}"
