"""The table of what each method can do, found by trying it on the built-in models; nothing is declared by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trimtab.contract import execution, files, life, quantised, samples, training, weights
from trimtab.contract.case import Case, attaches, capabilities_of
from trimtab.contract.instances import small_instance
from trimtab.contract.models import built_in_cases
from trimtab.contract.processes import trains_distributed
from trimtab.contract.report import Invariant, outcome_of
from trimtab.errors import SettingError, suggestion
from trimtab.method import Capabilities, Method, methods

YES, REFUSED, NOTHING, BROKEN = "✓", "refused", "–", "✗"
FIRST_CHOICE = ("transformer", "mlp", "cnn", "embedding", "twice-used", "experts")


@dataclass(frozen=True)
class Column:
    """One column: the invariant that is tried, on which model, and what a declaration says once it has held.

    `targets` and `model` try a kind of place; without them the first model that accepts the method is taken.
    """

    name: str
    checks: tuple[Invariant, ...] = ()
    says: Callable[[Capabilities], str] = lambda declared: YES
    model: str | None = None
    targets: str | None = None


def flag(name: str) -> Callable[[Capabilities], str]:
    """Say yes where a declaration that has held says so, else refused."""
    return lambda declared: YES if getattr(declared, name) else REFUSED


def worded(name: str) -> Callable[[Capabilities], str]:
    """Say what a declaration that has held says."""
    return lambda declared: REFUSED if getattr(declared, name) == "none" else str(getattr(declared, name))


_WORKS_THERE = (training.every_tensor_moves, files.loads_the_same_bits, life.detaching_restores)
COLUMNS = {
    column.name: column
    for column in (
        Column("start", (training.starts_as_declared,), worded("starts_at_base")),
        Column("merge", (weights.merges_as_declared,), worded("merge")),
        Column("un-merge", (weights.unmerge_restores,)),
        Column("conv", _WORKS_THERE, model="cnn", targets="convolution"),
        Column("embedding", _WORKS_THERE, model="embedding", targets="embedding"),
        Column("attention", _WORKS_THERE, model="transformer", targets="attention"),
        Column("3-D", _WORKS_THERE, model="experts", targets="experts"),
        Column("quantised", (quantised.runs_on_quantised_base,), flag("quantized_base")),
        Column("routing", (life.rows_route_to_their_adapters,), flag("routable")),
        Column("compile", (execution.compiles_whole,)),
        Column("checkpointing", (execution.checkpoints, execution.checkpoints_reentrantly), flag("checkpointing")),
        Column("DDP"),
        Column("FSDP2"),
        Column("per-sample gradients", (samples.gives_gradients_of_each_row,), flag("per_sample_gradients")),
        Column("averaging", (weights.averages_as_declared,), lambda d: YES if d.linear_in_parameters else NOTHING),
    )
}
"""Every column by name. The two of several processes are tried for all methods at once."""
DISTRIBUTED = {"DDP": "trains_with_ddp", "FSDP2": "trains_with_fsdp2"}


def probe_capabilities(
    names: Sequence[str] | None = None, columns: Sequence[str] | None = None
) -> dict[str, dict[str, str]]:
    """Try what methods can do; returns the cells by method and column. Raises SettingError for an unknown column.

    ✓ (or exact, approximate, no): tried, and it holds. refused: it stops with an error, as declared. –: there is
    nothing to try, or the mean of two adapters is not the mean of what they do. ✗: the contract is broken.
    """
    catalogue, cases = methods(), built_in_cases()
    wanted = list(COLUMNS if columns is None else columns)
    for name in wanted:
        if name not in COLUMNS:
            raise SettingError(f"there is no column {name!r}." + suggestion(name, COLUMNS))
    chosen = {name: small_instance(catalogue[name], cases) for name in (catalogue if names is None else names)}
    places = {name: _accepting(method, cases) for name, method in chosen.items()}
    across = _across_processes(chosen, places) if DISTRIBUTED.keys() & set(wanted) else {}
    by_name = {case.name: case for case in cases}

    def cell(name: str, column: str) -> str:
        if column in DISTRIBUTED:
            return across[name][column]
        return _cell(COLUMNS[column], chosen[name], places[name], by_name)

    return {name: {column: cell(name, column) for column in wanted} for name in chosen}


def _accepting(method: Method, cases: Sequence[Case]) -> Case | None:
    """The first model that accepts the method."""
    ordered = sorted(cases, key=lambda case: FIRST_CHOICE.index(case.name))
    return next((case for case in ordered if outcome_of(attaches, method, case, "attaches").result == "held"), None)


def _cell(column: Column, method: Method, place: Case | None, cases: Mapping[str, Case]) -> str:
    if column.model is not None:
        if not any(field.name == "targets" for field in dataclasses.fields(method)):
            return NOTHING  # the places of a composition are those of its parts
        method = dataclasses.replace(method, targets=column.targets)  # type: ignore[call-arg]
        place = cases[column.model]
    if place is None:
        return REFUSED
    for check in (attaches, *column.checks):
        result = outcome_of(check, method, place, column.name).result
        if result != "held":
            return _READ[result]
    return column.says(capabilities_of(method))


_READ = {"refused": REFUSED, "not applicable": NOTHING, "violated": BROKEN}


def _across_processes(chosen: Mapping[str, Method], places: Mapping[str, Case | None]) -> dict[str, dict[str, str]]:
    jobs = {name: (method, case) for name, method in chosen.items() if (case := places[name]) is not None}
    found = trains_distributed(list(jobs.values()))
    cells = {(outcome.method, outcome.invariant): _READ.get(outcome.result, YES) for outcome in found}
    return {
        name: {column: cells.get((name, check), REFUSED) for column, check in DISTRIBUTED.items()} for name in chosen
    }
