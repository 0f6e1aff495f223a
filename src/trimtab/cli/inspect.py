"""`trimtab inspect`: what is in an adapter file, without any model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from trimtab.adapter_file import FILE_NAME, decode_method, naming, read_adapter_file
from trimtab.cli.console import Grid, count_text, show, show_json
from trimtab.cli.options import AsJson
from trimtab.planning import bytes_text
from trimtab.training.run_settings import method_text


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file, or the folder that holds one.")],
    json: AsJson = False,
) -> None:
    """Check an adapter file and show its method, sites, tensors and the base it was trained on."""
    header, tensors = read_adapter_file(file)
    path = file / FILE_NAME if file.is_dir() else file
    with naming(path, "cannot be read: {}"):
        facts = _facts(header, tensors, path)
    if json:
        show_json(facts | {"items": header["items"], "tensors": [_entry(*pair) for pair in tensors.items()]})
        return
    rows = tuple(
        (name, "×".join(map(str, tensor.shape)) or "1", str(tensor.dtype).removeprefix("torch."), _size(tensor))
        for name, tensor in tensors.items()
    )
    named = facts | {"size": f"{count_text(path.stat().st_size)} bytes"}
    described = tuple((name.replace("_", " "), _text(value)) for name, value in named.items())
    show(Grid(("entry", "value"), described), "", Grid(("tensor", "shape", "dtype", "size"), rows))


def _facts(header: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, object]:
    base = header["fingerprint"]
    return {
        "file": str(path),
        "size": path.stat().st_size,
        "name": header["name"],
        "method": method_text(decode_method(header["method"])),
        "places": sum(len(items) for items in header["items"]),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
        "dtype": header["dtype"],
        "seed": header["seed"],
        "base_mode": header["base_mode"],
        "base_parameters": len(base.get("shapes", {})),
        "base_precision": sorted(set(base.get("precision", {}).values())),
        "base_digest": hashlib.sha256(repr(sorted(base.get("shapes", {}).items())).encode()).hexdigest(),
        "lineage": header["lineage"],
        "rebuilt_from_the_seed": len(header["seeded"]),
        "versions": header["versions"],
        "format": header["format"],
    }


def _entry(name: str, tensor: Tensor) -> dict[str, object]:
    return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _size(tensor: Tensor) -> str:
    return bytes_text(tensor.numel() * tensor.element_size())


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    return count_text(value) if isinstance(value, int) else str(value)
