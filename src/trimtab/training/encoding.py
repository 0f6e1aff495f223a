"""From texts to batches of token ids: truncation that is counted, padding that is masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.errors import SettingError
from trimtab.training.errors import DataError, ModelError
from trimtab.training.table import Table

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True, eq=False)
class Encoded:
    """Rows as token ids, one 1-D int32 tensor each, and their labels: a class (0-D) or a token sequence (1-D).

    `truncated` rows were cut to `max_length` tokens; `longest` is what the longest row would have needed.
    `references` are the target texts where the task compares texts; `decode` turns ids (rows, tokens) into texts.
    """

    source: str
    inputs: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    max_length: int
    truncated: int
    longest: int
    padding_id: int
    decode: Callable[[Tensor], list[str]]
    references: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row's input."""
        return tuple(len(row) for row in self.inputs)

    def collate(self, batch: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows at the indices `batch`, padded on the right to the longest of them.

        input_ids and attention_mask: (rows, tokens) int64; labels: (rows,) classes, or (rows, tokens) with −100 where
        no loss is taken, padding included.
        """
        inputs = [self.inputs[index] for index in batch]
        labels = [self.labels[index] for index in batch]
        lengths = torch.tensor([len(row) for row in inputs])
        input_ids = pad_sequence(inputs, batch_first=True, padding_value=self.padding_id).long()
        # From the lengths, never from the ids: the padding token may be a token of the text as well.
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        joined = torch.stack(labels) if labels[0].ndim == 0 else pad_sequence(labels, True, IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": joined.long()}

    def report(self) -> str:
        """Return one sentence on truncation: '12 of 500 rows of train.csv were cut to 128 tokens (longest: 310).'"""
        if not self.truncated:
            return f"No row of {self.source} was cut (longest: {self.longest} of {self.max_length} tokens)."
        return (
            f"{self.truncated} of {len(self)} rows of {self.source} were cut to {self.max_length} tokens "
            f"(longest: {self.longest})."
        )


@dataclass(frozen=True)
class Tokens:
    """Token ids of each row, which rows were cut, and the tokens the longest would have needed."""

    ids: list[list[int]]
    cut: frozenset[int]
    longest: int


def tokenize(table: Table, column: str, tokenizer: Any, max_length: int, *, target: bool = False) -> Tokens:
    """Turn a column of texts into token ids with the tokenizer's own special tokens, at most `max_length` each.

    `target` uses the tokenizer's mode for target texts. Raises SettingError when `max_length` leaves no room for text,
    DataError naming the row whose text holds nothing the tokenizer knows how to express.
    """
    argument = "text_target" if target else "text"
    texts = list(table.texts(column))
    special = int(tokenizer.num_special_tokens_to_add())
    check_room(table, max_length, special + 1)
    ids: list[list[int]] = tokenizer(**{argument: texts}, truncation=False, verbose=False)["input_ids"]
    for index, row in enumerate(ids):
        if len(row) <= special:
            raise no_tokens(table, index, column)
    longest = max(map(len, ids))
    cut = [index for index, row in enumerate(ids) if len(row) > max_length]
    if cut:
        long_texts = {argument: [texts[index] for index in cut]}
        shortened = tokenizer(**long_texts, truncation=True, max_length=max_length, verbose=False)["input_ids"]
        for index, row in zip(cut, shortened, strict=True):
            ids[index] = row
    return Tokens(ids, frozenset(cut), longest)


def tokenize_plain(table: Table, column: str, tokenizer: Any) -> list[list[int]]:
    """Turn a column of texts into token ids of any length, without special tokens; raises DataError as `tokenize`."""
    texts = list(table.texts(column))
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    for index, row in enumerate(ids):
        if not row:
            raise no_tokens(table, index, column)
    return ids


def check_room(table: Table, max_length: int, needed: int) -> None:
    """Raise SettingError when `max_length` tokens cannot hold the `needed` tokens of the shortest useful row."""
    if max_length < needed:
        raise SettingError(
            f"max_length={max_length} cuts every one of the {len(table)} rows of {table.source} to nothing: "
            f"with the tokenizer's special tokens a row needs {needed}. Give max_length={needed} or more."
        )


def no_tokens(table: Table, index: int, column: str) -> DataError:
    """Return the error for a text of which the tokenizer leaves nothing."""
    return DataError(
        f"{table.place(index)}: the tokenizer leaves nothing of the text {table.values(column)[index]!r} "
        f"in column {column!r}. Correct or remove the row."
    )


def make_encoded(
    table: Table,
    tokens: Tokens,
    labels: Sequence[int] | Sequence[Sequence[int]],
    tokenizer: Any,
    max_length: int,
    references: Sequence[str] = (),
) -> Encoded:
    """Return token ids and labels (classes or token sequences) as tensors, with the tokenizer's padding."""
    return Encoded(
        source=table.source,
        inputs=tuple(torch.tensor(row, dtype=torch.int32) for row in tokens.ids),
        labels=tuple(torch.tensor(label, dtype=torch.int32) for label in labels),
        max_length=max_length,
        truncated=len(tokens.cut),
        longest=tokens.longest,
        padding_id=padding_id(tokenizer),
        decode=partial(tokenizer.batch_decode, skip_special_tokens=True),
        references=tuple(references),
    )


def padding_id(tokenizer: Any) -> int:
    """Return the id that fills batches: the padding token, or the end-of-text token where there is none.

    Either is safe, since padding is left out by position, not by id. Raises ModelError when there is neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ModelError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token.")
