"""Adapter files: one safetensors file with everything in its header, written atomically, read strictly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from torch import Tensor, nn

from trimtab.attach import adapters as attached_adapters
from trimtab.attach import build, resolved_part
from trimtab.errors import AdapterFileError, SettingError, TargetError, TrimtabError
from trimtab.fingerprint import difference, fingerprint
from trimtab.method import Method, check_settings, find_method, settings_of
from trimtab.report import bytes_text
from trimtab.structure import Structure
from trimtab.targets import Item

if TYPE_CHECKING:
    from trimtab.adapter import Adapter

FORMAT = 1
FILE_NAME = "adapter.safetensors"
_HEADER_LIMIT = 10 * 2**20


def save_adapter(adapter: Adapter, path: str | Path, training: bool) -> Path:
    """Write the adapter's file at `path` (a folder, or a .safetensors file) and return it; raises AdapterFileError.

    The file is written beside its place, flushed, read back, compared, and renamed: a reader finds the old adapter or
    the new one. A folder also gets a README.md for people, which nothing reads back.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.file_tensors(training)}
    if not tensors:
        raise AdapterFileError(f"{file}: adapter {adapter.name!r} holds no tensors to save.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{file}: {name!r} holds NaN or infinite numbers; nothing was written.")
    header = _header(adapter, tensors, training)
    payload = safetensors.torch.save(tensors, {"trimtab": json.dumps(header)})
    write_atomically(file, payload)
    if file.name == FILE_NAME:
        write_atomically(file.with_name("README.md"), _card(adapter, file).encode())
    return file


def _header(adapter: Adapter, tensors: dict[str, Tensor], training: bool) -> dict[str, Any]:
    import trimtab

    return {
        "format": FORMAT,
        "name": adapter.name,
        "method": encode_method(adapter.method if training else adapter.method.exported()),
        "items": [[str(item) for item in part.items] for part in adapter.parts],
        "seed": adapter.seed,
        "base_mode": adapter.base_mode,
        "dtype": str(next(adapter.parameters()).dtype).removeprefix("torch."),
        "seeded": {name: digest(tensor) for name, tensor, spec in adapter.named_tensors() if spec.stored == "seed"},
        "sha256": hashlib.sha256(_buffer(safetensors.torch.save(tensors))).hexdigest(),
        "fingerprint": fingerprint(adapter.model, replaced_by(adapter)),
        "lineage": list(adapter.lineage),
        "steps": adapter.steps if training else 0,
        "versions": {"trimtab": trimtab.__version__, "torch": torch.__version__},
    }


def replaced_by(adapter: Adapter) -> set[str]:
    """Return the base parameters ("path:name") that the adapter replaces whole: they are not part of its base."""
    return {str(site) for part in adapter.parts for site in part.sites if getattr(site, "whole", False)}


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values."""
    return hashlib.sha256(safetensors.torch.save({"t": tensor.detach().cpu().contiguous()})).hexdigest()


def _buffer(payload: bytes) -> bytes:
    return payload[8 + int.from_bytes(payload[:8], "little") :]


def write_atomically(file: Path, payload: bytes) -> None:
    """Put a file in its place whole or not at all; raises AdapterFileError naming file and cause."""
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        if Path(temporary).read_bytes() != payload:
            raise AdapterFileError(f"{file}: what was written could not be read back; the old file is untouched.")
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
        temporary = None
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        cause = error.strerror or str(error)
        raise AdapterFileError(
            f"{file}: cannot be written ({cause}); an older file there is untouched. Free space or choose another place."
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def encode_method(method: Method) -> dict[str, Any]:
    """Return a method as data: its name and the settings that differ from their defaults."""
    return {"name": type(method).__name__, "settings": {k: _encode(v) for k, v in settings_of(method).items()}}


def _encode(value: Any) -> Any:
    if isinstance(value, Method):
        return encode_method(value)
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return None if callable(value) else value


def decode_method(data: Any) -> Method:
    """Return the method that `encode_method` described; raises TrimtabError for anything else."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str) or not isinstance(data.get("settings"), dict):
        raise SettingError(f"a method is described by a name and settings, found {str(data)[:80]!r}.")
    cls = find_method(data["name"])
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    decoded = {k: _decode(v, hints.get(k)) for k, v in data["settings"].items() if v is not None or k not in known}
    method = cls(**decoded)
    check_settings(method)
    return method


def _decode(value: Any, hint: Any) -> Any:
    if isinstance(value, dict) and "name" in value:
        return decode_method(value)
    if isinstance(value, list):
        inner = get_args(hint)[0] if get_origin(hint) is tuple else None
        return tuple(_decode(item, inner) for item in value)
    return value


def read_adapter_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check a file without a model; returns (header, tensors). Raises AdapterFileError."""
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise AdapterFileError(f"{file}: cannot be read ({error.strerror or error}).") from error
    header = _checked_header(file, payload)
    if header["format"] > FORMAT:
        raise AdapterFileError(f"{file}: has format {header['format']}, this version reads up to {FORMAT}; upgrade trimtab.")
    if hashlib.sha256(_buffer(payload)).hexdigest() != header["sha256"]:
        raise AdapterFileError(f"{file}: the tensor bytes do not match their checksum; the file is damaged. Fetch it again.")
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:
        raise AdapterFileError(f"{file}: is not a readable safetensors file ({error}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{file}: {name!r} holds NaN or infinite numbers.")
    return header, tensors


_FIELDS = {"format": int, "name": str, "method": dict, "items": list, "seed": int, "base_mode": str, "dtype": str,
           "seeded": dict, "sha256": str, "fingerprint": dict, "lineage": list, "steps": int, "versions": dict}  # fmt: skip


def _checked_header(file: Path, payload: bytes) -> dict[str, Any]:
    size = int.from_bytes(payload[:8], "little") if len(payload) >= 8 else 0
    if not 2 <= size <= min(_HEADER_LIMIT, len(payload) - 8):
        raise AdapterFileError(f"{file}: is not a safetensors file, or is cut short ({bytes_text(len(payload))}).")
    try:
        header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["trimtab"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file}: holds no Trimtab header; it is damaged or from another library.") from error
    for field, kind in _FIELDS.items():
        if not isinstance(header, dict) or type(header.get(field)) is not kind:
            raise AdapterFileError(f"{file}: header entry {field!r} is missing or not a {kind.__name__}; the file is damaged.")
    return header


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
            raise SettingError(f"header entries dtype={header['dtype']!r}, base_mode={header['base_mode']!r} are unknown.")
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
            raise TargetError(f"this model has no module {absent[0]!r} ({len(absent)} of {len(places)} places are missing).")
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
