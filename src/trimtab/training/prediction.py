"""Use a trained model on texts: a class with its probability, or the text that greedy decoding gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.training.batches import make_loader
from trimtab.training.causal_lm import CausalLM, start_tokens
from trimtab.training.classification import Classification
from trimtab.training.encoding import make_encoded, tokenize, tokenize_plain
from trimtab.training.metrics import evaluating
from trimtab.training.models import LoadedModel
from trimtab.training.table import Table
from trimtab.training.tasks import AnyTask


@dataclass(frozen=True)
class Prediction:
    """What the model gives for one text; `probability` is that of the class, None for generated text."""

    text: str
    output: str
    probability: float | None = None


def predict(
    loaded: LoadedModel,
    task: AnyTask,
    rows: Table,
    column: str,
    max_length: int,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[Prediction, ...]:
    """Return one prediction for each row of `rows`, from its text in `column`, in order.

    `max_length` is the one trained with; `max_new_tokens` bounds generated text. Raises DataError, SettingError.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise SettingError(f"{name}={value}; it must be at least 1.")
    texts = rows.texts(column)
    with evaluating(loaded.model) as device:
        if isinstance(task, CausalLM):
            prompts = tokenize_plain(rows, column, loaded.tokenizer)
            outputs = [_continue(loaded, prompt, max_length, max_new_tokens, device) for prompt in prompts]
            return tuple(Prediction(*pair) for pair in zip(texts, outputs, strict=True))
        tokens = tokenize(rows, column, loaded.tokenizer, max_length)
        encoded = make_encoded(rows, tokens, [0] * len(rows), loaded.tokenizer, max_length)
        found: list[tuple[str, float | None]] = []
        for batch in make_loader(encoded, batch_size, shuffle=False):
            inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            found += (
                _classify(loaded.model, inputs, task.labels)
                if isinstance(task, Classification)
                else _generate(loaded, inputs, max_new_tokens)
            )
    return tuple(Prediction(text, *pair) for text, pair in zip(texts, found, strict=True))


def _classify(model: Any, inputs: dict[str, Tensor], labels: Sequence[str]) -> Iterator[tuple[str, float | None]]:
    probabilities = model(**inputs).logits.float().softmax(-1)  # (rows, classes)
    values, classes = probabilities.max(-1)
    return ((labels[index], value) for index, value in zip(classes.tolist(), values.tolist(), strict=True))


def _generate(loaded: LoadedModel, inputs: dict[str, Tensor], count: int) -> Iterator[tuple[str, float | None]]:
    model: Any = loaded.model
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=1)
    return ((text, None) for text in loaded.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _continue(loaded: LoadedModel, prompt: list[int], max_length: int, count: int, device: torch.device) -> str:
    """Generate after one prompt: alone, so that nothing depends on padding. A long prompt loses its beginning."""
    start = start_tokens(loaded.tokenizer)
    room = max_length if loaded.longest_input is None else min(max_length, loaded.longest_input - count)
    if room <= len(start):
        raise SettingError(
            f"max_new_tokens={count} leaves no room for a prompt: the model reads {loaded.longest_input} tokens in all."
        )
    ids = torch.tensor([start + prompt[-(room - len(start)) :]], device=device)
    model: Any = loaded.model
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
    )
    return str(loaded.tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
