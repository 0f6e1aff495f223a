"""Writing an adapter as a LoRA that huggingface/peft and serving engines read.

Engines read one rank and one scale for all modules and drop other fields in silence; therefore every scale is folded
into B, ranks are padded with zeros to one R, and alpha = r = R, so that the scale they apply is one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.adapter_file import file_bytes, write_atomically
from trimtab.errors import AdapterFileError, AttachError, SettingError
from trimtab.hooks import PREFIX as LEAF_PREFIX
from trimtab.hooks import Leaf, base_class
from trimtab.interop.peft_format import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    named_factors,
    saves_whole,
    selects,
)
from trimtab.kinds.layouts import EmbeddingLayout, TransposedLayout
from trimtab.kinds.selection import SelectionMethod
from trimtab.kinds.weight import CallLeaf, ParameterSite, WeightLeaf
from trimtab.merging.factors import (
    errors_of,
    errors_text,
    factored,
    matrix_count,
    scaled_factors,
    why_no_change,
)
from trimtab.quantized import for_file
from trimtab.structure import Structure


@dataclass(frozen=True)
class ExportReceipt:
    """What an export wrote; errors are ‖B·A − ΔW‖ / ‖ΔW‖ (Frobenius) of the written numbers, over all and at worst."""

    folder: Path
    rank: int
    modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    relative_error: float
    worst_module: str
    worst_error: float

    def __str__(self) -> str:
        whole = f", {len(self.modules_to_save)} saved whole" if self.modules_to_save else ""
        errors = errors_text(self.relative_error, self.worst_module, self.worst_error)
        return f"wrote {len(self.modules)} modules of rank {self.rank}{whole} to {self.folder}; {errors}"


def export_lora(
    adapter: Adapter, folder: str | Path, base_model_name: str = "", rank: int | None = None
) -> ExportReceipt:
    """Write an adapter of weight methods as a plain LoRA in peft's format; returns a receipt with the error.

    Without `rank`, R is the largest rank of the adapter's own factors and nothing is lost; with it, every ΔW is reduced
    to that rank by its singular values, which also serves methods whose ΔW has full rank. Heads that are trained whole
    go to `modules_to_save`. `base_model_name` is what peft's `from_pretrained` would load the base from.
    Raises AttachError for what a LoRA cannot express, SettingError for the rank, AdapterFileError for the folder.
    """
    folder = Path(folder)
    for existing in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if existing.exists():
            raise AdapterFileError(f"{existing} exists already and is left as it is. Give another folder.")
    if adapter.merged:
        raise AttachError(f"adapter {adapter.name!r} is merged: unmerge it before exporting it.")
    structure = Structure(adapter.model)
    low, whole = _low_rank_leaves(adapter), _whole_modules(adapter, structure)
    if not low:
        raise AttachError(f"adapter {adapter.name!r} adds nothing to a weight: there is no LoRA to write.")
    chosen = _common_rank(low, rank)
    tensors = {f"{PREFIX}{path}.{name}": value for path, values in whole.items() for name, value in values.items()}
    written = {}
    with torch.no_grad():
        for path, leaves in low.items():
            written[path] = factored(leaves, chosen // matrix_count(leaves[0]))
            tensors |= named_factors(leaves[0].site, written[path].down, written[path].up)
    config = _config([leaves[0].site for leaves in low.values()], tuple(whole), structure, chosen)
    config |= {"base_model_name_or_path": base_model_name or None} | _task(adapter)
    _write_folder(folder, tensors, config)
    return ExportReceipt(folder, chosen, tuple(written), tuple(whole), *errors_of(written))


def _common_rank(leaves_at: Mapping[str, Sequence[WeightLeaf]], rank: int | None) -> int:
    """Return the one rank of all modules: the given one, or the largest rank of their factors. Raises SettingError."""
    if rank is not None and rank < 1:
        raise SettingError(f"export_lora(rank={rank}): must be at least 1.")
    needed = 1
    for path, leaves in leaves_at.items():
        factors = [scaled_factors(leaf) for leaf in leaves]
        absent = [type(leaf.method).__name__ for leaf, pair in zip(leaves, factors, strict=True) if pair is None]
        if rank is None and absent:
            raise SettingError(
                f"{absent[0]} does not give its change of {path!r} as a product of two factors: choose rank=… to write "
                f"the best approximation of that rank; the receipt states its error."
            )
        own = sum(pair[0].shape[-2] for pair in factors if pair is not None)
        needed = max(needed, matrix_count(leaves[0]) * own)
    counts = {path: matrix_count(leaves[0]) for path, leaves in leaves_at.items()}
    most = max(max(leaf.site.in_features, leaf.site.out_features) for leaves in leaves_at.values() for leaf in leaves)
    if rank is not None and rank > most * max(counts.values()):
        raise SettingError(f"export_lora(rank={rank}): no layer is wider than {most}; give that or less.")
    chosen = needed if rank is None else rank
    uneven = [path for path, count in counts.items() if chosen % count]
    if uneven:
        raise SettingError(
            f"rank {chosen} cannot be divided among the {counts[uneven[0]]} groups of the convolution {uneven[0]!r}: "
            f"choose rank= a multiple of {math.lcm(*counts.values())}."
        )
    return chosen


def _low_rank_leaves(adapter: Adapter) -> dict[str, list[WeightLeaf]]:
    """Return by module path the leaves whose ΔW is to be written; refuses every other way of changing a model."""
    found: dict[str, list[WeightLeaf]] = {}
    for part in adapter.parts:
        if isinstance(part.method, SelectionMethod):
            continue
        for leaf in part.leaves:
            reason = _inexpressible(leaf)
            if reason is not None:
                mergeable = part.method.promises().merge != "none"
                advice = "Save it with adapter.save(path)" + (", or merge it." if mergeable else ".")
                raise AttachError(f"{type(part.method).__name__} cannot be written as a LoRA: {reason}. {advice}")
            assert isinstance(leaf, WeightLeaf)
            found.setdefault(leaf.site.path, []).append(leaf)
    return found


def _inexpressible(leaf: Leaf) -> str | None:
    """Say why a leaf's change is no ΔW of a module that peft's LoRA can name; None where it is."""
    reason = why_no_change(leaf)
    if reason is None and not isinstance(leaf, CallLeaf):
        return f"{str(leaf.site)!r} is a parameter that no layer of its own applies"
    return reason


def _whole_modules(adapter: Adapter, structure: Structure) -> dict[str, dict[str, Tensor]]:
    """Return, by module path, every tensor of the modules that are trained whole."""
    trained: dict[str, dict[str, WeightLeaf]] = {}
    for part in adapter.parts:
        if not isinstance(part.method, SelectionMethod):
            continue
        if part.companions:
            site = part.companions[0].site
            raise AttachError(f"{str(site)!r} is tied to a second module; peft would train one of them only.")
        for leaf in part.leaves:
            assert isinstance(leaf, WeightLeaf)
            trained.setdefault(leaf.site.path, {})[leaf.site.parameter] = leaf
    for path, leaves in trained.items():
        _refuse_unlike_whole(structure, path, leaves)
        others = [name for name in structure.modules if name.endswith(path) and name not in trained]
        if others:
            raise AttachError(f"peft's modules_to_save would take {others[0]!r} for {path!r}: their names end alike.")
    return {path: _values(structure.modules[path], leaves) for path, leaves in trained.items()}


def _refuse_unlike_whole(structure: Structure, path: str, leaves: dict[str, WeightLeaf]) -> None:
    parameters = structure.modules[path]._parameters
    own = {name for name, value in parameters.items() if value is not None and not name.startswith(LEAF_PREFIX)}
    if own != set(leaves) or len(structure.within(path)) > 1:
        method = type(next(iter(leaves.values())).method).__name__
        raise AttachError(
            f"{method} trains {', '.join(sorted(leaves))} of {path!r} and not all of the module; peft saves whole "
            f"modules only. Save the adapter with adapter.save(path), or merge it."
        )


def _values(module: nn.Module, leaves: dict[str, WeightLeaf]) -> dict[str, Tensor]:
    """Return a module's buffers and, in the base's place, the tensors that the leaves train."""
    values = dict(module.named_buffers(recurse=False))
    for name, leaf in leaves.items():
        (edit,) = leaf.edits()
        stored = module._parameters[name]
        assert stored is not None
        values[name] = edit.value.to(stored.dtype)
    return {name: for_file(value) for name, value in values.items()}


def _config(sites: list[ParameterSite], saved: tuple[str, ...], structure: Structure, rank: int) -> dict[str, Any]:
    linear = [site.layout for site in sites if not isinstance(site.layout, EmbeddingLayout)]
    return {
        "peft_type": "LORA",
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": _target_modules({site.path for site in sites}, saved, structure),
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": bool(linear) and all(isinstance(layout, TransposedLayout) for layout in linear),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _target_modules(paths: set[str], saved: tuple[str, ...], structure: Structure) -> list[str] | str:
    """Return the shortest description that selects exactly these modules: last names, paths, or an expression."""
    candidates = [path for path in structure.modules if path and not saves_whole(saved, path)]
    for entries in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if {path for path in candidates if selects(entries, path)} == paths:
            return entries
    return "|".join(re.escape(path) for path in sorted(paths))


_TASKS = {"CausalLM": "CAUSAL_LM", "ConditionalGeneration": "SEQ_2_SEQ_LM"}


def _task(adapter: Adapter) -> dict[str, Any]:
    """peft's name of the task, for its loader; others would add modules to save: the model's class stands for them."""
    own = base_class(adapter.model)
    task = next((task for ending, task in _TASKS.items() if own.__name__.endswith(ending)), None)
    named = {"base_model_class": own.__name__, "parent_library": own.__module__}
    return {"task_type": task, "auto_mapping": None if task is not None else named}


def _write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the weights, then the configuration: a reader finds both, or no adapter."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterFileError(f"{folder}: {name!r} holds NaN or infinite numbers; nothing was written.")
    write_atomically(folder / WEIGHTS_FILE, file_bytes(tensors, {"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2).encode())
