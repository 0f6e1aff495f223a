"""The executable contract at full length: every method on every model of the zoo, against every invariant.

The small run takes the first models alone. What costs a compilation or a process, which the tests try on one model for
each method, is tried here on every one: whole-graph compilation, loading in a new process, DistributedDataParallel and
fully_shard in two processes. At last every declaration of every method is replaced by each other one, which must fail.
A refusal is an error of the library's own that says why; a model that a method refuses is asked for nothing else.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from reliability_parts import Row
from trimtab.check import INVARIANTS
from trimtab.contract.processes import loads_in_a_new_process, trains_distributed
from trimtab.contract.report import Outcome, outcome_of
from trimtab.method import methods

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from contract_cases import CASE_NAMES, zoo_cases
from test_contract import (
    METHODS,
    PROOFS,
    acceptance,
    broken_promises,
    differs,
    instance,
    other_declarations,
    unjudged,
)
from trimtab.contract.declarations import promising

SMALL_CASES, SMALL_METHODS = ("mlp", "llama"), ("AdaLoRA", "LoRA", "MAM", "PrefixTuning")
COMPILED = "compiles_whole"


def rows(full: bool) -> list[Row]:
    names = METHODS if full else list(SMALL_METHODS)
    cases = CASE_NAMES if full else list(SMALL_CASES)
    pairs = [(name, case) for name in names for case in cases if differs(name, case)]
    accepted = [(name, case) for name, case in pairs if acceptance(name, case).result == "held"]
    jobs = [(instance(name), zoo_cases()[case]) for name, case in accepted]
    attaching = [acceptance(name, case) for name, case in pairs]
    quick = [name for name in INVARIANTS if name != COMPILED]
    shape = f"{len(names)} methods × {len(cases)} models"
    return [
        _row(f"{shape}: attach, or refuse with a reason", attaching),
        *(_row(f"{shape}: {name}", _outcomes(jobs, name)) for name in quick),
        _row(f"{shape}: torch.compile as one graph (aot_eager)", _outcomes(jobs, COMPILED)),
        _row(f"{shape}: the same bits in a new process", loads_in_a_new_process(jobs)),
        *_distributed(shape, trains_distributed(jobs)),
        _declarations(names),
    ]


def _outcomes(jobs: Iterable[tuple[object, object]], name: str) -> list[Outcome]:
    return [outcome_of(INVARIANTS[name], method, case, name) for method, case in jobs]  # type: ignore[arg-type]


def _distributed(shape: str, outcomes: list[Outcome]) -> list[Row]:
    named = {"trains_with_ddp": "DistributedDataParallel", "trains_with_fsdp2": "fully_shard"}
    return [
        _row(f"{shape}: {text}, two processes", [outcome for outcome in outcomes if outcome.invariant == name])
        for name, text in named.items()
    ]


def _row(what: str, outcomes: list[Outcome]) -> Row:
    counts = Counter(outcome.result for outcome in outcomes)
    first = next((f"; first: {outcome}" for outcome in outcomes if outcome.result == "violated"), "")
    measured = f"{counts['held']} held, {counts['refused']} refused, {counts['violated']} violated{first[:300]}"
    return Row(what, "no violation", measured, counts["violated"] == 0 and counts["held"] > 0)


def _declarations(names: list[str]) -> Row:
    undetected, without_measure, total = [], 0, 0
    judge: Callable[..., bool] = unjudged
    for name, capability in ((name, capability) for name in names for capability in PROOFS):
        for declared in other_declarations(instance(name), capability):
            total += 1
            with promising(instance(name), **declared):
                found = broken_promises(instance(name), capability)
            if not found and judge(instance(name), capability, declared):
                without_measure += 1
            elif not found:
                undetected.append(f"{name} {declared}")
    measured = f"{total - without_measure - len(undetected)} of {total} fail, {without_measure} have no measure"
    what = f"{len(names)} of {len(methods())} methods: every other declaration of every capability"
    return Row(what, "each fails", measured + "".join(f"; undetected: {one}" for one in undetected), not undetected)
