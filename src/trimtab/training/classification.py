"""Text → one of a fixed list of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import nearest
from trimtab.extras import require
from trimtab.training.batches import Loader
from trimtab.training.columns import LABEL, TEXT, find_column
from trimtab.training.encoding import Encoded, make_encoded, tokenize
from trimtab.training.errors import DataError
from trimtab.training.metrics import Metrics, accuracy_metrics, evaluating, sum_finite
from trimtab.training.table import Table


@dataclass(frozen=True)
class Classification:
    """Single-label classification of texts. `labels` is every class, sorted: the index in it is the class number."""

    text: str
    label: str
    labels: tuple[str, ...]

    name = "classification"

    @classmethod
    def from_table(cls, train: Table, text: str | None = None, label: str | None = None) -> Classification:
        """Take the list of classes from the training data; columns not named are found by their usual names.

        Classes that are all whole numbers are sorted as numbers. Raises DataError for fewer than two classes.
        """
        text_column = find_column(train, "text", text, TEXT)
        label_column = find_column(train, "label", label, LABEL)
        if text_column == label_column:
            raise DataError(f"{train.source}: the column {text_column!r} cannot be both the text and the label.")
        labels = _sorted_labels(set(train.labels(label_column)))
        if len(labels) < 2:
            raise DataError(
                f"{train.source}: every row of column {label_column!r} has the label {labels[0]!r}; "
                "at least two classes are needed."
            )
        return cls(text_column, label_column, labels)

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForSequenceClassification."""
        return require("transformers", "hf").AutoModelForSequenceClassification

    def model_settings(self) -> dict[str, Any]:
        """Return the number of classes and their names in both directions."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def encode(self, rows: Table, tokenizer: Any, max_length: int) -> Encoded:
        """Return token ids and class numbers; raises DataError for a label that training does not know."""
        classes = self._classes(rows)
        tokens = tokenize(rows, self.text, tokenizer, max_length)
        return make_encoded(rows, tokens, classes, tokenizer, max_length)

    def loss_terms(self, labels: Tensor) -> int:
        """Return the number of rows."""
        return len(labels)

    def evaluate(self, model: nn.Module, loader: Loader) -> Metrics:
        """Return accuracy with its 95 % Wilson interval, macro-F1, and the mean cross-entropy in nats."""
        with evaluating(model) as device:

            def measure(rows: tuple[int, ...], batch: dict[str, Tensor]) -> tuple[float, list[int], list[int]]:
                labels = batch["labels"].to(device)
                logits = model(
                    input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
                ).logits.float()  # (rows, classes)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                return float(loss), logits.argmax(-1).tolist(), labels.tolist()

            losses, predicted, true = zip(*loader.measure(measure), strict=True)
        loss = sum_finite(losses) / len(loader.encoded)
        return accuracy_metrics(list(chain(*predicted)), list(chain(*true)), loss)

    def baseline(self, train: Encoded, loader: Loader, base: nn.Module) -> Metrics:
        """Return what always answering the most frequent class of the training data gives; `base` is not run."""
        counts = Counter(int(label) for label in train.labels)
        majority = min(counts, key=lambda label: (-counts[label], label))
        true = torch.stack(loader.encoded.labels).tolist()
        return accuracy_metrics([majority] * len(true), true)

    def _classes(self, rows: Table) -> list[int]:
        numbers = {label: index for index, label in enumerate(self.labels)}
        names = rows.labels(self.label)
        for index, name in enumerate(names):
            if name not in numbers:
                raise self._unknown_label(rows, index, name)
        return [numbers[name] for name in names]

    def _unknown_label(self, rows: Table, index: int, name: str) -> DataError:
        close = nearest(name, self.labels)
        near = f"nearest: {_quoted(close)}" if close else f"for example {_quoted(self.labels[:5])}"
        return DataError(
            f"{rows.place(index)}: the label {name!r} does not occur in the training data, which has "
            f"{len(self.labels)} labels ({near}). Correct the label, or add rows with it to the training data."
        )


def _quoted(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels))


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    if all(_is_whole_number(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _is_whole_number(label: str) -> bool:
    digits = label.removeprefix("-")
    return digits.isascii() and digits.isdigit()
