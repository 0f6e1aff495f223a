"""What the command line prints: results on stdout, everything else on stderr, and only from the main process."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.report import table


@dataclass(frozen=True)
class Grid:
    """A table of texts: drawn on a terminal, plain aligned columns elsewhere."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def is_main_process() -> bool:
    """Return whether this process speaks for the run: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def show(*blocks: str | Grid) -> None:
    """Print texts and tables on stdout."""
    if not is_main_process():
        return
    for block in blocks:
        if isinstance(block, str):
            print(block)
        elif sys.stdout.isatty():
            Console().print(_drawn(block))
        else:
            print(table(block.header, block.rows))


def show_json(document: Mapping[str, object] | Sequence[object]) -> None:
    """Print one JSON document on stdout; numbers that JSON cannot express become null."""
    if is_main_process():
        print(json.dumps(_expressible(document), indent=2, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """Print one line about what goes on, on stderr."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def show_error(text: str) -> None:
    """Print one error on stderr, red on a terminal. Every process may fail, so every process may print it."""
    message = f"error: {text}"
    if sys.stderr.isatty():
        Console(stderr=True, highlight=False).print(Text(message, style="red"), soft_wrap=True)
    else:
        print(message, file=sys.stderr, flush=True)


def program() -> str:
    """Return how this program is called from here: by its name where that finds it, else by its path."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{sys.executable} -m trimtab.cli"
    found = shutil.which("trimtab")
    by_name = called.name != "trimtab" or (found is not None and Path(found).absolute() == called.absolute())
    return "trimtab" if by_name else str(called)


def count_text(count: int) -> str:
    """Return a count for people: 1,234,567."""
    return f"{count:,}"


def new_head_text(count: int) -> str:
    """Return how many of some trained numbers are a new head's, as what follows their count; '' for none."""
    return f", {count:,} of them the new head" if count else ""


def time_text(seconds: float) -> str:
    """Return a duration for people: '1 h 02 min', '3 min 05 s', '4.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _drawn(grid: Grid) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in grid.header:
        drawn.add_column(name, overflow="fold")
    for row in grid.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _expressible(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _expressible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_expressible(item) for item in value]
    return value
