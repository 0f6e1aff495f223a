"""Models as their checkpoint describes them, without a task; and without their weights, to plan on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.extras import require
from trimtab.training.errors import ModelError
from trimtab.training.model_sources import ModelSource, resolve_model
from trimtab.training.models import quiet_transformers
from trimtab.training.tasks import AnyTask


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model to plan on. `fresh`: the parameters of a head that the checkpoint has not; `on_meta`: without numbers."""

    model: nn.Module
    fresh: tuple[str, ...]
    on_meta: bool


def load_as_saved(argument: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the model class that the checkpoint itself names, in evaluation mode, on the CPU.

    Raises ModelError when it cannot be found or loaded, or lacks weights.
    """
    source = resolve_model(argument)
    with quiet_transformers():
        try:
            model, report = _saved_class(_config(source), source).from_pretrained(
                source.location, local_files_only=source.offline, use_safetensors=True, output_loading_info=True,
                dtype="auto" if dtype is None else dtype,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{source.argument!r} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(f"{source.argument!r} lacks {len(names)} of its own weights, for example {names[0]!r}.")
    loaded: nn.Module = model.eval()
    return loaded


def load_tokenizer_if_any(argument: str | Path) -> Any:
    """Return the tokenizer that a model comes with, None where it has none."""
    source = resolve_model(argument)
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(source.location, local_files_only=source.offline)
    except (OSError, ValueError, KeyError):
        return None


def make_skeleton(argument: str | Path, task: AnyTask | None = None) -> Skeleton:
    """Build a model from its configuration alone: for `task`, or as the checkpoint names it. No weight is read.

    A model that cannot be built on the meta device is built on the CPU with random numbers instead.
    """
    source = resolve_model(argument)
    config = _config(source)
    if task is None:
        model, on_meta = _build(_saved_class(config, source)._from_config, config, source)
        return Skeleton(model, (), on_meta)
    named = {str(name) for name in config.architectures or ()}
    config.update(task.model_settings())
    model, on_meta = _build(task.model_class.from_config, config, source)
    inside = f"{model.base_model_prefix}."
    new_head = task.name == "classification" and type(model).__name__ not in named
    fresh = [name for name, _ in model.named_parameters() if new_head and not name.startswith(inside)]
    return Skeleton(model, tuple(sorted(fresh)), on_meta)


def _config(source: ModelSource) -> Any:
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoConfig.from_pretrained(source.location, local_files_only=source.offline)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the configuration of {source.argument!r} cannot be read: {_first_line(error)}") from error


def _saved_class(config: Any, source: ModelSource) -> Any:
    transformers = require("transformers", "hf")
    names = list(config.architectures or ())
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        asked = f"names the class {names[0]!r}, which transformers has not" if names else "names no model class"
        raise ModelError(f"the configuration of {source.argument!r} {asked}; say what it is for with --task.")
    return found


def _build(make: Any, config: Any, source: ModelSource) -> tuple[Any, bool]:
    try:
        with torch.device("meta"):
            return make(config).eval(), True
    except (NotImplementedError, RuntimeError):  # its constructor computes with numbers
        pass
    except ValueError as error:
        raise ModelError(f"{source.argument!r} cannot be built for this task: {_first_line(error)}") from error
    return make(config).eval(), False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
