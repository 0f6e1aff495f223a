"""Saving and loading: an adapter file connected to an adapter on its base model, or refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter, Part
from trimtab.adapter_file import decode_method, digest, encode_method, naming, read_adapter_file, write_adapter_file
from trimtab.attach import adapters as attached_adapters
from trimtab.attach import build, check_arguments, resolved_part
from trimtab.errors import AdapterFileError, AttachError, TargetError, TrimtabError
from trimtab.fingerprint import difference, fingerprint
from trimtab.method import Method
from trimtab.quantized import placed_like
from trimtab.structure import Structure
from trimtab.targets import Item
from trimtab.version import __version__


def save_adapter(adapter: Adapter, path: str | Path, training: bool, write: bool = True) -> Path:
    """Write the adapter's file at `path` (a folder, or a .safetensors file) and return it; raises AdapterFileError.

    The file is written beside its place, flushed, read back, compared, and renamed: a reader finds the old adapter or
    the new one. A folder also gets a README.md for people, which nothing reads back. On a model that is sharded over
    processes each of them must call this; each writes the same bytes, or with write=False only helps to gather them.
    """
    for name, tensor, spec in adapter.named_tensors():
        if tuple(tensor.shape) != spec.shape:
            raise AdapterFileError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, not {spec.shape}; gather it.")
    tensors = dict(adapter.file_tensors(training))
    with contextlib.ExitStack() as unmerged:  # the base itself is meant, also while adapters are merged into it
        for other in attached_adapters(adapter.model).values():
            unmerged.enter_context(other.disabled())
        base = fingerprint(adapter.model, replaced_by(adapter.parts))
    header = {
        "name": adapter.name,
        "method": encode_method(adapter.method if training else adapter.method.exported()),
        "items": _places(adapter),
        "seed": adapter.seed,
        "base_mode": adapter.base_mode,
        "dtype": str(next(adapter.parameters()).dtype).removeprefix("torch."),
        "seeded": _seeded(adapter),
        "fingerprint": base,
        "lineage": list(adapter.lineage),
        "steps": adapter.steps if training else 0,
        "versions": {"trimtab": __version__, "torch": torch.__version__},
    }
    card = f"# Adapter `{adapter.name}`\n\nMethod: `{adapter.method!r}`\n\n```text\n{adapter.report()}\n```\n\n"
    card += "Load it with `trimtab.load(model, 'this/folder')`.\n"
    return write_adapter_file(path, header, tensors, card, write)


def _places(adapter: Adapter) -> list[list[str]]:
    return [[str(item) for item in part.items] for part in adapter.parts]


def _seeded(adapter: Adapter) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor, spec in adapter.named_tensors() if spec.stored == "seed"}


def replaced_by(parts: list[Part]) -> set[str]:
    """Return the base parameters ("path:name") that these parts replace whole: they are not part of their base."""
    return {str(site) for part in parts for site in part.sites if getattr(site, "whole", False)}


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
    header, tensors = read_adapter_file(path)
    chosen, seed, base_mode = name or header["name"], header["seed"], header["base_mode"]
    if isinstance(model, nn.Module) and str(chosen) in attached_adapters(model):  # type: ignore[redundant-expr]
        raise AttachError(f"an adapter named {chosen!r} is attached already; detach it, or give load(…, name=…).")
    with naming(Path(path), "does not fit this model: {}"):
        method, dtype = decode_method(header["method"]), getattr(torch, header["dtype"])
        check_arguments(model, method, chosen, seed, dtype, base_mode)
        parts = _parts(model, method.parts(), header["items"])
        if not accept_other_base:
            _check_base(header, model, parts)
        _check_shapes(tensors, parts)
        adapter = build(Adapter(chosen, model, method, parts, seed, base_mode), dtype)
        try:
            _fill(adapter, header, tensors)
        except BaseException:
            adapter.detach()
            raise
    adapter.lineage = tuple(header["lineage"])
    if not trainable:
        adapter.trainable = False
        for leaf in adapter.leaves():
            leaf.eval()
    return adapter


def refill(adapter: Adapter, path: str | Path) -> None:
    """Give an attached adapter the state of a file of the same method, places and base; raises AdapterFileError."""
    header, tensors = read_adapter_file(path)
    with naming(Path(path), "does not fit this model: {}"):
        if (header["method"], header["items"]) != (encode_method(adapter.method), _places(adapter)):
            raise TrimtabError(f"its method is {header['method']} at {header['items']}, not {adapter.method}.")
        _check_base(header, adapter.model, adapter.parts)
        _check_shapes(tensors, adapter.parts)
        _fill(adapter, header, tensors)


def _parts(model: nn.Module, methods: tuple[Method, ...], items: list[list[str]]) -> list[Part]:
    structure, parts = Structure(model), []
    for index, (method, named) in enumerate(zip(methods, items, strict=True)):
        absent = [item for item in named if item.partition(":")[0] not in structure.modules or item.endswith(":")]
        if absent:
            raise TargetError(f"this model has no {absent[0]!r} ({len(absent)} of {len(named)} places are missing).")
        if len(set(named)) < len(named):
            raise TargetError("it names a place twice.")
        places = [Item(path, parameter or None) for path, _, parameter in (item.partition(":") for item in named)]
        parts.append(resolved_part(structure, method, index, places))
    return parts


def _check_base(header: dict[str, Any], model: nn.Module, parts: list[Part]) -> None:
    if (problem := difference(header["fingerprint"], model, replaced_by(parts))) is not None:
        merged = f" (merged into it, in order: {'; '.join(header['lineage'])})" if header["lineage"] else ""
        new = " A new head is trained by FullTuning(targets='head')." if f"'{Structure(model).head}:" in problem else ""
        raise TrimtabError(
            f"was trained on another base model: {problem}. Load that{merged}, or pass accept_other_base=True.{new}"
        )


def _check_shapes(tensors: dict[str, Tensor], parts: list[Part]) -> None:
    """Compare what the file holds with what the model needs, before any of it is made."""
    left = dict(tensors)
    for part in parts:
        for name, spec in part.named_specs():
            if spec.stored == "always" and name not in left:
                raise TrimtabError(f"the tensor {name!r} is missing.")
            if spec.stored in ("always", "training") and name in left and (found := left.pop(name).shape) != spec.shape:
                raise TrimtabError(f"{name!r} has shape {tuple(found)}, this model needs {spec.shape}.")
    if left:
        raise TrimtabError(f"it holds the unknown tensor {next(iter(left))!r} ({len(left)} in all).")


def _fill(adapter: Adapter, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if _seeded(adapter) != header["seeded"]:
        raise TrimtabError("what its seed stands for cannot be rebuilt on this machine.")
    own = [(tensor, tensors[name]) for name, tensor, _ in adapter.named_tensors() if name in tensors]
    if not all(torch.equal(stored.to(tensor.dtype).to(stored.dtype), stored) for tensor, stored in own):
        raise TrimtabError("its numbers do not fit into the tensors of its dtype.")
    with torch.no_grad():
        for tensor, stored in own:
            tensor.copy_(placed_like(stored, tensor))
    adapter.steps = header["steps"]
