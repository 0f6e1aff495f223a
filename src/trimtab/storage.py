"""Adapter files: one safetensors file with everything in its header, written atomically, read strictly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.adapter_file import (
    FILE_NAME,
    FORMAT,
    decode_method,
    digest,
    encode_method,
    file_bytes,
    read_adapter_file,
    tensor_bytes,
    write_atomically,
)
from trimtab.attach import adapters as attached_adapters
from trimtab.attach import build, resolved_part
from trimtab.errors import AdapterFileError, SettingError, TargetError, TrimtabError
from trimtab.fingerprint import difference, fingerprint
from trimtab.method import Method
from trimtab.quantized import whole
from trimtab.structure import Structure
from trimtab.targets import Item
from trimtab.version import __version__

if TYPE_CHECKING:
    from trimtab.adapter import Adapter


def save_adapter(adapter: Adapter, path: str | Path, training: bool) -> Path:
    """Write the adapter's file at `path` (a folder, or a .safetensors file) and return it; raises AdapterFileError.

    The file is written beside its place, flushed, read back, compared, and renamed: a reader finds the old adapter or
    the new one. A folder also gets a README.md for people, which nothing reads back. On a model that is sharded over
    processes each of them must call this; each writes the same bytes.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in adapter.file_tensors(training)}
    if not tensors:
        raise AdapterFileError(f"{file}: adapter {adapter.name!r} holds no tensors to save.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{file}: {name!r} holds NaN or infinite numbers; nothing was written.")
    header = _header(adapter, tensors, training)
    payload = file_bytes(tensors, {"trimtab": json.dumps(header)})
    write_atomically(file, payload)
    if file.name == FILE_NAME:
        write_atomically(file.with_name("README.md"), _card(adapter, file).encode())
    return file


def _header(adapter: Adapter, tensors: dict[str, Tensor], training: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": adapter.name,
        "method": encode_method(adapter.method if training else adapter.method.exported()),
        "items": [[str(item) for item in part.items] for part in adapter.parts],
        "seed": adapter.seed,
        "base_mode": adapter.base_mode,
        "dtype": str(next(adapter.parameters()).dtype).removeprefix("torch."),
        "seeded": {name: digest(whole(t)) for name, t, spec in adapter.named_tensors() if spec.stored == "seed"},
        "sha256": hashlib.sha256(tensor_bytes(file_bytes(tensors))).hexdigest(),
        "fingerprint": fingerprint(adapter.model, replaced_by(adapter)),
        "lineage": list(adapter.lineage),
        "steps": adapter.steps if training else 0,
        "versions": {"trimtab": __version__, "torch": torch.__version__},
    }


def replaced_by(adapter: Adapter) -> set[str]:
    """Return the base parameters ("path:name") that the adapter replaces whole: they are not part of its base."""
    return {str(site) for part in adapter.parts for site in part.sites if getattr(site, "whole", False)}


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    trainable: bool = False,
    accept_other_base: bool = False,
) -> Adapter:
    """Attach a saved adapter to its base model; raises AdapterFileError and leaves the model unchanged on any doubt.

    `trainable`: go on training (otherwise its tensors are frozen and its own dropout is off). `accept_other_base`:
    attach to a base whose weights differ from those it was trained on, for people who mean it.
    """
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    header, tensors = read_adapter_file(path)
    try:
        method = decode_method(header["method"])
        dtype = getattr(torch, header["dtype"], None)
        if not isinstance(dtype, torch.dtype) or header["base_mode"] not in ("follow", "eval"):
            raise SettingError(
                f"header entries dtype={header['dtype']!r}, base_mode={header['base_mode']!r} are unknown."
            )
        adapter = _rebuild(model, method, header, name, dtype)
    except TrimtabError as error:
        raise AdapterFileError(f"{file}: does not fit this model: {error}") from error
    try:
        _check_base(file, header, adapter, accept_other_base)
        _fill(file, header, adapter, tensors)
    except AdapterFileError:
        adapter.detach()
        raise
    adapter.steps = header["steps"]
    adapter.lineage = tuple(str(entry) for entry in header["lineage"])
    if not trainable:
        adapter.trainable = False
        for leaf in adapter.leaves():
            leaf.eval()
    return adapter


def refill(adapter: Adapter, path: str | Path) -> None:
    """Give an attached adapter the state of a file of the same method, places and base; raises AdapterFileError."""
    header, tensors = read_adapter_file(path)
    own = {"method": encode_method(adapter.method), "items": [[str(item) for item in p.items] for p in adapter.parts]}
    differing = [key for key, value in own.items() if json.loads(json.dumps(value)) != header[key]]
    if differing:
        raise AdapterFileError(f"{path}: its {differing[0]} is {header[differing[0]]}, not {own[differing[0]]}.")
    _check_base(Path(path), header, adapter, accept_other_base=False)
    _fill(Path(path), header, adapter, tensors)
    adapter.steps = header["steps"]


def _rebuild(model: nn.Module, method: Method, header: dict[str, Any], name: str | None, dtype: torch.dtype) -> Adapter:
    structure, methods = Structure(model), method.parts()
    if len(methods) != len(header["items"]):
        raise SettingError(f"the method has {len(methods)} parts, the file describes {len(header['items'])}.")
    chosen = name or header["name"]
    if chosen in attached_adapters(model):
        raise SettingError(f"an adapter named {chosen!r} is attached already; pass name=….")
    parts = []
    for index, (part, items) in enumerate(zip(methods, header["items"], strict=True)):
        places = [Item(p, q or None) for p, _, q in (str(item).partition(":") for item in items)]
        absent = [place.path for place in places if place.path not in structure.modules]
        if absent:
            raise TargetError(
                f"this model has no module {absent[0]!r} ({len(absent)} of {len(places)} places are missing)."
            )
        parts.append(resolved_part(structure, part, index, places))
    return build(model, method, parts, chosen, header["seed"], dtype, header["base_mode"])


def _check_base(file: Path, header: dict[str, Any], adapter: Adapter, accept_other_base: bool) -> None:
    try:
        problem, _ = difference(header["fingerprint"], adapter.model, replaced_by(adapter))
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{file}: its description of the base is damaged.") from error
    if problem is not None and not accept_other_base:
        raise AdapterFileError(
            f"{file}: was trained on another base model: {problem}. Load the base it was trained on, or pass "
            f"accept_other_base=True if you mean it."
        )


def _fill(file: Path, header: dict[str, Any], adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    left = dict(tensors)
    with torch.no_grad():
        for name, tensor, spec in adapter.named_tensors():
            if spec.stored == "seed" and digest(tensor) != header["seeded"].get(name):
                raise AdapterFileError(f"{file}: {name!r} cannot be rebuilt from its seed on this machine.")
            if spec.stored not in ("always", "training") or (spec.stored == "training" and name not in left):
                continue
            found = left.pop(name, None)
            if found is None:
                raise AdapterFileError(f"{file}: the tensor {name!r} is missing.")
            if tuple(found.shape) != tuple(tensor.shape):
                raise AdapterFileError(
                    f"{file}: {name!r} has shape {tuple(found.shape)}, this model needs {tuple(tensor.shape)}."
                )
            tensor.copy_(found)
    if left:
        raise AdapterFileError(f"{file}: holds the unknown tensor {next(iter(left))!r} ({len(left)} in all).")


def _card(adapter: Adapter, file: Path) -> str:
    return (
        f"# Adapter `{adapter.name}`\n\nMethod: `{adapter.method!r}`\n\n```text\n{adapter.report()}\n```\n\n"
        f"Load it with `trimtab.load(model, {str(file.parent.name)!r})`.\n"
    )
