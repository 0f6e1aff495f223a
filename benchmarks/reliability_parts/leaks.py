"""Leaks: what a thousand rounds leave behind, and what the sixtieth attach costs.

Counts are those of `tests/leaks.py`: live tensors and their bytes, hooks, classes, open files, Python's own objects.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import random_llama
from many_adapters import ATTACH_LAYERS, ATTACH_LIMIT, ATTACH_WIDTH, attach_ratio

import trimtab as tt
from reliability_parts import Row

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import leaks

ROUNDS, OTHER_ROUNDS, TRACED_ROUNDS, REPEATS = 1000, 100, 500, 15
QUICK_ROUNDS, QUICK_REPEATS = 10, 3


def rows(full: bool) -> list[Row]:
    """Return the lines of this part; `full` runs a thousand rounds of attaching and loading for every method."""
    lines = []
    for action in leaks.ACTIONS:
        rounds = QUICK_ROUNDS if not full else ROUNDS if action in leaks.ALONE else OTHER_ROUNDS
        lines.append(_counted(action, rounds))
    lines += [_traced(action, TRACED_ROUNDS if full else QUICK_ROUNDS) for action in leaks.ALONE if full]
    return [*lines, _sixtieth(REPEATS if full else QUICK_REPEATS)]


def _counted(action: str, rounds: int) -> Row:
    methods = [method for method in leaks.METHODS if leaks.applies(action, method)]
    found = {method: leaks.excess(leaks.growth(action, method, rounds, traced=False), rounds) for method in methods}
    grown = {method: excess for method, excess in found.items() if excess}
    measured = "no growth" if not grown else "; ".join(f"{method}: {excess}" for method, excess in grown.items())
    what = f"{rounds:,} × {action.replace('_', ', ')}, each of {len(methods)} methods"
    return Row(what, "no growth in tensors, bytes, hooks, classes, files, objects", measured, not grown)


def _traced(action: str, rounds: int) -> Row:
    grown = leaks.growth(action, "LoRA", rounds, traced=True)["python_bytes"]
    limit = leaks.BYTES_PER_ROUND * rounds
    what = f"{rounds:,} × {action.replace('_', ', ')} after {rounds:,}: Python's own memory (LoRA)"
    return Row(what, f"at most {leaks.BYTES_PER_ROUND} bytes a round", f"{grown / rounds:.1f} bytes", grown <= limit)


def _sixtieth(repeats: int) -> Row:
    torch.set_num_threads(1)
    base, method = random_llama(ATTACH_WIDTH, ATTACH_LAYERS), tt.LoRA(rank=8)
    ratio = attach_ratio(base, repeats, lambda model, i: tt.attach(model, method, f"a{i}"), lambda model: model)
    what = f"sixtieth attach / first, LoRA on all linear layers, median of {repeats}"
    return Row(what, f"at most {ATTACH_LIMIT}", f"{ratio:.2f}", ratio <= ATTACH_LIMIT)
