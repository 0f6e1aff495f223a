"""The adapter file itself: written whole or not at all, read strictly; what it says is data, never code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import TensorSpec, serialize
from torch import Tensor

from trimtab.errors import AdapterFileError, SettingError
from trimtab.method import Method, check_settings, find_method, settings_of
from trimtab.report import bytes_text

FORMAT = 1
FILE_NAME = "adapter.safetensors"
_HEADER_LIMIT = 10 * 2**20


def file_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return contiguous tensors on the processor as the bytes of a safetensors file (its own `save` needs numpy)."""
    specs = {
        name: TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."), shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes
        )
        for name, t in tensors.items()
    }
    return bytes(serialize(specs, metadata))


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values."""
    return hashlib.sha256(file_bytes({"t": tensor.detach().cpu().contiguous()})).hexdigest()


def tensor_bytes(payload: bytes) -> bytes:
    """Return the part of a safetensors file behind its header."""
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
            f"{file}: cannot be written ({cause}); an older file there is untouched. Free space or choose another."
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
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("name"), str)
        or not isinstance(data.get("settings"), dict)
    ):
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
        raise AdapterFileError(
            f"{file}: has format {header['format']}, this version reads up to {FORMAT}; upgrade trimtab."
        )
    if hashlib.sha256(tensor_bytes(payload)).hexdigest() != header["sha256"]:
        raise AdapterFileError(
            f"{file}: the tensor bytes do not match their checksum; the file is damaged. Fetch it again."
        )
    try:
        tensors = safetensors.torch.load(payload)
    except Exception as error:
        raise AdapterFileError(f"{file}: is not a readable safetensors file ({error}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{file}: {name!r} holds NaN or infinite numbers.")
    return header, tensors


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("format", "seed", "steps"), int),
    **dict.fromkeys(("name", "base_mode", "dtype", "sha256"), str),
    **dict.fromkeys(("method", "seeded", "fingerprint", "versions"), dict),
    **dict.fromkeys(("items", "lineage"), list),
}


def _checked_header(file: Path, payload: bytes) -> dict[str, Any]:
    size = int.from_bytes(payload[:8], "little") if len(payload) >= 8 else 0
    if not 2 <= size <= min(_HEADER_LIMIT, len(payload) - 8):
        raise AdapterFileError(f"{file}: is not a safetensors file, or is cut short ({bytes_text(len(payload))}).")
    try:
        header: Any = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["trimtab"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file}: holds no Trimtab header; it is damaged or from another library.") from error
    for field, kind in _FIELDS.items():
        if not isinstance(header, dict) or type(header.get(field)) is not kind:
            raise AdapterFileError(
                f"{file}: header entry {field!r} is missing or not a {kind.__name__}; the file is damaged."
            )
    return dict(header)
