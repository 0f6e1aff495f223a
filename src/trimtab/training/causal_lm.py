"""Text, or prompt and completion → the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import SettingError
from trimtab.extras import require
from trimtab.training.batches import Loader
from trimtab.training.columns import COMPLETION, PROMPT, TEXT, find_column, matching_columns
from trimtab.training.encoding import IGNORED, Encoded, Tokens, check_room, make_encoded, no_tokens, tokenize_plain
from trimtab.training.errors import DataError
from trimtab.training.metrics import Metrics, evaluating, perplexity, sum_finite
from trimtab.training.table import Table, listed


@dataclass(frozen=True)
class CausalLM:
    """A causal language model on whole texts (`text`), or on completions that follow prompts (`prompt`, `completion`).

    Rows begin with the tokenizer's beginning-of-text token where it adds one itself, and end with its end-of-text
    token where it has one. With prompts, loss and metrics are taken on the completion and the end alone.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None

    name = "causal-lm"

    def __post_init__(self) -> None:
        whole, pair = self.text is not None, self.prompt is not None or self.completion is not None
        if whole == pair or (pair and (self.prompt is None or self.completion is None)):
            raise SettingError(
                f"a causal language model takes either a text column, or a prompt and a completion column; "
                f"found text={self.text!r}, prompt={self.prompt!r}, completion={self.completion!r}."
            )
        if pair and self.prompt == self.completion:
            raise SettingError(f"the column {self.prompt!r} cannot be both the prompt and the completion.")

    @classmethod
    def from_table(
        cls, train: Table, text: str | None = None, prompt: str | None = None, completion: str | None = None
    ) -> CausalLM:
        """Choose the form from the columns: those named, else the conventional ones where only one form fits."""
        if text is None and prompt is None and completion is None:
            pairs = bool(matching_columns(train, COMPLETION))
            if pairs and "text" in matching_columns(train, TEXT):
                raise DataError(
                    f"{train.source} has {listed(train.columns)}; whole texts and completions are both possible. "
                    "Name either text=…, or prompt=… and completion=…."
                )
            if not pairs:
                return cls(text=find_column(train, "text", None, TEXT))
        if text is not None:
            task = cls(text, prompt, completion)
            train.values(text)
            return task
        return cls(
            prompt=find_column(train, "prompt", prompt, PROMPT),
            completion=find_column(train, "completion", completion, COMPLETION),
        )

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForCausalLM."""
        return require("transformers", "hf").AutoModelForCausalLM

    def model_settings(self) -> dict[str, Any]:
        """Return nothing: a language model is used as it is."""
        return {}

    def encode(self, rows: Table, tokenizer: Any, max_length: int) -> Encoded:
        """Return token ids, and as labels the tokens on which loss is taken (−100 elsewhere).

        A whole text that is too long loses its end. A prompt that is too long loses its beginning, so that there is
        always a completion to learn; a completion that alone is too long loses its end.
        """
        if self.text is not None:
            return self._encode_texts(rows, self.text, tokenizer, max_length)
        return self._encode_pairs(rows, str(self.prompt), str(self.completion), tokenizer, max_length)

    def loss_terms(self, labels: Tensor) -> int:
        """Return the number of predicted tokens; the first of a row is not predicted."""
        return int((labels[:, 1:] != IGNORED).sum())

    def evaluate(self, model: nn.Module, loader: Loader) -> Metrics:
        """Return the mean loss per predicted token (nats) and its exponential, the perplexity."""
        with evaluating(model) as device:

            def measure(rows: tuple[int, ...], batch: dict[str, Tensor]) -> tuple[float, int]:
                labels = batch["labels"].to(device)
                logits = model(
                    input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
                ).logits
                return float(next_token_loss(logits, labels)), self.loss_terms(labels)

            losses, counts = zip(*loader.measure(measure), strict=True)
        loss = sum_finite(losses) / sum(counts)
        return Metrics("loss", False, {"loss": loss, "perplexity": perplexity(loss)}, len(loader.encoded))

    def baseline(self, train: Encoded, loader: Loader, base: nn.Module) -> Metrics:
        """Return the figures of the untuned model `base`."""
        return self.evaluate(base, loader)

    def _encode_texts(self, rows: Table, column: str, tokenizer: Any, max_length: int) -> Encoded:
        start, end = start_tokens(tokenizer), _end(tokenizer)
        check_room(rows, max_length, len(start) + 1 if start else 2)
        whole = [start + body + end for body in tokenize_plain(rows, column, tokenizer)]
        for index, row in enumerate(whole):
            if len(row) < 2:  # nothing precedes the only token: nothing to predict
                raise no_tokens(rows, index, column)
        ids = [row[:max_length] for row in whole]
        cut = frozenset(index for index, row in enumerate(whole) if len(row) > max_length)
        return make_encoded(rows, Tokens(ids, cut, max(map(len, whole))), ids, tokenizer, max_length)

    def _encode_pairs(self, rows: Table, prompt: str, completion: str, tokenizer: Any, max_length: int) -> Encoded:
        start, end = start_tokens(tokenizer), _end(tokenizer)
        room = max_length - len(start)
        check_room(rows, max_length, len(start) + 2)  # one token of the prompt, one of the completion
        prompts = tokenize_plain(rows, prompt, tokenizer)
        answers = [tokens + end for tokens in _continuations(rows, prompt, completion, prompts, tokenizer)]
        ids, labels, cut = [], [], set()
        for index, (question, answer) in enumerate(zip(prompts, answers, strict=True)):
            kept = answer[: room - 1]
            context = start + question[-(room - len(kept)) :]
            if len(question) + len(answer) > room:
                cut.add(index)
            ids.append(context + kept)
            labels.append([IGNORED] * len(context) + kept)
        longest = max(len(start) + len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
        return make_encoded(rows, Tokens(ids, frozenset(cut), longest), labels, tokenizer, max_length)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy (nats) of each label given what precedes it.

    logits: (rows, tokens or more, vocabulary); labels: (rows, tokens), −100 where none is taken. Where a method has put
    extra tokens in front, the last logits are those of the labels.
    """
    aligned = logits[:, -labels.shape[1] : -1, :].float()  # (rows, tokens − 1, vocabulary)
    return F.cross_entropy(aligned.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


def start_tokens(tokenizer: Any) -> list[int]:
    """Return the beginning-of-text token, if the tokenizer puts one in front by itself."""
    token_id = tokenizer.bos_token_id
    added = tokenizer("")["input_ids"][:1]
    return [token_id] if token_id is not None and added == [token_id] else []


def _end(tokenizer: Any) -> list[int]:
    token_id = tokenizer.eos_token_id
    return [] if token_id is None else [token_id]


def _continuations(
    rows: Table, prompt: str, completion: str, prompts: list[list[int]], tokenizer: Any
) -> list[list[int]]:
    """Return the tokens of each completion as they follow the prompt's own tokens.

    They are the rest of prompt + completion tokenized together; where a token would span the border, the completion's
    own tokens: when the model is used, the prompt ends at the border.
    """
    alone = tokenize_plain(rows, completion, tokenizer)
    texts = [a + b for a, b in zip(rows.texts(prompt), rows.texts(completion), strict=True)]
    together: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [
        joint[len(question) :] if len(joint) > len(question) and joint[: len(question)] == question else own
        for joint, question, own in zip(together, prompts, alone, strict=True)
    ]
