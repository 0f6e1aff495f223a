"""What many adapters on one model cost: the sixtieth attach against the first, eight adapters in one batch against one.

    python benchmarks/many_adapters.py --repeats 9 --rounds 25 --write

Ratios within one process, on one thread, beside huggingface/peft on the same random Llamas. `--write` keeps the figures
in benchmarks/results/many_adapters.json and puts their table into docs/performance.md. Ends with status 1 if a budget
is broken.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    LAYERS,
    ROOT,
    conditions,
    markdown,
    median_ratio,
    paired_seconds,
    random_llama,
    random_tokens,
    with_peft,
    write_section,
)
from torch import nn

import trimtab as tt
from trimtab.adapter_file import write_atomically

RESULTS = ROOT / "benchmarks" / "results" / "many_adapters.json"
SECTION = "many adapters"
ATTACHED, ROUTED, ATTACH_LIMIT, ROUTE_LIMIT = 60, 8, 1.2, 1.5
ATTACH_LAYERS, ATTACH_WIDTH, ROUTE_WIDTH = 8, 64, 256


def seconds_of(action: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def attach_ratio(
    base: nn.Module, repeats: int, add: Callable[[Any, int], object], begin: Callable[[Any], Any]
) -> float:
    """Return the median, over fresh models, of the last attach's time relative to the first's."""
    ratios = []
    for repeat in range(repeats + 1):
        model = begin(copy.deepcopy(base))
        times = [seconds_of(lambda i=i, model=model: add(model, i)) for i in range(ATTACHED)]
        if repeat:  # the first model also pays for classes and imports that are made once in a process
            ratios.append(times[-1] / times[0])
    return statistics.median(ratios)


def attach_ratios(repeats: int) -> tuple[float, float]:
    """Return (Trimtab's, peft's) ratio of the sixtieth attach to the first, on all linear layers."""
    import peft

    base = random_llama(ATTACH_WIDTH, ATTACH_LAYERS)
    config = peft.LoraConfig(r=8, target_modules="all-linear")

    def add_to_peft(model: Any, index: int) -> None:
        model.add_adapter(f"a{index}", config)

    method = tt.LoRA(rank=8)
    own = attach_ratio(base, repeats, lambda model, i: tt.attach(model, method, f"a{i}"), lambda model: model)
    # peft's wrapper cannot be made without a first adapter; the first one added to it is taken as its first.
    other = attach_ratio(base, repeats, add_to_peft, lambda model: peft.get_peft_model(model, config, "first"))
    return own, other


def routed_actions(base: nn.Module, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return the forwards to compare: one adapter for all rows, or one each for eight rows; ours and peft's."""
    import peft

    names = [f"a{i}" for i in range(ROUTED)]
    single, routed = copy.deepcopy(base), copy.deepcopy(base)
    tt.attach(single, tt.LoRA(rank=8))
    for name in names:
        tt.attach(routed, tt.LoRA(rank=8), name)
    peft_single = with_peft(base).eval()
    peft_routed: Any = with_peft(base)
    for name in names:
        peft_routed.add_adapter(name, peft.LoraConfig(r=8, target_modules="all-linear"))
    peft_routed.eval()

    def run_routed() -> None:
        with tt.route(routed, names):
            routed(input_ids=tokens)

    return {
        "one": lambda: single(input_ids=tokens),
        "eight": run_routed,
        "peft one": lambda: peft_single(input_ids=tokens),
        "peft eight": lambda: peft_routed(input_ids=tokens, adapter_names=names),
    }


def route_ratios(length: int, rounds: int) -> tuple[float, float]:
    """Return (Trimtab's, peft's) ratio of a batch with eight adapters to a batch with one, in inference."""
    actions = routed_actions(random_llama(ROUTE_WIDTH).eval(), random_tokens(ROUTED, length))
    with torch.no_grad():
        seconds = dict(zip(actions, paired_seconds(list(actions.values()), rounds), strict=True))
    return median_ratio(seconds["eight"], seconds["one"]), median_ratio(seconds["peft eight"], seconds["peft one"])


def section(results: dict[str, Any]) -> str:
    """Return the table of what was measured, with the conditions it was measured under."""
    cells = [[text, f"{own:.2f}", f"{other:.2f}", f"{limit:.1f}"] for text, own, other, limit in results["rows"]]
    caption = (
        f"Attach: LoRA of rank 8 on all linear layers of a random Llama of {ATTACH_LAYERS} layers, width "
        f"{ATTACH_WIDTH}, median over {results['repeats']} fresh models. Batch: inference on {LAYERS} layers, width "
        f"{ROUTE_WIDTH}, median over {results['rounds']} rounds.\n\n{results['conditions']}."
    )
    return f"{markdown(['', 'Trimtab', 'peft', 'budget'], cells)}\n\n{caption}"


def main() -> int:
    """Measure, print, and write where asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="fresh models for the attach ratio")
    parser.add_argument("--rounds", type=int, default=25, help="rounds for the routed batch")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [("sixtieth attach / first", *attach_ratios(arguments.repeats), ATTACH_LIMIT)]
    for length in (16, 128):
        text = f"eight adapters in a batch of 8×{length} tokens / one adapter"
        rows.append((text, *route_ratios(length, arguments.rounds), ROUTE_LIMIT))
    results = {"repeats": arguments.repeats, "rounds": arguments.rounds, "rows": rows, "conditions": conditions()}
    print(section(results))
    if arguments.write:
        write_atomically(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
        write_section(SECTION, section(results))
    return 0 if all(own <= limit for _, own, _, limit in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
