"""`trimtab export` and `trimtab import`: adapters in the format of huggingface/peft."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from trimtab.adapter_file import FILE_NAME
from trimtab.cli.console import show, show_json
from trimtab.cli.merge import load_base, open_adapter
from trimtab.cli.options import AcceptOtherBase, AsJson
from trimtab.cli.plan import MODEL_HELP
from trimtab.errors import AdapterFileError
from trimtab.training.model_sources import resolve_model
from trimtab.training.run_settings import method_text


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
    show(str(receipt), f"\nUse it:\n  peft.PeftModel.from_pretrained(base, {str(folder)!r})")


def import_adapter(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    folder: Annotated[Path, typer.Argument(help="A folder that huggingface/peft wrote.")],
    output: Annotated[Path, typer.Argument(help="A folder (or .safetensors file) for the adapter.")],
    json: AsJson = False,
) -> None:
    """Read an adapter that huggingface/peft wrote and save it as one of ours."""
    from trimtab.interop import peft

    target = output if output.suffix == ".safetensors" else output / FILE_NAME
    if target.exists():
        raise AdapterFileError(f"{target} exists already and is left as it is. Give another place.")
    base, _ = load_base(model)
    adapter = peft.import_adapter(base, folder)
    written = adapter.save(output)
    if json:
        show_json({"file": str(written), "method": method_text(adapter.method), "trainable": adapter.trainable_count})
        return
    show(f"imported {method_text(adapter.method)}: {adapter.trainable_count:,} numbers, {written}")
