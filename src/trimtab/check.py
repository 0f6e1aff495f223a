"""The executable contract: `check_method` proves every promise of a method, for methods of third parties too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from trimtab.contract import declarations, execution, files, life, quantised, samples, training, weights
from trimtab.contract.case import Case, ContractViolation, attaches
from trimtab.contract.instances import small_instance
from trimtab.contract.models import built_in_cases
from trimtab.contract.report import ContractReport, Invariant, Outcome, outcome_of
from trimtab.errors import SettingError, TrainingError, brief, suggestion
from trimtab.method import Method, check_settings

__all__ = [
    "INVARIANTS",
    "Case",
    "ContractReport",
    "ContractViolation",
    "attaches",
    "built_in_cases",
    "check_method",
    "run_contract",
]

INVARIANTS: dict[str, Invariant] = {
    invariant.__name__: invariant
    for invariant in (
        declarations.promises_what_its_parts_do,
        training.starts_as_declared,
        training.start_depends_on_seed_alone,
        training.counts_match_plan,
        training.base_stays_frozen,
        training.every_tensor_moves,
        training.schedule_needs_binding,
        training.resumes_bit_for_bit,
        weights.fast_path_equals_reference,
        weights.merges_as_declared,
        weights.unmerge_restores,
        weights.averages_as_declared,
        files.loads_the_same_bits,
        files.file_is_small,
        files.refuses_damaged_files,
        files.refuses_another_base,
        life.base_keys_stay,
        life.disabled_is_the_base,
        life.detaching_restores,
        life.two_adapters_keep_apart,
        life.rows_route_to_their_adapters,
        life.deepcopies_are_independent,
        life.pickles_are_independent,
        life.leaves_nothing_behind,
        execution.trains_on_bfloat16_base,
        execution.runs_under_autocast,
        execution.checkpoints,
        execution.checkpoints_reentrantly,
        execution.compiles_whole,
        quantised.runs_on_quantised_base,
        samples.gives_gradients_of_each_row,
        execution.looks_back_only,
        execution.generates_from_a_cache,
        execution.refuses_instance_forward,
    )
}
"""Every invariant by name: a function of a method and a case that returns None or raises ContractViolation."""


def check_method(
    method: type[Method] | Method,
    models: Iterable[Case] | None = None,
    invariants: Sequence[str] | None = None,
) -> ContractReport:
    """Prove a method's declared capabilities and the invariants that every method keeps, on small models.

    A class is checked by a small instance of its defaults (`trimtab.contract.instances`). `models` are the cases to
    check on (default: the built-in ones, in plain torch); `invariants` the names of those to check (default: all).
    A model that the method refuses is reported, never counted as kept. Raises ContractViolation with every broken
    promise, the model and the figures; SettingError for an unknown invariant or a class without a usable default.
    """
    report = run_contract(method, models, invariants)
    if not report.held:
        found = "\n".join(_by_cause(report.violations))
        raise ContractViolation(f"{report.method!r} breaks its contract in {len(report.violations)} places:\n{found}")
    return report


def run_contract(
    method: type[Method] | Method,
    models: Iterable[Case] | None = None,
    invariants: Sequence[str] | None = None,
) -> ContractReport:
    """Check a method as `check_method` does, and return the report whatever it says."""
    cases = list(built_in_cases() if models is None else models)
    _check_arguments(method, cases)
    names = list(INVARIANTS if invariants is None else invariants)
    for name in names:
        if name not in INVARIANTS:
            raise SettingError(f"check_method knows no invariant {name!r}." + suggestion(name, INVARIANTS))
    instance = small_instance(method, cases) if isinstance(method, type) else method
    check_settings(instance)
    outcomes = []
    for case in cases:
        attaching = outcome_of(attaches, instance, case, attaches.__name__)
        outcomes.append(attaching)
        if attaching.result == "held":
            outcomes += [outcome_of(INVARIANTS[name], instance, case, name) for name in names]
    return ContractReport(instance, tuple(outcomes))


def _by_cause(violations: Sequence[Outcome]) -> Iterator[str]:
    """Yield one line for each text of a violation: where it was first, and how often."""
    causes: dict[str, list[Outcome]] = {}
    for violation in violations:
        causes.setdefault(violation.detail, []).append(violation)
    for same in causes.values():
        yield f"- {same[0]}" + (f" (and in {len(same) - 1} more places)" if len(same) > 1 else "")


def _check_arguments(method: object, cases: list[Any]) -> None:
    if not isinstance(method, Method) and not (isinstance(method, type) and issubclass(method, Method)):
        raise SettingError(f"check_method needs a method or its class, found {brief(method)}.")
    cls: type[Method] = method if isinstance(method, type) else type(method)
    if cls.parts is Method.parts and "targets" not in cls.__dataclass_fields__:
        raise SettingError(f"{cls.__name__} lacks the setting 'targets', which says where a method acts.")
    for case in cases:
        if not isinstance(case, Case):
            raise SettingError(f"check_method needs models as cases, Case(name, build, inputs), found {brief(case)}.")


def check_invariant(name: str, method: Method, case: Case) -> None:
    """Check one invariant on one case; raises ContractViolation naming all three, and a refusal as it is."""
    try:
        INVARIANTS[name](method, case)
    except (ContractViolation, TrainingError) as violation:
        raise ContractViolation(f"{type(method).__name__} on {case.name!r}, {name}: {violation}") from violation
