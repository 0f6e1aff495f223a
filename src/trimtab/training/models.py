"""Load the model and tokenizer of a task; what the checkpoint lacks is drawn from the seed, and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.errors import SettingError
from trimtab.extras import require
from trimtab.training.classification import Classification
from trimtab.training.encoding import padding_id
from trimtab.training.errors import ModelError
from trimtab.training.model_sources import ModelSource, resolve_model
from trimtab.training.tasks import AnyTask


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its tokenizer. `fresh`: the parameters drawn from the seed, which have to be trained (a new head).

    `longest_input`: the most tokens the model has positions for, None where it has no such limit.
    """

    model: nn.Module
    tokenizer: Any
    source: ModelSource
    fresh: tuple[str, ...]
    longest_input: int | None

    def check_length(self, max_length: int) -> None:
        """Raise SettingError when rows of `max_length` tokens are longer than the model can read."""
        if self.longest_input is not None and max_length > self.longest_input:
            raise SettingError(
                f"max_length={max_length}, but {self.source.argument!r} has positions for {self.longest_input} tokens. "
                f"Give max_length={self.longest_input} or less."
            )


def load_model(argument: str | Path, task: AnyTask, seed: int, *, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load `argument` (a folder, a hub id, or 'minilm') for `task`, in evaluation mode, on the CPU.

    Weights come from safetensors files only. A head that the checkpoint lacks is drawn from `seed` alone: the same for
    the same seed, whatever was drawn before, and the global generator is left as it was. `dtype`: None keeps the
    checkpoint's own precision. Raises ModelError when the model cannot be found or loaded, when weights other than a
    classification head are missing, or when it has a trained head for other labels.
    """
    source = resolve_model(argument)
    with quiet_transformers():
        tokenizer = _load_tokenizer(source)
        model, report = _load_weights(source, task, seed, dtype)
    fresh = _fresh_parameters(model, source, task, report["missing_keys"])
    if isinstance(task, Classification) and all(name.startswith(f"{model.base_model_prefix}.") for name in fresh):
        _check_saved_labels(source, task)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = padding_id(tokenizer)
    _check_vocabulary(model, tokenizer, source)
    model.eval()
    return LoadedModel(model, tokenizer, source, fresh, _longest_input(config, tokenizer))


def _load_tokenizer(source: ModelSource) -> Any:
    transformers = require("transformers", "hf")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, local_files_only=source.offline)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the tokenizer of {source.argument!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = padding_id(tokenizer)
    return tokenizer


def _load_weights(source: ModelSource, task: AnyTask, seed: int, dtype: torch.dtype | None) -> tuple[Any, Any]:
    try:
        with _seeded(seed):
            loaded: tuple[Any, Any] = task.model_class.from_pretrained(
                source.location,
                local_files_only=source.offline,
                use_safetensors=True,
                output_loading_info=True,
                dtype="auto" if dtype is None else dtype,
                **task.model_settings(),
            )
            return loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{source.argument!r} cannot be loaded for the task {task.name!r}: {_first_line(error)}"
        ) from error


def _fresh_parameters(model: Any, source: ModelSource, task: AnyTask, missing: set[str]) -> tuple[str, ...]:
    """Return the parameters that the checkpoint lacks; only a classification head (with its pooler) may be."""
    base = f"{model.base_model_prefix}."
    refused = [
        name
        for name in sorted(missing)
        if task.name != "classification" or (name.startswith(base) and not name.startswith(f"{base}pooler."))
    ]
    if refused:
        raise ModelError(
            f"{source.argument!r} lacks {len(refused)} weights that a {task.name} model needs, for example "
            f"{refused[0]!r}; they would be random numbers. Choose a model that was trained for this."
        )
    return tuple(sorted(missing))


def _check_saved_labels(source: ModelSource, task: Classification) -> None:
    """Refuse a trained head whose classes are other labels, or the same in another order."""
    config = require("transformers", "hf").AutoConfig.from_pretrained(source.location, local_files_only=source.offline)
    saved = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    if saved != task.labels:
        raise ModelError(
            f"{source.argument!r} has a trained head for the labels {', '.join(saved[:8])}"
            f"{', …' if len(saved) > 8 else ''}; the data has {', '.join(task.labels[:8])}"
            f"{', …' if len(task.labels) > 8 else ''}. Give the model without a head, or data with the same labels."
        )


def _check_vocabulary(model: Any, tokenizer: Any, source: ModelSource) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {source.argument!r} has {len(tokenizer)} tokens, its model only {rows} embeddings; "
            "they do not belong together."
        )


def _longest_input(config: Any, tokenizer: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)  # relative-position models have none
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa counts two positions that no token can have; its tokenizer knows.
    return min(positions, int(tokenizer.model_max_length))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the block and restore it afterwards."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading report and bars for the block: what they say is in `LoadedModel`, or an error."""
    logging = require("transformers", "hf").utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
