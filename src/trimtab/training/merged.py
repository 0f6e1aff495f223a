"""A merged model as an ordinary transformers folder: written whole, read back, and compared before it counts."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.errors import AdapterFileError, AttachError
from trimtab.merge import Receipt
from trimtab.planning import bytes_text
from trimtab.training.models import quiet_transformers


@dataclass(frozen=True)
class SavedModel:
    """A merged model on disk, with the receipt of the merge. `size` in bytes."""

    folder: Path
    receipt: Receipt
    size: int

    def __str__(self) -> str:
        return f"{self.receipt}\n{self.folder}: {bytes_text(self.size)}, read back and found equal"


def save_merged(adapter: Adapter, tokenizer: Any, folder: Path, untie: bool = False) -> SavedModel:
    """Merge an adapter into its transformers model, detach it, and save the model (with `tokenizer`, if any).

    The folder appears whole or not at all, and only if what is read back from it computes what the merged model does.
    Raises AttachError where merging is impossible or the model's files cannot express it; AdapterFileError where
    `folder` is taken or cannot be written.
    """
    check_output(folder)
    model: Any = adapter.model
    probe = _probe(model)
    receipt = adapter.merge(untie=untie, probe=probe)
    adapter.detach(keep_merged=True)
    if untie:
        model.config.tie_word_embeddings = False
    try:
        size = _write(model, tokenizer, folder, probe)
    except (OSError, safetensors.SafetensorError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise AdapterFileError(
            f"{folder}: cannot be written ({cause}); nothing is left there. Give another place."
        ) from error
    return SavedModel(folder, receipt, size)


def _write(model: Any, tokenizer: Any, folder: Path, probe: dict[str, Tensor] | None) -> int:
    """Write the model beside its place, read it back, and move it there; returns its size in bytes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary, quiet_transformers():
        whole = Path(temporary) / "model"
        model.save_pretrained(whole)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        _check_read_back(model, type(model).from_pretrained(whole, dtype=model.dtype), probe)
        size = sum(file.stat().st_size for file in whole.iterdir())
        if folder.is_dir():
            folder.rmdir()  # it is empty
        whole.rename(folder)
    return size


def check_output(folder: Path) -> None:
    """Raise AdapterFileError unless `folder` is absent or empty, and a folder can be made there."""
    if folder.is_dir() and any(folder.iterdir()):
        raise AdapterFileError(f"{folder} is not empty; a model is written to a new folder only. Give another one.")
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file; give a new folder for the model.")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise AdapterFileError(
            f"{folder}: cannot be written ({existing} is not a writable folder). Give another place."
        )


def _probe(model: Any) -> dict[str, Tensor] | None:
    """Return a small input for a model of texts, None for any other."""
    if model.main_input_name != "input_ids":
        return None
    ids = torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def _check_read_back(merged: nn.Module, again: nn.Module, probe: dict[str, Tensor] | None) -> None:
    """Refuse a folder that holds another model: a configuration cannot express every bias, nor every untied weight."""
    expected, found = merged.state_dict(), again.state_dict()
    differing = [name for name in expected | found if not _equal(expected.get(name), found.get(name))]
    if differing:
        raise AttachError(
            f"the merged model cannot be saved as an ordinary model: read back, {differing[0]!r} is another tensor "
            f"({len(differing)} are; its configuration cannot express the change). Keep the adapter as its own file."
        )
    if probe is not None:
        with torch.no_grad():
            before, after = (model.eval()(**probe)[0] for model in (merged, again))
        if not torch.equal(before, after):
            raise AttachError(
                "the merged model computes something else when it is read back; keep the adapter instead."
            )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
