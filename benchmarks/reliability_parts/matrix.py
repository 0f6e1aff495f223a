"""The executable contract at full length: every method on every model of the zoo, against every invariant.

The small run takes the first models alone. At last every declaration of every method is replaced by each other one,
which must fail. A refusal is an error of the library's own that says why; a model that a method refuses is asked for
nothing else. What costs a compilation or a process is a part of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from reliability_parts import Row
from trimtab.check import INVARIANTS
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
    shape = f"{len(names)} methods × {len(cases)} models"
    found = outcomes_by_invariant(names, cases, [name for name in INVARIANTS if name != COMPILED])
    kept = [row_of(f"{shape}: {invariant}", outcomes) for invariant, outcomes in found.items()]
    return [*kept, _declarations(names)]


def outcomes_by_invariant(names: list[str], cases: list[str], invariants: list[str]) -> dict[str, list[Outcome]]:
    """Return every outcome of these invariants, attaching first; each core takes one method at a time."""
    found: dict[str, list[Outcome]] = {}
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")
    with context.Pool(cores, torch.set_num_threads, (1,), maxtasksperchild=8) as pool:
        for outcomes in pool.starmap(_of_method, [(name, cases, invariants) for name in names], chunksize=1):
            for outcome in outcomes:
                found.setdefault(outcome.invariant, []).append(outcome)
    return found


def _of_method(name: str, cases: list[str], invariants: list[str]) -> list[Outcome]:
    outcomes = []
    for case in (case for case in cases if differs(name, case)):
        attaching = acceptance(name, case)
        outcomes.append(attaching)
        if attaching.result == "held":
            method, model = instance(name), zoo_cases()[case]
            outcomes += [outcome_of(INVARIANTS[each], method, model, each) for each in invariants]
    return outcomes


def row_of(what: str, outcomes: list[Outcome]) -> Row:
    """Return the row of one invariant: how often it held, and the first violation."""
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
