"""Reading a LoRA that huggingface/peft wrote, strictly: what changes its meaning and is not understood is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.attach import attach
from trimtab.errors import AdapterFileError, TrimtabError, suggestion
from trimtab.interop.peft_format import (
    CLASSIFIERS,
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    in_layers,
    own_down,
    parse_tensor_name,
    pattern_value,
    saves_whole,
    selects,
)
from trimtab.method import Method
from trimtab.methods.composition.compose import Compose
from trimtab.methods.selection.full_tuning import FullTuning
from trimtab.methods.weight.dora import DoRA
from trimtab.methods.weight.lora import LoRA
from trimtab.structure import Structure

_READ: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": list,
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
}
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
# Where an adapter came from and how it started; nothing of what it computes.
_WITHOUT_EFFECT = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
_STARTS_AT_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Module:
    """The tensors of one adapted module: "A", "B" and perhaps "magnitude"; its rank and alpha."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float


def import_adapter(model: nn.Module, folder: str | Path, name: str = "default", trainable: bool = False) -> Adapter:
    """Attach the LoRA (or rsLoRA, DoRA) in a folder that peft wrote; returns the adapter. Changes no number.

    Modules of one rank and alpha become one method, several become a composition; `modules_to_save` become full tuning
    of those modules. `trainable`: go on training (otherwise its tensors are frozen and its dropout is off).
    The format does not say which base's weights it was trained on: that is for the caller to know.
    Raises AdapterFileError, and leaves the model unchanged, on any doubt.
    """
    folder = Path(folder)
    config, tensors = _read_config(folder / CONFIG_FILE), _read_tensors(folder)
    file, structure = folder / WEIGHTS_FILE, Structure(model)
    low, whole = _sort_tensors(file, config, tensors, structure)
    modules = {path: _module(file, config, path, found) for path, found in low.items()}
    _check_complete(file, config, structure, set(modules))
    try:
        methods = _methods(config, modules, whole)
        method = methods[0] if len(methods) == 1 else Compose(*methods)
        adapter = attach(model, method, name, dtype=_dtype(tensors))
    except TrimtabError as error:
        raise AdapterFileError(f"{file}: does not fit this model: {error}") from error
    try:
        _fill(file, adapter, modules, whole)
    except AdapterFileError:
        adapter.detach()
        raise
    if not trainable:
        adapter.trainable = False
        for leaf in adapter.leaves():
            leaf.eval()
    return adapter


def is_classifier(folder: str | Path) -> bool:
    """Say whether a folder that peft wrote belongs to a model that classifies whole texts; raises AdapterFileError."""
    config = _read_config(Path(folder) / CONFIG_FILE)
    named, task = config.get("auto_mapping"), config.get("task_type")
    if isinstance(named, dict) and "base_model_class" in named:
        return str(named["base_model_class"]).endswith("ForSequenceClassification")
    return task == "SEQ_CLS" or (
        task is None and any(name in CLASSIFIERS for name in config.get("modules_to_save", ()))
    )


def rows_of(folder: str | Path, module: str) -> int | None:
    """Return the rows of a weight that a folder holds whole, None where it does not; raises AdapterFileError."""
    weight = _read_tensors(Path(folder)).get(f"{module}.weight")
    return None if weight is None or weight.dim() == 0 else len(weight)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise AdapterFileError(f"{file}: is not JSON ({error}).") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterFileError(f"{file}: has peft_type {kind!r}; only 'LORA' can be read.")
    for field, value in config.items():
        expected = _READ.get(field)
        wrong = expected is not None and value is not None and not isinstance(value, expected)
        if wrong or (isinstance(value, bool) and expected is not None and expected is not bool):
            raise AdapterFileError(f"{file}: the field {field!r} is {value!r}, which is not of its type.")
        if field not in _READ and field not in _WITHOUT_EFFECT and value not in (None, False, "none", [], {}):
            raise AdapterFileError(
                f"{file}: the field {field!r} is {value!r}; it changes what the adapter computes, or is not known, so "
                f"that reading on would give another model. Merge the adapter with peft and use the merged model."
            )
    start = config.get("init_lora_weights")
    if start not in _STARTS_AT_BASE:
        raise AdapterFileError(
            f"{file}: init_lora_weights={start!r} changes the base before training, so that the adapter does not "
            f"belong to the original base. Save it with peft's path_initial_model_for_weight_conversion=… and "
            f"import that."
        )
    return _DEFAULTS | {field: value for field, value in config.items() if value is not None}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFileError(
            f"{folder / 'adapter_model.bin'} is a pickle file, which can run any code and is not read. Save the "
            f"adapter as safetensors: save_pretrained(…, safe_serialization=True)."
        )
    try:
        tensors = safetensors.torch.load(file.read_bytes())
    except OSError as error:
        raise AdapterFileError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:
        raise AdapterFileError(f"{file}: is not a readable safetensors file ({error}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{file}: {name!r} holds NaN or infinite numbers.")
        if not name.startswith(PREFIX):
            raise AdapterFileError(f"{file}: the tensor {name!r} does not begin with {PREFIX!r}.")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _sort_tensors(
    file: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], structure: Structure
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Return, by module path, the LoRA tensors and the tensors of modules that are saved whole."""
    low: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        parsed = parse_tensor_name(name)
        path, key = parsed or name.rpartition(".")[::2]
        own = path.removesuffix(".base_layer")
        module = structure.modules.get(own)
        if module is None:
            raise AdapterFileError(
                f"{file}: this model has no module {own!r}.{suggestion(own, structure.modules)} Load the class "
                "of model that the adapter was trained on (`trimtab import`: give its --task)."
            )
        if parsed is not None:
            low.setdefault(path, {})[key] = tensor
        elif saves_whole(config.get("modules_to_save", ()), path) and module._parameters.get(key) is not None:
            whole.setdefault(path, {})[key] = tensor
        elif not _is_base(module, key, tensor):  # peft also copies embeddings beside which an adapter was trained
            raise AdapterFileError(
                f"{file}: the tensor {name!r} is no LoRA's, not one of modules_to_save, and differs from the base's."
            )
    return low, whole


def _is_base(module: nn.Module, name: str, tensor: Tensor) -> bool:
    own = module._parameters.get(name, module._buffers.get(name))
    return own is not None and own.shape == tensor.shape and torch.equal(own.detach().cpu(), tensor.to(own.dtype))


def _module(file: Path, config: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> _Module:
    """Check one module's tensors against the configuration."""
    expected = {"A", "B", "magnitude"} if config.get("use_dora") else {"A", "B"}
    names = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}
    for missing in sorted(expected - set(tensors)):
        raise AdapterFileError(f"{file}: the tensor {names[missing]!r} of {path!r} is missing.")
    for extra in sorted(set(tensors) - expected):
        raise AdapterFileError(f"{file}: holds {names[extra]!r} of {path!r}, but {CONFIG_FILE} says use_dora=false.")
    rank = pattern_value(config.get("rank_pattern", {}), path, config["r"])
    if rank != tensors["A"].shape[0]:
        found = tensors["A"].shape[0]
        raise AdapterFileError(f"{file}: the tensors of {path!r} have rank {found}, {CONFIG_FILE} says {rank}.")
    return _Module(tensors, rank, float(pattern_value(config.get("alpha_pattern", {}), path, config["lora_alpha"])))


def _check_complete(file: Path, config: Mapping[str, Any], structure: Structure, found: set[str]) -> None:
    """Every module that the configuration selects must have its tensors, and no other."""
    entries, excluded = config.get("target_modules", []), config.get("exclude_modules", [])
    saved = config.get("modules_to_save", ())
    selected = {
        path
        for path in structure.modules
        if path and selects(entries, path) and in_layers(config, path)
        and not (excluded and selects(excluded, path)) and not saves_whole(saved, path)
    }  # fmt: skip
    for path in sorted(selected - found):
        raise AdapterFileError(f"{file}: {CONFIG_FILE} selects {path!r}, but its tensors are missing.")
    for path in sorted(found - selected):
        raise AdapterFileError(f"{file}: holds tensors of {path!r}, which {CONFIG_FILE} does not select.")
    # For these tasks peft names every head that it knows, whatever the model has.
    guessed = CLASSIFIERS if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    for entry in saved:
        if entry not in guessed and not any(selects([entry], path) for path in structure.modules):
            raise AdapterFileError(f"{file}: modules_to_save names {entry!r}, which this model has not.")


def _methods(
    config: Mapping[str, Any], modules: dict[str, _Module], whole: dict[str, dict[str, Tensor]]
) -> list[Method]:
    """Return one method for each rank and alpha, and full tuning of what is saved whole."""
    groups: dict[tuple[int, float], list[str]] = {}
    for path, module in modules.items():
        groups.setdefault((module.rank, module.alpha), []).append(path)
    low: type[DoRA | LoRA] = DoRA if config.get("use_dora") else LoRA
    methods: list[Method] = []
    for (rank, alpha), paths in groups.items():
        targets = tuple(f"={path}" for path in paths)
        dropout, stabilized = float(config["lora_dropout"]), bool(config.get("use_rslora"))
        methods.append(low(rank, alpha, dropout=dropout, rank_stabilized=stabilized, targets=targets))
    if whole:
        items = tuple(f"={path}:{name}" for path, names in whole.items() for name in names)
        methods.append(FullTuning(targets=items))
    return methods


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The precision to attach in: the file's, but at least single, as peft does."""
    found = {tensor.dtype for tensor in tensors.values()}
    return torch.float64 if found == {torch.float64} else torch.float32


def _fill(file: Path, adapter: Adapter, modules: dict[str, _Module], whole: dict[str, dict[str, Tensor]]) -> None:
    for leaf in (leaf for part in adapter.parts for leaf in part.leaves):
        path = leaf.site.path
        if leaf.site.whole:
            _copy(file, path, leaf.value, whole[path][leaf.site.parameter])
            continue
        for key, tensor in modules[path].tensors.items():
            own = getattr(leaf, key)
            stored = own_down(tensor, own) if key == "A" else tensor
            if stored is None:
                raise AdapterFileError(
                    f"{file}: {path!r} is a convolution with groups, and the A trained there reads the channels of "
                    f"other groups, which is no change of its weight. Train without this layer."
                )
            _copy(file, path, own, stored)


def _copy(file: Path, path: str, own: Tensor, stored: Tensor) -> None:
    """Fill a tensor from the file's; shapes may differ only where the number of dimensions does."""
    if own.numel() != stored.numel() or (own.dim() == stored.dim() and own.shape != stored.shape):
        found, needed = tuple(stored.shape), tuple(own.shape)
        raise AdapterFileError(f"{file}: a tensor of {path!r} has shape {found}, this model needs {needed}.")
    with torch.no_grad():
        own.copy_(stored.reshape(own.shape))
