"""`trimtab export` and `trimtab import`: adapters in the format of huggingface/peft."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from trimtab.adapter_file import FILE_NAME
from trimtab.cli.console import show, show_json
from trimtab.cli.merge import construction, open_adapter
from trimtab.cli.options import AcceptOtherBase, AsJson
from trimtab.cli.plan import MODEL_HELP, example_task
from trimtab.errors import AdapterFileError
from trimtab.storage import replaced_by
from trimtab.structure import Structure
from trimtab.training.architectures import load_as_saved, make_skeleton
from trimtab.training.classification import Classification
from trimtab.training.model_sources import resolve_model
from trimtab.training.models import load_model
from trimtab.training.run_settings import method_text
from trimtab.training.tasks import TASKS


def export_adapter(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    file: Annotated[Path, typer.Argument(help="An adapter file, or the folder that holds one.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the exported adapter.")],
    rank: Annotated[int | None, typer.Option(help="Reduce every change to this rank. Default: its own.")] = None,
    accept_other_base: AcceptOtherBase = False,
    json: AsJson = False,
) -> None:
    """Write an adapter as a LoRA that huggingface/peft and serving engines read."""
    from trimtab.interop.peft import export_lora

    adapter, _ = open_adapter(model, file, folder, accept_other_base)
    receipt = export_lora(adapter, folder, base_model_name=resolve_model(model).location, rank=rank)
    if json:
        show_json({"method": method_text(adapter.method)} | dataclasses.asdict(receipt) | {"folder": str(folder)})
        return
    show(
        f"{receipt}\n\nUse it:",
        f"  base = {construction(adapter.model, model)}",
        f"  model = peft.PeftModel.from_pretrained(base, {str(folder)!r})",
    )


def import_adapter(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    folder: Annotated[Path, typer.Argument(help="A folder that huggingface/peft wrote.")],
    output: Annotated[Path, typer.Argument(help="A folder (or .safetensors file) for the adapter.")],
    task: Annotated[str | None, typer.Option(help=f"{', '.join(TASKS)}. Default: what the folder says.")] = None,
    json: AsJson = False,
) -> None:
    """Read an adapter that huggingface/peft wrote and save it as one of ours."""
    from trimtab.interop import peft

    target = output if output.suffix == ".safetensors" else output / FILE_NAME
    if target.exists():
        raise AdapterFileError(f"{target} exists already and is left as it is. Give another place.")
    base, fresh = _base_of(model, folder, task)
    adapter = peft.import_adapter(base, folder)
    own = {name.replace(":", ".") for name in replaced_by(adapter.parts)}
    drawn = [name for name in fresh if name not in own]
    if drawn:
        raise AdapterFileError(
            f"{folder}: does not hold {drawn[0]!r}, and {model!r} has none: it would be random numbers. Give the base "
            "with its trained head."
        )
    written = adapter.save(output)
    if json:
        show_json({"file": str(written), "method": method_text(adapter.method), "trainable": adapter.trainable_count})
        return
    names = " + ".join(f"{type(part.method).__name__} at {len(part.sites)} places" for part in adapter.parts)
    show(
        f"imported {names}: {adapter.trainable_count:,} numbers, {written}\n\nUse it:",
        f"  base = {construction(base, model)}",
        f"  adapter = trimtab.load(base, {str(output)!r})",
    )


def _base_of(model: str, folder: Path, task: str | None) -> tuple[nn.Module, tuple[str, ...]]:
    """Load the base of a folder that peft wrote, for its task; returns also the names of what was drawn for it."""
    from trimtab.interop import peft

    wanted = task or (Classification.name if peft.is_classifier(folder) else None)
    if wanted is None:
        return load_as_saved(model), ()
    chosen = example_task(wanted, 2)
    if isinstance(chosen, Classification):
        skeleton = make_skeleton(model, chosen)
        if not skeleton.fresh:
            return load_as_saved(model), ()
        head = Structure(skeleton.model).head or "classifier"
        labels = peft.rows_of(folder, head)
        if labels is None:
            raise AdapterFileError(
                f"{folder}: holds no head {head!r} for a classification, and {model!r} has none. Give the base with "
                f"its trained head, or another --task: {', '.join(TASKS)}."
            )
        chosen = example_task(wanted, labels)
    loaded = load_model(model, chosen, seed=0)
    return loaded.model, loaded.fresh
