"""What a training run tells while it runs and when it has ended, and how it measures its own cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from trimtab.extras import require
from trimtab.training.metrics import Metrics


@dataclass(frozen=True)
class Progress:
    """Told after every optimizer step. `step` counts from 1; `loss` is the step's mean loss without penalties.

    `seconds` of training so far, earlier sessions included; `remaining` seconds, as estimated from this session.
    `peak_bytes`: see `peak_bytes()`. `metrics`: of the validation data, where the step was followed by an evaluation.
    """

    step: int
    total_steps: int
    loss: float
    seconds: float
    remaining: float
    examples_per_second: float
    peak_bytes: int
    metrics: Metrics | None


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run gave. The adapter holds the state that was `best` on the validation data, where there is any.

    `saved_step`: the number of steps after which it had that state, all of them without validation data.
    `final_loss`: mean training loss of the last step; `last`: metrics after it; `resumed_from`: the number of steps
    that earlier sessions had made.
    """

    steps: int
    seconds: float
    final_loss: float
    peak_bytes: int
    best: Metrics | None
    last: Metrics | None
    resumed_from: int
    saved_step: int


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: what torch has allocated on a GPU, else what the process had resident.

    On a GPU the count starts with the run, on the CPU with the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(require("psutil", "hf").Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
