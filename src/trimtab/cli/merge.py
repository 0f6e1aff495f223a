"""`trimtab merge`: base and adapter as one ordinary model, or several adapters as one LoRA."""

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
from trimtab.errors import SettingError, suggestion
from trimtab.hooks import base_class
from trimtab.storage import load
from trimtab.structure import Structure
from trimtab.training.architectures import load_as_saved, load_tokenizer_if_any, make_skeleton
from trimtab.training.classification import Classification
from trimtab.training.merged import check_output, save_merged
from trimtab.training.model_sources import resolve_model
from trimtab.training.models import load_model
from trimtab.training.run_folder import find_record


def merge(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    file: Annotated[Path, typer.Argument(help="An adapter file, or the folder that holds one.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    untie: Annotated[
        bool, typer.Option("--untie", help="Let tied weights come apart where the adapter needs it.")
    ] = False,
    into: Annotated[str | None, typer.Option(help="'lora': write one LoRA adapter instead of a model.")] = None,
    rank: Annotated[int | None, typer.Option(help="With --into lora: its rank.")] = None,
    add: Annotated[
        list[Path] | None, typer.Option(help="With --into lora: another adapter to add (may be repeated).")
    ] = None,
    factors: Annotated[
        str | None, typer.Option(help="With --into lora: a number for FILE and each --add, as 0.5,0.5. Default: all 1.")
    ] = None,
    accept_other_base: AcceptOtherBase = False,
    json: AsJson = False,
) -> None:
    """Write the adapter's change into the weights and save the whole model with transformers.

    With --into lora: write the sum of the changes of adapters, of whatever methods, as one LoRA of a rank.
    """
    if into is not None:
        _combine(model, [file, *(add or ())], output, into, rank, factors, accept_other_base, json)
        return
    given = {"--rank": rank, "--add": add or None, "--factors": factors}
    if unused := [name for name, value in given.items() if value is not None]:
        raise SettingError(f"{unused[0]} is for adapters as one LoRA: give --into lora as well.")
    adapter, tokenizer = open_adapter(model, file, output, accept_other_base)
    saved = save_merged(adapter, tokenizer, output, untie)
    if json:
        show_json({"folder": str(saved.folder), "size": saved.size, "receipt": dataclasses.asdict(saved.receipt)})
        return
    show(str(saved), f"\nUse it:\n  transformers.{type(adapter.model).__name__}.from_pretrained({str(output)!r})")


def _combine(
    model: str, files: list[Path], output: Path, into: str, rank: int | None, factors: str | None,
    accept_other_base: bool, json: bool,
) -> None:  # fmt: skip
    """Write the weighted sum of the changes of adapter files as one LoRA into `output`."""
    from trimtab.merging.arithmetic import combine

    if into != "lora":
        raise SettingError(f"--into {into}: adapters can be merged into 'lora'." + suggestion(into, ("lora",)))
    if rank is None:
        raise SettingError("--into lora needs --rank, the rank of the LoRA; what is lost by it is told.")
    numbers = _numbers(factors, len(files))
    for file in files:
        read_adapter_file(file)
    check_output(output)
    base, _ = load_base(model, files[0])
    adapter, receipt = combine(base, list(zip(files, numbers, strict=True)), rank, accept_other_base=accept_other_base)
    written = adapter.save(output)
    if json:
        show_json({"file": str(written), "receipt": dataclasses.asdict(receipt)})
        return
    show(
        f"{receipt}\n{written}\n\nUse it:",
        f"  base = {construction(base, model)}",
        f"  adapter = trimtab.load(base, {str(output)!r})",
    )


def _numbers(factors: str | None, count: int) -> list[float]:
    if factors is None:
        return [1.0] * count
    try:
        numbers = [float(part) for part in factors.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise SettingError(f"--factors {factors}: give {count} numbers joined by commas, one for each adapter.")
    return numbers


def open_adapter(model: str, file: Path, output: Path, accept_other_base: bool) -> tuple[Adapter, Any]:
    """Load an adapter on its base, and the tokenizer; refuse first what needs no base to be refused."""
    read_adapter_file(file)
    check_output(output)
    base, tokenizer = load_base(model, file)
    return load(base, file, accept_other_base=accept_other_base), tokenizer


def load_base(model: str, file: Path) -> tuple[nn.Module, Any]:
    """Load the base of an adapter with its tokenizer: for the run's task where the file lies in a run's folder.

    Elsewhere as the model was saved; for a classification where the file holds a head that the saved model has not.
    """
    record = find_record(file)
    if record is not None:
        loaded = load_model(model, record.task, record.settings.loop.seed, dtype=record.settings.dtype)
        return loaded.model, loaded.tokenizer
    classes = _classes_of(file, model)
    if classes is None:
        return load_as_saved(model), load_tokenizer_if_any(model)
    loaded = load_model(model, example_task(Classification.name, classes), seed=0)
    return loaded.model, loaded.tokenizer


def _classes_of(file: Path, model: str) -> int | None:
    """Return the rows of the last weight that a file holds whole for a module that the saved model has not, if any."""
    _, tensors = read_adapter_file(file)
    known, rows = Structure(make_skeleton(model).model).modules, None
    for name, tensor in tensors.items():
        _, place, kind = name.split("/")
        if place.endswith(":weight") and kind == "value" and place.removesuffix(":weight") not in known:
            rows = len(tensor)
    return rows


def construction(base: Any, model: str) -> str:
    """Return the expression that builds a base model as it is here."""
    name = base_class(base).__name__
    labels = f", num_labels={base.config.num_labels}" if name.endswith("ForSequenceClassification") else ""
    return f"transformers.{name}.from_pretrained({resolve_model(model).location!r}{labels})"
