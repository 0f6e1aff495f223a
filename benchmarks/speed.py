"""Step time and saved activations of Trimtab and huggingface/peft, as ratios to the frozen floor.

    python benchmarks/speed.py --widths 256 512 --rounds 25 --write

The floor trains only the first norm: forward and the full gradient of the activations, but no gradient of a weight.
Every contender trains a copy of one random Llama on one batch, in one process, on one thread; each round runs one step
of each in a new random order and is compared with the floor's step of the same round. Reported is the median over the
rounds. `--write` keeps the figures in benchmarks/results/speed.json and puts their tables into docs/performance.md.
Ends with status 1 if a budget is broken.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import (
    BATCH,
    HEADS,
    LAYERS,
    LENGTH,
    ROOT,
    VOCABULARY,
    Contender,
    conditions,
    contender,
    frozen_floor,
    markdown,
    median_ratio,
    paired_seconds,
    random_llama,
    random_tokens,
    saved_bytes,
    spread,
    with_method,
    with_peft,
    write_section,
)
from torch import nn

import trimtab as tt
from trimtab.adapter_file import write_atomically

RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
SECTION = "speed"
FLOOR = "frozen floor"


@dataclass(frozen=True)
class Figures:
    """One contender's row: milliseconds, ratio of step time to the floor's, its spread, and bytes kept for backward."""

    milliseconds: float
    ratio: float
    spread: float
    saved: int
    trained: int


@dataclass(frozen=True)
class Budget:
    """`name` must not exceed `limit` times `reference`, in step time or in saved activations, at the given width."""

    name: str
    reference: str
    measure: str
    limit: float
    width: int | None = None


BUDGETS = (
    Budget("LoRA", FLOOR, "time", 1.15, 512),
    Budget("LoRA", "peft LoRA", "time", 1.00),
    Budget("LoRA", FLOOR, "saved", 1.30),
    Budget("LoRA, dropout 0.1", FLOOR, "time", 1.20, 512),
    Budget("LoRA, dropout 0.1", "peft LoRA, dropout 0.1", "time", 1.00),
    Budget("LoRA, dropout 0.1", FLOOR, "saved", 1.32),
    Budget("DoRA", FLOOR, "time", 1.20, 512),
    Budget("DoRA", FLOOR, "saved", 1.57, 512),
    Budget("PaCA", FLOOR, "time", 1.08, 512),
    Budget("PaCA", "LoRA", "time", 1.00),
    Budget("PaCA", "LoRA", "saved", 0.80),
)


def models(base: nn.Module) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield every contender's name and how to make its model."""
    catalogue = tt.methods()
    yield FLOOR, lambda: frozen_floor(base)
    yield "full fine-tuning", lambda: copy.deepcopy(base)
    yield "LoRA", lambda: with_method(base, tt.LoRA(rank=8))
    yield "peft LoRA", lambda: with_peft(base)
    yield "LoRA, dropout 0.1", lambda: with_method(base, tt.LoRA(rank=8, dropout=0.1))
    yield "peft LoRA, dropout 0.1", lambda: with_peft(base, dropout=0.1)
    if "DoRA" in catalogue:
        yield "DoRA", lambda: with_method(base, catalogue["DoRA"](rank=8))
        yield "peft DoRA", lambda: with_peft(base, use_dora=True)
    if "PaCA" in catalogue:
        yield "PaCA", lambda: with_method(base, catalogue["PaCA"](rank=8))


def measure(width: int, rounds: int, only: list[str] | None = None) -> dict[str, Figures]:
    """Return the figures of every contender at one width, the floor first."""
    base, tokens = random_llama(width), random_tokens()
    chosen = [(name, make) for name, make in models(base) if only is None or name in {FLOOR, *only}]
    contenders = [contender(name, make(), tokens) for name, make in chosen]
    saved = [saved_bytes(each) for each in contenders]
    seconds = paired_seconds([each.step for each in contenders], rounds)
    rows = zip(contenders, seconds, saved, strict=True)
    return {each.name: _figures(each, own, seconds[0], held) for each, own, held in rows}


def _figures(each: Contender, seconds: list[float], floor: list[float], saved: int) -> Figures:
    trained = sum(p.numel() for p in each.model.parameters() if p.requires_grad)
    milliseconds = 1000 * sorted(seconds)[len(seconds) // 2]
    return Figures(milliseconds, median_ratio(seconds, floor), spread(seconds, floor), saved, trained)


def report(width: int, rounds: int, figures: dict[str, Figures]) -> str:
    """Return one width's table."""
    floor = figures[FLOOR]
    rows = [
        [
            name,
            f"{f.trained:,}",
            f"{f.milliseconds:.0f}",
            f"{f.ratio:.2f}",
            f"{f.spread:.2f}",
            f"{f.saved / 2**20:.1f}",
            f"{f.saved / floor.saved:.2f}",
        ]
        for name, f in figures.items()
    ]
    header = ["", "trained numbers", "step, ms", "step / floor", "±", "saved, MiB", "saved / floor"]
    return f"Width {width}, {rounds} rounds:\n\n{markdown(header, rows)}"


def verdicts(width: int, figures: dict[str, Figures]) -> Iterator[tuple[bool, str]]:
    """Yield, for each budget that applies, whether it holds and a line that says so."""
    for budget in BUDGETS:
        if budget.width not in (None, width) or not {budget.name, budget.reference} <= set(figures):
            continue
        own, other = figures[budget.name], figures[budget.reference]
        found = own.ratio / other.ratio if budget.measure == "time" else own.saved / other.saved
        mark = "holds" if found <= budget.limit else "BROKEN"
        text = f"{budget.name}, {budget.measure} / {budget.reference} = {found:.3f}, budget {budget.limit:.2f}: {mark}"
        yield found <= budget.limit, f"width {width}: {text}"


def section(results: dict[str, Any]) -> str:
    """Return the tables of what was measured, with the conditions it was measured under."""
    tables = [
        report(int(width), results["rounds"], {name: Figures(**values) for name, values in figures.items()})
        for width, figures in results["widths"].items()
    ]
    caption = (
        f"A random Llama ({LAYERS} layers, {HEADS} heads, vocabulary {VOCABULARY}), batch {BATCH}×{LENGTH}, float32, "
        f"AdamW; LoRA, DoRA and PaCA of rank 8 on all linear layers but the head. Median over rounds of the ratio to "
        f"the floor's step in the same round, processor time; ± is half the width of the middle half of the rounds. "
        f"Saved: distinct storages kept for the backward pass, without parameters and buffers.\n\n"
        f"{results['conditions']}."
    )
    return "\n\n".join([*tables, caption])


def main() -> int:
    """Measure, print, and write where asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="+", help="names of contenders to compare with the floor; default all")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"rounds": arguments.rounds, "widths": {}, "conditions": conditions()}
    lines = []
    for width in arguments.widths:
        figures = measure(width, arguments.rounds, arguments.only)
        print(report(width, arguments.rounds, figures), "\n", flush=True)
        results["widths"][str(width)] = {name: asdict(each) for name, each in figures.items()}
        lines += list(verdicts(width, figures))
    print("\n".join(text for _, text in lines))
    if arguments.write:
        write_atomically(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
        write_section(SECTION, section(results))
    return 0 if all(holds for holds, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
