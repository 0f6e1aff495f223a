"""The executable contract at full length: every method on every model of the zoo, against every invariant.

The small run takes the first models alone. What costs a compilation or a process, which the tests try on one model for
each method, is tried here on every one: whole-graph compilation, loading in a new process, DistributedDataParallel and
fully_shard in two processes. At last every declaration of every method is replaced by each other one, which must fail.
A refusal is an error of the library's own that says why; a model that a method refuses is asked for nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from reliability_parts import Row
from trimtab.check import INVARIANTS, attaches
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


def rows(full: bool) -> list[Row]:
    names = METHODS if full else list(SMALL_METHODS)
    cases = CASE_NAMES if full else list(SMALL_CASES)
    shape = f"{len(names)} methods × {len(cases)} models"
    found = _by_invariant(names, cases)
    attaching = found.pop(attaches.__name__)
    accepted = [outcome for outcome in attaching if outcome.result == "held"]
    jobs = [(instance(outcome.method), zoo_cases()[outcome.case]) for outcome in accepted]
    return [
        _row(f"{shape}: attach, or refuse with a reason", attaching),
        *(_row(f"{shape}: {_told(invariant)}", outcomes) for invariant, outcomes in found.items()),
        _row(f"{shape}: the same bits in a new process", loads_in_a_new_process(jobs)),
        *_distributed(shape, trains_distributed(jobs)),
        _declarations(names),
    ]


def _by_invariant(names: list[str], cases: list[str]) -> dict[str, list[Outcome]]:
    """Every outcome of every invariant; each core takes one method at a time."""
    found: dict[str, list[Outcome]] = {}
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context, torch.set_num_threads, (1,), max_tasks_per_child=8) as pool:
        for outcomes in pool.map(_of_method, names, [cases] * len(names)):
            for outcome in outcomes:
                found.setdefault(outcome.invariant, []).append(outcome)
    return found


def _of_method(name: str, cases: list[str]) -> list[Outcome]:
    outcomes = []
    for case in (case for case in cases if differs(name, case)):
        attaching = acceptance(name, case)
        outcomes.append(attaching)
        if attaching.result == "held":
            method, model = instance(name), zoo_cases()[case]
            outcomes += [outcome_of(check, method, model, invariant) for invariant, check in INVARIANTS.items()]
    return outcomes


def _told(invariant: str) -> str:
    return "torch.compile as one graph (aot_eager)" if invariant == "compiles_whole" else invariant


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
