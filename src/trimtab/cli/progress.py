"""How training shows where it is: a live line on a terminal, a plain line every few seconds elsewhere; on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from trimtab.cli.console import is_main_process, note, time_text
from trimtab.planning import bytes_text
from trimtab.training.progress import Progress

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """Yield the function that the training loop tells its progress."""
    if not is_main_process():
        yield lambda progress: None
    elif sys.stderr.isatty():
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
        with Bar(*columns, console=Console(stderr=True)) as bar:
            yield _LiveLine(bar)
    else:
        yield _PlainLines()


class _LiveLine:
    """Keeps one line up to date and prints evaluations above it."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self.line = bar.add_task("training", total=None, facts="")

    def __call__(self, progress: Progress) -> None:
        self.bar.update(self.line, completed=progress.step, total=progress.total_steps, facts=_facts(progress))
        if progress.metrics is not None:
            self.bar.console.print(f"step {progress.step}: {progress.metrics}", markup=False, highlight=False)


class _PlainLines:
    """Prints the first and the last step, every evaluation, and otherwise a line every few seconds."""

    def __init__(self) -> None:
        self.last = -SECONDS_BETWEEN_LINES

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        ended = progress.step == progress.total_steps
        if not ended and progress.metrics is None and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        evaluated = "" if progress.metrics is None else f" · {progress.metrics}"
        note(f"step {progress.step}/{progress.total_steps} · {_facts(progress)}{evaluated}")


def _facts(progress: Progress) -> str:
    return (
        f"loss {progress.loss:.4f} · {progress.examples_per_second:.0f} rows/s · "
        f"{time_text(progress.remaining)} left · peak {bytes_text(progress.peak_bytes)}"
    )
