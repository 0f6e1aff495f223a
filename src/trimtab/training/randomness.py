"""The state of every random generator that a training step may draw from: captured, restored, seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.extras import require


@dataclass(frozen=True, eq=False)
class RandomState:
    """States of torch's generators, as tensors by name, and of Python's and NumPy's, as JSON values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def restore(self, device: torch.device) -> None:
        """Set every generator; `device` is the one that the model computes on."""
        torch.set_rng_state(self.tensors["cpu"])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(self.tensors["device"])
        version, numbers, gauss = self.values["python"]
        random.setstate((version, tuple(numbers), gauss))
        name, keys, *rest = self.values["numpy"]
        numpy = require("numpy", "hf")
        numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))


def capture(device: torch.device) -> RandomState:
    """Return the state of every generator; `device` is the one that the model computes on."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors["device"] = torch.get_device_module(device).get_rng_state()
    name, keys, *rest = require("numpy", "hf").random.get_state()
    return RandomState(tensors, {"python": list(random.getstate()), "numpy": [name, keys.tolist(), *rest]})


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator for the block and give each its own state back afterwards."""
    before = capture(device)
    random.seed(seed)
    require("numpy", "hf").random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        before.restore(device)
