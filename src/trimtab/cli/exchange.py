"""`trimtab export` and `trimtab import`: adapters in the format of huggingface/peft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.console import show, show_json
from trimtab.cli.merge import load_base
from trimtab.cli.plan import MODEL_HELP
from trimtab.errors import AdapterFileError
from trimtab.report import bytes_text
from trimtab.storage import FILE_NAME, load, read_adapter_file
from trimtab.training.merged import check_output
from trimtab.training.run_settings import method_text


def export_adapter(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    file: Annotated[Path, typer.Argument(help="An adapter file, or the folder that holds one.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the exported adapter.")],
    accept_other_base: Annotated[
        bool, typer.Option("--accept-other-base", help="Use another base on purpose.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write an adapter as a LoRA that huggingface/peft and serving engines read."""
    from trimtab.interop.peft import export_lora

    read_adapter_file(file)
    check_output(folder)
    base, _ = load_base(model, file)
    adapter = load(base, file, accept_other_base=accept_other_base)
    export_lora(adapter, folder)
    size = sum(entry.stat().st_size for entry in folder.iterdir())
    if json:
        show_json({"folder": str(folder), "size": size, "method": method_text(adapter.method)})
        return
    show(f"exported {method_text(adapter.method)}: {folder}, {bytes_text(size)}")


def import_adapter(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    folder: Annotated[Path, typer.Argument(help="A folder that huggingface/peft wrote.")],
    output: Annotated[Path, typer.Argument(help="A folder (or .safetensors file) for the adapter.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
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
