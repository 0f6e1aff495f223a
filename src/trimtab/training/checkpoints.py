"""Checkpoints of a training run: a folder that exists whole or not at all, with safetensors and JSON inside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.adapter_file import file_bytes, write_atomically
from trimtab.errors import AdapterFileError, SettingError
from trimtab.quantized import for_file, placed_like
from trimtab.storage import refill, save_adapter
from trimtab.training.metrics import Metrics
from trimtab.training.randomness import RandomState

STATE_NAME = "training.safetensors"
_FOLDER = re.compile(r"^step-(\d+)$")


@dataclass
class RunState:
    """How far a run is: steps made, seconds spent, what it has measured, and the best adapter's tensors by name."""

    step: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    best: Metrics | None = None
    best_step: int = 0
    last: Metrics | None = None
    best_tensors: dict[str, Tensor] = field(default_factory=dict)


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint folder under `output`, or None."""
    found = [(int(match[1]), path) for path in _folder(output).glob("*") if (match := _FOLDER.match(path.name))]
    return max(found)[1] if found else None


def save_checkpoint(
    output: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    random_states: list[RandomState],
    identity: dict[str, Any],
    scaler: Any = None,
    write: bool = True,
) -> Path:
    """Write the checkpoint of a step and remove older ones; a kill at any moment leaves the old one or the new one.

    `random_states`: one for each process. `identity`: JSON values that a run must share to be the same run.
    `scaler`: the gradient scaler of mixed precision, if any. Every process of a run calls this, so that shards can be
    gathered, and one of them with `write`. Raises AdapterFileError.
    """
    final = _folder(output) / f"step-{state.step:08d}"
    tensors, values = _optimizer_state(adapter, optimizer)
    if not write or final.exists():
        return save_adapter(adapter, final, training=True, write=False).parent
    for rank, random_state in enumerate(random_states):
        tensors |= {f"random/{rank}/{name}": tensor for name, tensor in random_state.tensors.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in state.best_tensors.items()}
    header = {
        "identity": identity,
        "run": asdict(replace(state, best_tensors={})),
        "optimizer": values,
        "random": [random_state.values for random_state in random_states],
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    payload = file_bytes(tensors, {"trimtab": json.dumps(header)})
    with _whole_folder(final) as folder:
        save_adapter(adapter, folder, training=True)
        write_atomically(folder / STATE_NAME, payload)
    _remove_older(final)
    return final


def load_checkpoint(
    folder: Path,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    scaler: Any = None,
) -> tuple[RunState, list[RandomState]]:
    """Give adapter, optimizer and scaler the state of a checkpoint; returns how far the run was, and its generators.

    Raises SettingError where `identity` is another run's, AdapterFileError for a damaged file or another base.
    """
    file = folder / STATE_NAME
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["trimtab"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        run = header["run"]
        run |= {key: _metrics(run[key]) for key in ("best", "last")}
        state = RunState(**run | {"best_tensors": _under(tensors, "best/")})
        states = [RandomState(_under(tensors, f"random/{i}/"), values) for i, values in enumerate(header["random"])]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterFileError(
            f"{file}: is not a readable training state ({error}). Resume from another one."
        ) from error
    _check_identity(folder, header["identity"], json.loads(json.dumps(identity)))
    refill(adapter, folder)
    _restore_optimizer(adapter, optimizer, _under(tensors, "optimizer/"), header["optimizer"])
    if scaler is not None and header["scaler"] is not None:
        scaler.load_state_dict(header["scaler"])
    return state, states


def _folder(output: Path) -> Path:
    return output / "checkpoints"


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _metrics(values: dict[str, Any] | None) -> Metrics | None:
    if values is None:
        return None
    intervals = {name: (low, high) for name, (low, high) in values["intervals"].items()}
    return Metrics(**values | {"intervals": intervals})


def _check_identity(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in (stored | asked) if stored.get(key) != asked.get(key)]
    if differing:
        found = "; ".join(f"{key}: {stored.get(key)!r} then, {asked.get(key)!r} now" for key in differing)
        raise SettingError(
            f"{folder}: belongs to another run ({found}). Resume with the same settings and data, or start a new run "
            f"in another folder."
        )


def _optimizer_state(adapter: Adapter, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by parameter and entry, and its other values, which JSON holds exactly."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in adapter.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = for_file(value)
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def _restore_optimizer(
    adapter: Adapter, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    for name, parameter in adapter.named_parameters():
        entries: dict[str, Any] = dict(values.get(name, {}))
        for key, tensor in _under(tensors, f"{name}/").items():
            # AdamW keeps its step count on the CPU, everything else beside the parameter.
            entries[key] = tensor if key == "step" else placed_like(tensor, parameter)
        if entries:
            optimizer.state[parameter] = entries


@contextlib.contextmanager
def _whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill, and put it in its place by one rename; nothing is left of it after an error."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        around = Path(tempfile.mkdtemp(dir=final.parent, prefix=".part-"))
        try:
            folder = around / final.name
            folder.mkdir()
            yield folder
            os.replace(folder, final)
            _flush_folder(final.parent)
        finally:
            shutil.rmtree(around, ignore_errors=True)
    except OSError as error:
        cause = error.strerror or str(error)
        raise AdapterFileError(f"{final}: cannot be written ({cause}); an older checkpoint is untouched.") from error


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _remove_older(final: Path) -> None:
    """Remove the checkpoints that `final` replaces, and what killed processes left of unfinished ones."""
    for path in final.parent.iterdir():
        if path != final and (_FOLDER.match(path.name) or path.name.startswith(".part-")):
            shutil.rmtree(path, ignore_errors=True)
