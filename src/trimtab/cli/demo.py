"""`trimtab demo`: the main job on embedded data, with live progress, a table and an HTML report."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from trimtab.cli.console import Grid, count_text, note, program, show, show_json, time_text
from trimtab.cli.options import AsJson
from trimtab.demo.contestants import CONTESTANTS
from trimtab.demo.data import EPOCHS
from trimtab.demo.page import Page, Result, headline
from trimtab.demo.run import Stage, contestants_named, run_demo
from trimtab.errors import SettingError, suggestion
from trimtab.planning import bytes_text

SECONDS_BETWEEN_LINES = 5.0


def demo(
    output: Annotated[Path, typer.Option(help="folder for data, adapters and report")] = Path("trimtab-demo"),
    only: Annotated[list[str] | None, typer.Option(help="contestant to run; repeatable (default: all)")] = None,
    epochs: Annotated[float, typer.Option(help="passes over the training messages")] = EPOCHS,
    as_json: AsJson = False,
) -> None:
    """Tune a real encoder on embedded data in ten ways, compare them, and use one from its file."""
    keys = [one.key for one in CONTESTANTS]
    for key in only or []:
        if key not in keys:
            raise SettingError(f"there is no contestant {key!r}.{suggestion(key, keys)}")
    if not (math.isfinite(epochs) and epochs > 0):
        raise SettingError(f"epochs={epochs:g}; it must be a number above 0.")
    chosen = contestants_named(only or [])
    note(f"Training {len(chosen)} contestants for {epochs:g} epochs each, one after another; each has its own process.")
    begin = time.monotonic()
    with _Screen() as screen:
        page = run_demo(output, chosen, epochs, screen.stage, screen.result, program())
    if as_json:
        show_json({"results": [vars(r) for r in page.results], "report": str(output / "report.html")})
        return
    _finish(page, output, time.monotonic() - begin)


class _Screen:
    """One live line on a terminal, above it a line for each finished contestant; plain lines elsewhere."""

    def __init__(self) -> None:
        self.live = (
            Live(console=Console(stderr=True), refresh_per_second=8, transient=True) if sys.stderr.isatty() else None
        )
        self.last = -SECONDS_BETWEEN_LINES

    def __enter__(self) -> _Screen:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def stage(self, stage: Stage) -> None:
        """Show a step."""
        left = "" if stage.remaining is None else f" · {time_text(stage.remaining)} left in all"
        loss = "" if stage.loss is None else f" · loss {stage.loss:.3f}"
        line = f"[{stage.number}/{stage.count}] {stage.one.name}: step {stage.step}/{stage.total}{loss}{left}"
        if self.live is not None:
            self.live.update(Text(line))
        elif time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            note(line)

    def result(self, result: Result) -> None:
        """Show a finished contestant."""
        line = f"✓ {result.name}: {100 * result.accuracy:.1f} % in {result.seconds:.0f} s"
        if self.live is not None:
            self.live.console.print(line, highlight=False)
        else:
            note(line)


def _finish(page: Page, output: Path, seconds: float) -> None:
    rows = tuple(
        (
            r.name,
            f"{100 * r.accuracy:.1f} %",
            f"{100 * r.low:.1f} – {100 * r.high:.1f}",
            count_text(r.trainable),
            f"{r.seconds:.0f} s",
            bytes_text(r.peak_bytes),
            bytes_text(r.file_bytes),
        )
        for r in sorted(page.results, key=lambda result: -result.accuracy)
    )
    header = ("method", "test accuracy", "95 % interval", "trainable", "training", "peak memory", "file")
    samples = tuple((text, label) for text, label in page.samples)
    show(Grid(header, rows), headline(page.results), "")
    show(f"{page.sample_source}, loaded from its file in a new process:", Grid(("message", "intent"), samples), "")
    show(
        f"Report: {output / 'report.html'}  ({time_text(seconds)} in all)", "Next:", *(f"  {c}" for c in page.commands)
    )
