"""The settings of a training run, and what follows from them alone: its length, its steps, its learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trimtab.errors import SettingError, suggestion
from trimtab.training.batches import BatchOrder

_ABOVE_ZERO = (
    "lr", "steps", "epochs", "batch_size", "accumulation", "clip", "evaluate_every", "checkpoint_every",
)  # fmt: skip
_LARGEST = 1e12  # beyond it a run would never end, and optimizers compute with infinities
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class LoopSettings:
    """How to train. Give either `steps` (optimizer steps) or `epochs` (passes over the data; may be a fraction).

    `batch_size`: rows of one micro-batch over all processes; `accumulation`: micro-batches of one step.
    `warmup`: share of the steps, in [0, 1), over which the learning rate rises to `lr`; then it falls to zero by
    `schedule`, or stays. `clip`: largest norm of the gradient, None for no limit. `evaluate_every` and
    `checkpoint_every` count optimizer steps; None means at the end of each epoch.
    """

    lr: float
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float | None = 1.0
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    group_by_length: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise SettingError(f"give either steps or epochs; found steps={self.steps!r}, epochs={self.epochs!r}.")
        if self.schedule not in SCHEDULES:
            near = suggestion(self.schedule, SCHEDULES)
            raise SettingError(f"schedule={self.schedule!r}; choose one of {', '.join(SCHEDULES)}.{near}")
        if not 0 <= self.warmup < 1:
            raise SettingError(f"warmup={self.warmup!r}; it is a share of the steps, from 0 to below 1.")
        if not 0 <= self.weight_decay <= _LARGEST:
            raise SettingError(f"weight_decay={self.weight_decay!r}; it must be a number from 0 to {_LARGEST:g}.")
        if not 0 <= self.seed < 2**64:
            raise SettingError(f"seed={self.seed!r}; it must be a whole number from 0 to 2**64 - 1.")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:
                raise SettingError(f"{name}={value!r}; it must be a number above 0 and at most {_LARGEST:g}.")


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the rows of each micro-batch, and whether an epoch ends with it."""

    number: int
    batches: tuple[tuple[int, ...], ...]
    ends_epoch: bool


@dataclass(frozen=True)
class Schedule:
    """Every step of a run, as a function of the step's number alone: what resumes exactly is what has no state."""

    settings: LoopSettings
    order: BatchOrder

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; a step never reaches into the next epoch, so an epoch's last may be smaller."""
        return -(-len(self.order) // self.settings.accumulation)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.settings.steps is not None:
            return self.settings.steps
        assert self.settings.epochs is not None
        return math.ceil(self.settings.epochs * self.steps_per_epoch)

    def run(self, start: int) -> Iterator[Step]:
        """Yield the steps from number `start` to the end of the run."""
        size = self.settings.accumulation
        epoch, batches = -1, self.order.batches(0)
        for number in range(start, self.total_steps):
            if number // self.steps_per_epoch != epoch:
                epoch = number // self.steps_per_epoch
                batches = self.order.batches(epoch)
            first = number % self.steps_per_epoch * size
            yield Step(number, batches[first : first + size], first + size >= len(batches))

    def learning_rate_factor(self, number: int) -> float:
        """Return what multiplies the learning rates in step `number`; in (0, 1], never zero: no step is wasted."""
        total, warmup = self.total_steps, math.ceil(self.settings.warmup * self.total_steps)
        if number < warmup:
            return (number + 1) / (warmup + 1)
        share = (number - warmup) / max(1, total - warmup)  # of the way down, below 1
        if self.settings.schedule == "linear":
            return 1.0 - share
        return 0.5 * (1.0 + math.cos(math.pi * share)) if self.settings.schedule == "cosine" else 1.0

    def is_due(self, every: int | None, step: Step) -> bool:
        """Whether what happens `every` so many steps (None: each epoch) happens after `step`; always at the end."""
        due = step.ends_epoch if every is None else (step.number + 1) % every == 0
        return due or step.number + 1 == self.total_steps
