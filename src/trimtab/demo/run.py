"""The whole demo: train every contestant in its own process, compare, save, reload one in a new process, report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from trimtab.adapter_file import FILE_NAME, write_atomically
from trimtab.demo.contestants import CONTESTANTS, Contestant
from trimtab.demo.data import BATCH, messages, write_splits
from trimtab.demo.page import Page, Result, render
from trimtab.errors import TrainingError

SAMPLES = (
    "It opens fine but every click takes ages.",
    "You took the money twice this month.",
    "New phone, the old one went for a swim, so no codes any more.",
    "she left the company last week, can u get her off our board",
    "Please stop the billing until spring, I do not want to lose anything.",
)
PREFERRED = "lora"


@dataclass(frozen=True)
class Stage:
    """Where the demo stands: contestant `number` of `count`, its step, and seconds left for everything."""

    one: Contestant
    number: int
    count: int
    step: int
    total: int
    loss: float | None
    remaining: float | None


def run_demo(
    folder: Path,
    chosen: Sequence[Contestant],
    epochs: float,
    on_stage: Callable[[Stage], None],
    on_result: Callable[[Result], None],
    program: str = "trimtab",
) -> Page:
    """Train the contestants one after another and write report.html into `folder`; returns what the report says.

    `program` is how the command line is called in the commands that the report gives.
    """
    data = folder / "data"
    write_splits(data)
    results, clock = [], _Clock(len(chosen))
    for number, one in enumerate(chosen):
        report: dict[str, Any] = {}
        for line in _trained(one, data, folder / one.key, epochs):
            if line["kind"] == "report":
                report = line
                continue
            remaining = clock.remaining(number, line["step"] / line["total"])
            on_stage(Stage(one, number + 1, len(chosen), line["step"], line["total"], line["loss"], remaining))
        results.append(_result(one, report, folder / one.key))
        on_result(results[-1])
        clock.finished()
    user = next((one for one in chosen if one.key == PREFERRED), chosen[-1])
    page = _page(folder, user, tuple(results), _classified(folder / user.key), epochs, program)
    write_atomically(folder / "report.html", render(page).encode())
    write_atomically(folder / "results.json", (json.dumps([vars(r) for r in results], indent=1) + "\n").encode())
    return page


class _Clock:
    """Estimates the time left: like the contestants that are done on average, or longer where this one is slower."""

    def __init__(self, count: int) -> None:
        self.count, self.begin, self.times = count, time.monotonic(), list[float]()
        self.started = self.begin

    def finished(self) -> None:
        now = time.monotonic()
        self.times.append(now - self.started)
        self.started = now

    def remaining(self, number: int, share: float) -> float | None:
        """Seconds left when `share` of contestant `number` (from 0) is trained; None while nothing is known."""
        spent = time.monotonic() - self.started
        at_this_pace = spent / share if share > 0.05 else 0.0
        each = sum(self.times) / len(self.times) if self.times else at_this_pace
        if each == 0.0:
            return None
        return each * (self.count - number - 1) + max(0.0, max(each, at_this_pace) - spent)


def _trained(one: Contestant, data: Path, folder: Path, epochs: float) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "trimtab.demo.child", one.key, str(data), str(folder), str(epochs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        failure = ""
        for line in child.stdout:
            told = json.loads(line)
            if told["kind"] == "error":
                failure = told["text"]
            else:
                yield told
        noise = child.stderr.read()
    if child.returncode:
        cause = failure or (noise.strip().splitlines() or ["no reason given"])[-1]
        raise TrainingError(f"the demo stopped at {one.name}: {cause}")


def _result(one: Contestant, report: dict[str, Any], folder: Path) -> Result:
    metrics = report["metrics"]
    low, high = metrics["intervals"]["accuracy"]
    return Result(
        name=one.name,
        method=report["method"],
        lr=one.lr,
        accuracy=metrics["values"]["accuracy"],
        low=low,
        high=high,
        trainable=report["trainable"],
        seconds=report["seconds"],
        peak_bytes=report["peak_bytes"],
        file_bytes=(folder / FILE_NAME).stat().st_size,
        folder=str(folder),
        reference=one.reference,
    )


def _classified(folder: Path) -> tuple[tuple[str, str], ...]:
    """Load a saved adapter in a new process, as a user would, and classify the samples."""
    command = [sys.executable, "-m", "trimtab.cli", "predict", str(folder), *SAMPLES, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(f"using the saved adapter failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    predictions = json.loads(done.stdout)["predictions"]
    return tuple((entry["text"], entry["output"]) for entry in predictions)


def _page(
    folder: Path,
    user: Contestant,
    results: tuple[Result, ...],
    samples: tuple[tuple[str, str], ...],
    epochs: float,
    program: str,
) -> Page:
    rows = messages()
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "validation", "test")}
    intents = len({row["intent"] for row in rows})
    return Page(
        title=f"Trimtab demo: {len(results)} ways to tune one encoder",
        task=(
            f"The task: {intents} intents of support messages to a software product (written for this project, with "
            f"near misses on purpose), {counts['train']} to train on, {counts['validation']} to validate, "
            f"{counts['test']} to test. The model: the MiniLM sentence encoder, 22.7 million parameters."
        ),
        conditions=(
            f"Everybody trained for {epochs:g} epochs of batch {BATCH}, one seed, at the learning rate found "
            f"beforehand for it; the classifier is part of every adapter. Peak memory is that of the whole process. "
            f"{date.today()}."
        ),
        results=results,
        samples=samples,
        sample_source=user.name,
        commands=(
            f"{program} predict {folder / user.key} 'where did my shared folder go'",
            f"{program} inspect {folder / user.key}",
            f"{program} train minilm {folder / 'data' / 'train.csv'} --method LoRA --output my-lora",
        ),
    )


def contestants_named(keys: Sequence[str]) -> tuple[Contestant, ...]:
    """Return the contestants of these keys, all without any."""
    return tuple(one for one in CONTESTANTS if not keys or one.key in keys)
