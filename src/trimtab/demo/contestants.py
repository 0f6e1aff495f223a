"""Who takes part: two references and eight methods, each at the learning rate that one documented search found.

`python benchmarks/demo_search.py --write` repeats the search (the same number of runs and steps for each, chosen on
the validation messages) and writes docs/demo_search.md; a test holds the rates below to its results.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.method import Method
from trimtab.methods.activation.houlsby import HoulsbyAdapter
from trimtab.methods.activation.ia3 import IA3
from trimtab.methods.activation.parallel_adapter import ParallelAdapter
from trimtab.methods.activation.ssf import SSF
from trimtab.methods.composition.compose import Compose
from trimtab.methods.selection.bitfit import BitFit
from trimtab.methods.selection.full_tuning import FullTuning
from trimtab.methods.selection.linear_probe import LinearProbe
from trimtab.methods.weight.dora import DoRA
from trimtab.methods.weight.lora import LoRA
from trimtab.methods.weight.paca import PaCA


@dataclass(frozen=True)
class Contestant:
    """One way of tuning, the learning rate it is recommended with here, and the rates that the search tried."""

    key: str
    name: str
    method: Method
    lr: float
    searched: tuple[float, ...]
    reference: bool = False


def _adapter(key: str, name: str, method: Method, lr: float, searched: tuple[float, ...]) -> Contestant:
    return Contestant(key, name, method, lr, searched)


HEAD = FullTuning(targets="classifier", lr_scale=20.0)
SMALL, LARGE = (1e-3, 2e-3, 4e-3), (3e-3, 1e-2, 3e-2)

# The references come last: the methods take about equally long, so that the time left is known from the first on.
CONTESTANTS = (
    _adapter("lora", "LoRA", LoRA(rank=8), 2e-3, SMALL),
    _adapter("dora", "DoRA", DoRA(rank=8), 2e-3, SMALL),
    _adapter("paca", "PaCA", PaCA(rank=16), 2e-3, SMALL),
    _adapter("houlsby", "Houlsby adapter", HoulsbyAdapter(bottleneck=32), 2e-3, SMALL),
    _adapter("parallel", "scaled parallel adapter", ParallelAdapter(bottleneck=64), 2e-3, SMALL),
    _adapter("ssf", "SSF", SSF(), 3e-3, LARGE),
    _adapter("bitfit", "BitFit", BitFit(), 3e-3, LARGE),
    _adapter("ia3", "(IA)³", IA3(), 1e-2, LARGE),
    Contestant("linear-probe", "linear probe", LinearProbe(), 1e-1, (3e-2, 1e-1, 3e-1), reference=True),
    Contestant(
        "full", "full fine-tuning", Compose(FullTuning(targets="all - classifier"), HEAD), 2e-4,
        (1e-4, 2e-4, 4e-4), reference=True,
    ),
)  # fmt: skip


def contestant(key: str) -> Contestant:
    """Return a contestant by its key."""
    return next(one for one in CONTESTANTS if one.key == key)
