"""What costs a compilation or a process, for every method on every model of the zoo that it accepts.

The tests try it on one model for each method. Whole-graph compilation runs with the backend aot_eager; a new process
loads the adapter file of another one onto the same base and must give the same bits; two processes train with
DistributedDataParallel and with fully_shard. The small run takes the first models alone.
"""

from __future__ import annotations

from reliability_parts import Row
from reliability_parts.matrix import (
    CASE_NAMES,
    COMPILED,
    METHODS,
    SMALL_CASES,
    SMALL_METHODS,
    instance,
    outcomes_by_invariant,
    row_of,
    zoo_cases,
)
from trimtab.check import attaches
from trimtab.contract.processes import loads_in_a_new_process, trains_distributed

TOLD = {"trains_with_ddp": "DistributedDataParallel", "trains_with_fsdp2": "fully_shard"}


def rows(full: bool) -> list[Row]:
    names = METHODS if full else list(SMALL_METHODS)
    cases = CASE_NAMES if full else list(SMALL_CASES)
    shape = f"{len(names)} methods × {len(cases)} models"
    found = outcomes_by_invariant(names, cases, [COMPILED])
    accepted = [outcome for outcome in found[attaches.__name__] if outcome.result == "held"]
    jobs = [(instance(outcome.method), zoo_cases()[outcome.case]) for outcome in accepted]
    trained = trains_distributed(jobs)
    return [
        row_of(f"{shape}: torch.compile as one graph (aot_eager)", found[COMPILED]),
        row_of(f"{shape}: the same bits in a new process", loads_in_a_new_process(jobs)),
        *(
            row_of(f"{shape}: {text}, two processes", [outcome for outcome in trained if outcome.invariant == name])
            for name, text in TOLD.items()
        ),
    ]
