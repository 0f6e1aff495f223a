"""Figures of merit: what they are, which one decides, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from trimtab.errors import TrainingError
from trimtab.hooks import keeping_modes

NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %: two-sided 95 %


@dataclass(frozen=True)
class Metrics:
    """Named figures over `rows` rows. `primary` names the one by which runs are compared.

    `intervals` holds 95 % confidence intervals of the figures that are proportions.
    """

    primary: str
    higher_is_better: bool
    values: Mapping[str, float]
    rows: int
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The primary figure."""
        return self.values[self.primary]

    def is_better_than(self, other: Metrics) -> bool:
        """Return whether the primary figure is strictly better than `other`'s, or the same at a lower loss."""
        if self.value == other.value:
            return self.values.get("loss", math.inf) < other.values.get("loss", math.inf)
        return self.value > other.value if self.higher_is_better else self.value < other.value

    def __str__(self) -> str:
        parts = []
        for name, value in self.values.items():
            interval = self.intervals.get(name)
            bounds = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            parts.append(f"{name} {value:.4f}{bounds}")
        return f"{', '.join(parts)} ({self.rows} rows)"


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927, "Probable inference"): within [0, 1]."""
    share, z = successes / trials, NORMAL_QUANTILE
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def macro_f1(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Return the mean F1 = 2·tp / (2·tp + fp + fn) over the classes that occur in either sequence."""
    scores = []
    for label in sorted(set(predicted) | set(true)):
        pairs = [(guess == label, truth == label) for guess, truth in zip(predicted, true, strict=True)]
        hits = sum(guess and truth for guess, truth in pairs)
        scores.append(2 * hits / sum(guess + truth for guess, truth in pairs))
    return sum(scores) / len(scores)


def accuracy_metrics(predicted: Sequence[int], true: Sequence[int], loss: float | None = None) -> Metrics:
    """Return accuracy (with its interval), macro-F1 and, where given, the loss of predicted classes."""
    hits = sum(guess == truth for guess, truth in zip(predicted, true, strict=True))
    values = {"accuracy": hits / len(true), "macro_f1": macro_f1(predicted, true)}
    if loss is not None:
        values["loss"] = loss
    return Metrics("accuracy", True, values, len(true), {"accuracy": wilson_interval(hits, len(true))})


def perplexity(loss: float) -> float:
    """Return e to the mean loss per token (in nats); infinite where that exceeds what a float holds."""
    return math.exp(loss) if loss < 709 else math.inf


def sum_finite(losses: Sequence[float]) -> float:
    """Return the sum of the losses of batches; raises TrainingError when one is infinite or not a number."""
    for batch, value in enumerate(losses):
        if not math.isfinite(value):
            raise TrainingError(
                f"the evaluation loss of batch {batch} (from 0) is {value}: the model gives no usable output. "
                "Lower the learning rate, or evaluate in float32."
            )
    return sum(losses)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Switch every module to evaluation and gradients off; yield the model's device; restore each module's own mode."""
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield next(model.parameters()).device
