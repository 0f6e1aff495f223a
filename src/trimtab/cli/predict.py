"""`trimtab predict`: use what a run has trained."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.console import Grid, show, show_json
from trimtab.cli.options import AcceptOtherBase, AsJson
from trimtab.errors import SettingError
from trimtab.training.classification import Classification
from trimtab.training.data import read_table
from trimtab.training.errors import DataError
from trimtab.training.prediction import predict as predict_rows
from trimtab.training.run import input_column, load_run
from trimtab.training.table import Table

NEW_TOKENS = 64


def predict(
    run: Annotated[Path, typer.Argument(help="The folder in which `trimtab train` left a run.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; '-' reads one from each line of the input.")] = None,
    file: Annotated[str | None, typer.Option(help="Data to read the texts from, instead.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of the texts. Default: the one trained on.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model, where it is not at its place any more.")] = None,
    accept_other_base: AcceptOtherBase = False,
    batch_size: Annotated[int, typer.Option(help="Texts computed at once.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a generated text. Default: 64.")] = None,
    json: AsJson = False,
) -> None:
    """Classify or continue texts with a trained adapter."""
    if bool(texts) == (file is not None):
        raise SettingError(
            "give texts, or --file with the data that holds them; found " + ("both." if texts else "neither.")
        )
    if column is not None and file is None:
        raise SettingError(f"--column {column!r} names a column of --file, and there is none; leave it out.")
    record, loaded, _ = load_run(run, model, accept_other_base)
    if max_new_tokens is not None and isinstance(record.task, Classification):
        raise SettingError(f"--max-new-tokens {max_new_tokens}: this run classifies and writes no text; leave it out.")
    chosen = input_column(record.task) if column is None else column
    rows = read_table(file) if file is not None else _typed(texts or [], chosen)
    found = predict_rows(
        loaded, record.task, rows, chosen, record.max_length, batch_size=batch_size,
        max_new_tokens=NEW_TOKENS if max_new_tokens is None else max_new_tokens,
    )  # fmt: skip
    if json:
        show_json({"run": str(run), "predictions": [dataclasses.asdict(entry) for entry in found]})
    elif any(entry.probability is not None for entry in found):
        lines = tuple((entry.output, f"{entry.probability:.3f}", entry.text) for entry in found)
        show(Grid(("label", "probability", "text"), lines))
    else:
        show(*(f"{entry.text} → {entry.output}" for entry in found))


def _typed(texts: list[str], column: str) -> Table:
    source = "the command line"
    if texts == ["-"]:
        source, texts = "the input", [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not texts:
            raise DataError("the input holds no text; give one text in each line.")
    return Table(source, (column,), tuple((text,) for text in texts), tuple(range(1, len(texts) + 1)))
