"""`trimtab merge`: base and adapter as one ordinary model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from trimtab.adapter import Adapter
from trimtab.adapter_file import read_adapter_file
from trimtab.cli.console import show, show_json
from trimtab.cli.options import AcceptOtherBase, AsJson
from trimtab.cli.plan import MODEL_HELP, example_task
from trimtab.storage import load
from trimtab.structure import Structure
from trimtab.training.architectures import load_as_saved, load_tokenizer_if_any
from trimtab.training.classification import Classification
from trimtab.training.merged import check_output, save_merged
from trimtab.training.models import load_model
from trimtab.training.run_folder import find_record


def merge(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    file: Annotated[Path, typer.Argument(help="An adapter file, or the folder that holds one.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    untie: Annotated[
        bool, typer.Option("--untie", help="Let tied weights come apart where the adapter needs it.")
    ] = False,
    accept_other_base: AcceptOtherBase = False,
    json: AsJson = False,
) -> None:
    """Write the adapter's change into the weights and save the whole model with transformers."""
    adapter, tokenizer = open_adapter(model, file, output, accept_other_base)
    saved = save_merged(adapter, tokenizer, output, untie)
    if json:
        show_json({"folder": str(saved.folder), "size": saved.size, "receipt": dataclasses.asdict(saved.receipt)})
        return
    show(str(saved), f"\nUse it:\n  transformers.{type(adapter.model).__name__}.from_pretrained({str(output)!r})")


def open_adapter(model: str, file: Path, output: Path, accept_other_base: bool) -> tuple[Adapter, Any]:
    """Load an adapter on its base, and the tokenizer; refuse first what needs no base to be refused."""
    read_adapter_file(file)
    check_output(output)
    base, tokenizer = load_base(model, file)
    return load(base, file, accept_other_base=accept_other_base), tokenizer


def load_base(model: str, file: Path | None = None) -> tuple[nn.Module, Any]:
    """Load the base of an adapter with its tokenizer: for the run's task where the file lies in a run's folder.

    Elsewhere as the model was saved; for a classification where the file holds a head that the saved model has not.
    """
    record = None if file is None else find_record(file)
    if record is not None:
        loaded = load_model(model, record.task, record.settings.loop.seed, dtype=record.settings.dtype)
        return loaded.model, loaded.tokenizer
    base = load_as_saved(model)
    classes = None if file is None else _classes_of(file, base)
    if classes is None:
        return base, load_tokenizer_if_any(model)
    loaded = load_model(model, example_task(Classification.name, classes), seed=0)
    return loaded.model, loaded.tokenizer


def _classes_of(file: Path, base: nn.Module) -> int | None:
    """Return the rows of the last weight that a file holds whole for a module that the base has not, if any."""
    _, tensors = read_adapter_file(file)
    known, rows = Structure(base).modules, None
    for name, tensor in tensors.items():
        _, place, kind = name.split("/")
        if place.endswith(":weight") and kind == "value" and place.removesuffix(":weight") not in known:
            rows = len(tensor)
    return rows
