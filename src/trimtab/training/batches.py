"""The order of batches: a function of the seed and the epoch alone, so training resumes at any batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from trimtab.errors import SettingError
from trimtab.training.encoding import Encoded
from trimtab.training.processes import ALONE, Processes

Item = TypeVar("Item")

# Rows are sorted by length within windows of this many batches: short padding, yet a different order each epoch.
GROUPED_BATCHES = 50


@dataclass(frozen=True, order=True)
class Position:
    """A place in the data: the batch numbered `batch` of the epoch numbered `epoch`, both from 0."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class BatchOrder:
    """Which rows form which batch. `lengths`: tokens of each row; `batch_size` ≥ 1; the last batch may be smaller.

    With `shuffle` each epoch has its own order, drawn from `seed`; `group_by_length` puts rows of like length together.
    The order depends on nothing else: not on the machine, nor on what was drawn before.
    """

    lengths: tuple[int, ...]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingError(f"batch_size={self.batch_size}; it must be at least 1.")
        if not self.lengths:
            raise SettingError("there are no rows to form batches from.")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def batches(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """Return the row indices (from 0) of every batch of an epoch; each row occurs exactly once."""
        rows = list(range(len(self.lengths)))
        if self.shuffle:
            rows = shuffled(rows, f"order of rows, seed {self.seed}, epoch {epoch}")
        if self.group_by_length:
            rows = self._grouped(rows)
        size = self.batch_size
        batches = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
        if self.shuffle and self.group_by_length:
            batches = shuffled(batches, f"order of batches, seed {self.seed}, epoch {epoch}")
        return tuple(batches)

    def run(self, epochs: int, start: Position = Position()) -> Iterator[tuple[Position, tuple[int, ...]]]:
        """Yield (position, row indices) from `start` to the end of the last epoch.

        Resuming at the position after the last finished batch gives the batches that the unbroken run would have given.
        Raises SettingError when `start` lies outside the run, as it does when the data or the batch size changed.
        """
        if not (0 <= start.epoch <= epochs and 0 <= start.batch < len(self)):
            raise SettingError(
                f"cannot resume at epoch {start.epoch}, batch {start.batch}: the run has {epochs} epochs of "
                f"{len(self)} batches (counted from 0). Resume with the same data and batch size."
            )
        for epoch in range(start.epoch, epochs):
            first = start.batch if epoch == start.epoch else 0
            for index, rows in enumerate(self.batches(epoch)[first:], start=first):
                yield Position(epoch, index), rows

    def after(self, position: Position) -> Position:
        """Return the position of the batch that follows; at the end of the run, the first of the next epoch."""
        if position.batch + 1 < len(self):
            return Position(position.epoch, position.batch + 1)
        return Position(position.epoch + 1, 0)

    def _grouped(self, rows: list[int]) -> list[int]:
        window = GROUPED_BATCHES * self.batch_size if self.shuffle else len(rows)
        windows = (rows[start : start + window] for start in range(0, len(rows), window))
        return [row for part in windows for row in sorted(part, key=self.lengths.__getitem__, reverse=True)]


@dataclass(frozen=True)
class Loader:
    """Encoded rows in an order: iterate it for the batches of epoch 0, or `run` it to train and resume.

    `processes`: those that share the work of `measure`.
    """

    encoded: Encoded
    order: BatchOrder
    processes: Processes = ALONE

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.encoded.collate(rows) for rows in self.order.batches(0))

    def measure(self, function: Callable[[tuple[int, ...], dict[str, Tensor]], Item]) -> list[Item]:
        """Return function(rows, batch) for every batch of epoch 0, in order, each computed by one of the processes."""
        return self.processes.spread(lambda rows: function(rows, self.encoded.collate(rows)), self.order.batches(0))

    def run(self, epochs: int, start: Position = Position()) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """Yield (position, batch) from `start` to the end of the last epoch; see `BatchOrder.run`."""
        return ((position, self.encoded.collate(rows)) for position, rows in self.order.run(epochs, start))


def make_loader(
    encoded: Encoded,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    group_by_length: bool = False,
    processes: Processes = ALONE,
) -> Loader:
    """Return the loader of `encoded` rows; for evaluation give shuffle=False, and the processes that share it."""
    return Loader(encoded, BatchOrder(encoded.lengths, batch_size, seed, shuffle, group_by_length), processes)


def shuffled(items: list[Item], key: str) -> list[Item]:
    """Return `items` in a random order that is a function of `key` alone."""
    # Of Python's generators only random() is promised to repeat across versions; shuffle() is not.
    generator = random.Random(key)
    draws = [generator.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=draws.__getitem__)]
