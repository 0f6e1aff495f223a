"""The adapter file itself: written whole or not at all, read strictly; what it says is data, never code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import TensorSpec, serialize
from torch import Tensor

from trimtab.errors import AdapterFileError, SettingError, TrimtabError
from trimtab.method import Method, check_settings, find_method, fits, settings_of
from trimtab.quantized import for_file

_dump = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
FORMAT, FILE_NAME = 1, "adapter.safetensors"
_UNSEALED = b"0" * 64  # stands in the place of the file's SHA-256 while that is taken
_HEADER_BYTES, _HEADER_VALUES, _HEADER_METHODS, _STALE_SECONDS = 4 * 2**20, 200_000, 100, 3600
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_ENTRIES: dict[str, Any] = {
    "format": int, "sha256": str, "name": str, "seed": int, "items": list[list[str]], "lineage": list[str],
    "method": dict[str, Any], "fingerprint": dict[str, Any], "seeded": dict[str, str], "versions": dict[str, str],
    "base_mode": Literal["follow", "eval"], "dtype": Literal["float64", "float32", "float16", "bfloat16"], "steps": int,
}  # fmt: skip


def file_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return contiguous tensors on the processor as the bytes of a safetensors file (its own `save` needs numpy)."""
    specs = {
        name: TensorSpec(dtype=str(t.dtype).split(".")[1], shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes)
        for name, t in tensors.items()
    }
    return bytes(serialize(specs, metadata))


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values."""
    return hashlib.sha256(file_bytes({"t": for_file(tensor)})).hexdigest()


@contextlib.contextmanager
def naming(file: Path, problem: str) -> Iterator[None]:
    """Turn any error inside (a stranger's file may lead to every kind) into one of file and `problem`, cause for {}."""
    try:
        yield
    except Exception as error:
        known = str(error) if isinstance(error, TrimtabError) else getattr(error, "strerror", None)
        cause = f"{known or f'{type(error).__name__}: {error}':.1000}"  # a stranger's file may also say very much
        raise AdapterFileError(f"{file}: {problem.format(cause)}") from error


def write_adapter_file(
    path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor], card: str, write: bool = True
) -> Path:
    """Write what can be read again, or nothing; `path`: a .safetensors file, or a folder, which gets the card too."""
    file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / FILE_NAME
    with naming(file, "cannot be written: {}"):
        text = _dump({"sha256": "", "format": FORMAT} | header | {"sha256": _UNSEALED.decode()})
        payload = bytearray(file_bytes(tensors, {"trimtab": text}))
        place = payload.index(_UNSEALED)
        payload[place : place + 64] = hashlib.sha256(payload).hexdigest().encode()
        _parsed(payload)
    if write:
        write_atomically(file, payload)
    if write and file.name == FILE_NAME:
        write_atomically(file.with_name("README.md"), card.encode())
    return file


def write_atomically(file: Path, payload: bytes | bytearray) -> None:
    """Put a file in its place whole or not at all; raises AdapterFileError naming file and cause."""
    part = ""
    try:
        with naming(file, "cannot be written ({}); an older file there is untouched. Free space or choose another."):
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".part")
            with os.fdopen(handle, "wb") as stream:
                stream.write(payload)
                stream.flush()
                os.fsync(handle)
            if Path(part).read_bytes() != payload:
                raise TrimtabError("it reads back differently")
            os.chmod(part, 0o644)
            os.replace(part, file)
        with naming(file, "is written, but may be lost if power fails ({})."), contextlib.ExitStack() as opened:
            folder = os.open(file.parent, os.O_RDONLY)
            opened.callback(os.close, folder)
            os.fsync(folder)
    finally:
        with contextlib.suppress(OSError, ValueError):
            Path(part).unlink(missing_ok=True)
            left_by_kills = [p for p in file.parent.glob(".*.part") if p.name.startswith(f".{file.name}.")]
            for old in [p for p in left_by_kills if time.time() - p.stat().st_mtime > _STALE_SECONDS]:
                old.unlink()  # a young one may belong to a save that goes on now


def encode_method(method: Method) -> dict[str, Any]:
    """Return a method as data: its name and the settings that differ from their defaults, functions left out."""
    settings = {key: _encode(value) for key, value in settings_of(method).items() if not callable(value)}
    return {"name": type(method).__name__, "settings": settings}


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return encode_method(value) if isinstance(value, Method) else value


def decode_method(data: Any) -> Method:
    """Return the method that `encode_method` described; raises TrimtabError for anything else."""
    if not (isinstance(data, dict) and fits(data.get("name"), str) and fits(data.get("settings"), dict)):
        raise SettingError(f"a method is described by a name and settings, found {str(data)[:80]!r}.")
    method = find_method(data["name"])(**{key: _decode(value) for key, value in data["settings"].items()})
    check_settings(method)
    return method


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_decode, value))
    return decode_method(value) if isinstance(value, dict) else value


def read_adapter_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check a file without a model; returns (header, tensors). Raises AdapterFileError."""
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    with naming(file, "cannot be read: {}"):
        if file.exists() and not file.is_file():
            raise TrimtabError("it is not a file.")  # a pipe would never end
        with file.open("rb") as stream:
            payload = bytearray(os.fstat(stream.fileno()).st_size)
            stream.readinto(payload)
        header, tensors = _parsed(payload)
    return header, tensors


def _parsed(payload: bytearray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors, which share the memory of the bytes: nothing that a file says makes it larger."""
    start = 8 + int.from_bytes(payload[:8], "little")
    if not 8 < start <= min(_HEADER_BYTES + len(payload) // 8, len(payload)):
        raise TrimtabError("it is not a safetensors file, or is cut short, or has a huge header. Fetch it again.")
    view = memoryview(payload)
    table = _json(str(view[8:start], "utf-8"), len(payload))
    if not isinstance(text := table.pop("__metadata__", {}).get("trimtab"), str):
        raise TrimtabError("it holds no Trimtab header; it is damaged or from another library.")
    header = _json(text, len(payload))
    if header["format"] != FORMAT:
        raise TrimtabError(f"it has format {header['format']!r:.80}, this version reads {FORMAT}; upgrade trimtab.")
    place = payload.index(header["sha256"].encode())
    checksum = hashlib.sha256(view[:place])
    checksum.update(_UNSEALED)
    checksum.update(view[place + 64 :])
    if checksum.hexdigest() != header["sha256"]:
        raise TrimtabError("its bytes do not match their checksum; the file is damaged. Fetch it again.")
    for entry in _ENTRIES | header:
        if entry not in _ENTRIES or not fits(header.get(entry), _ENTRIES[entry]):
            raise TrimtabError(f"header entry {entry!r:.80} is unknown, missing or of a wrong kind. Fetch it again.")
    return header, _tensors(payload, table, start)


def _json(text: str, file_size: int) -> Any:
    """Parse JSON that needs little memory and is as it was written: no doubled name, no infinity, nothing unseen."""
    many = sum(map(text.count, "[{:,")) > _HEADER_VALUES + file_size // 64 or text.count('"settings"') > _HEADER_METHODS
    wide = len(text) > 2**20 and ("\\u" in text or not text.isascii())  # a character may take four bytes then
    if many or wide:
        raise TrimtabError("its header has too many entries or characters.")
    value = json.loads(text)
    if _dump(value) != text.rstrip(" "):
        raise TrimtabError("its header is not as Trimtab writes it.")
    return value


def _tensors(payload: bytearray, table: dict[str, Any], start: int) -> dict[str, Tensor]:
    tensors, end = {}, start
    for name, entry in table.items():
        dtype, shape, begin = _TYPES[entry["dtype"]], entry["shape"], end
        whole = len(shape) <= 8 and all(type(n) is int and 0 <= n <= len(payload) for n in shape)
        possible = whole and begin % dtype.itemsize == 0
        end += math.prod(shape) * dtype.itemsize if possible else 0
        if not possible or end > len(payload) or str(entry["data_offsets"]) != str([begin - start, end - start]):
            raise TrimtabError(f"{name!r:.80} is not where its type and shape put it; the file is damaged.")
        tensors[name] = torch.empty(shape, dtype=dtype)
        if end > begin:
            tensors[name] = torch.frombuffer(payload, dtype=dtype, count=math.prod(shape), offset=begin).reshape(shape)
            if dtype.is_floating_point and not torch.stack(torch.aminmax(tensors[name])).isfinite().all():
                raise TrimtabError(f"{name!r:.80} holds NaN or infinite numbers.")
    if end != len(payload):
        raise TrimtabError("it holds bytes that belong to no tensor; the file is damaged.")
    return tensors
