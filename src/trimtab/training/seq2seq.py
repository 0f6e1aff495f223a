"""Source text → target text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.extras import require
from trimtab.training.batches import Loader
from trimtab.training.columns import SOURCE, TARGET, find_column
from trimtab.training.encoding import IGNORED, Encoded, Tokens, make_encoded, tokenize
from trimtab.training.errors import DataError
from trimtab.training.metrics import Metrics, evaluating, sum_finite, wilson_interval
from trimtab.training.table import Table


@dataclass(frozen=True)
class Seq2Seq:
    """Sequence to sequence with an encoder-decoder model; `max_length` bounds source and target alike."""

    source: str
    target: str

    name = "seq2seq"

    @classmethod
    def from_table(cls, train: Table, source: str | None = None, target: str | None = None) -> Seq2Seq:
        """Choose the columns: those named, else the only ones with conventional names."""
        source_column = find_column(train, "source", source, SOURCE)
        target_column = find_column(train, "target", target, TARGET)
        if source_column == target_column:
            raise DataError(f"{train.source}: the column {source_column!r} cannot be both the source and the target.")
        return cls(source_column, target_column)

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForSeq2SeqLM."""
        return require("transformers", "hf").AutoModelForSeq2SeqLM

    def model_settings(self) -> dict[str, Any]:
        """Return nothing: the model is used as it is."""
        return {}

    def encode(self, rows: Table, tokenizer: Any, max_length: int) -> Encoded:
        """Return the source's token ids, the target's as labels, and the target texts to compare with."""
        sources = tokenize(rows, self.source, tokenizer, max_length)
        targets = tokenize(rows, self.target, tokenizer, max_length, target=True)
        tokens = Tokens(sources.ids, sources.cut | targets.cut, max(sources.longest, targets.longest))
        return make_encoded(rows, tokens, targets.ids, tokenizer, max_length, rows.texts(self.target))

    def loss_terms(self, labels: Tensor) -> int:
        """Return the number of target tokens."""
        return int((labels != IGNORED).sum())

    def evaluate(self, model: nn.Module, loader: Loader) -> Metrics:
        """Return the mean loss per target token (nats) and the share of targets that greedy decoding gives exactly.

        Texts are compared with their whitespace normalised; a target that was cut in encoding cannot match.
        """
        encoded = loader.encoded
        with evaluating(model) as device:

            def measure(rows: tuple[int, ...], given: dict[str, Tensor]) -> tuple[float, int, int]:
                batch = {key: value.to(device) for key, value in given.items()}
                loss = float(target_loss(model(**batch).logits, batch["labels"]))
                written = encoded.decode(_generate(model, batch))
                pairs = zip(written, rows, strict=True)
                hits = sum(_normalised(text) == _normalised(encoded.references[row]) for text, row in pairs)
                return loss, self.loss_terms(batch["labels"]), hits

            losses, counts, hits = zip(*loader.measure(measure), strict=True)
        matches = sum(hits)
        values = {"loss": sum_finite(losses) / sum(counts), "exact_match": matches / len(encoded)}
        return Metrics("loss", False, values, len(encoded), {"exact_match": wilson_interval(matches, len(encoded))})

    def baseline(self, train: Encoded, loader: Loader, base: nn.Module) -> Metrics:
        """Return the figures of the untuned model `base`."""
        return self.evaluate(base, loader)


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy (nats) of the labels; logits: (rows, tokens or more, vocabulary).

    Where a method has put extra tokens in front of the decoder's, the last logits are those of the labels.
    """
    aligned = logits[:, -labels.shape[1] :, :].float()
    return F.cross_entropy(aligned.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return greedily decoded ids (rows, tokens), no longer than the longest target of the batch."""
    generated: Tensor = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=batch["labels"].shape[1],
        do_sample=False,
        num_beams=1,
    )
    return generated


def _normalised(text: str) -> str:
    return " ".join(text.split())
