"""The executable contract on every method, and the contract itself: a wrong declaration fails.

`test_smoke` holds every method against every quick invariant on the first built-in model that accepts it. With
`-m slow`, every method meets every invariant on every model of the zoo, each as a test of its own; these tests, tens of
thousands, are made only when slow ones are asked for, and without `long` ones (`-m "slow and not long"`, as in CI)
they are those that take the least time. What costs a compilation or a process runs as one batch for each invariant, on
one model for each method (benchmarks/reliability_parts/processes.py runs it on all). A new method joins by existing. A
refusal is a skip that shows its text; that no method and no promise is refused everywhere is a test of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
import trimtab.contract.processes as processes
from contract_cases import CASE_NAMES, zoo_cases
from trimtab.check import INVARIANTS, Case, ContractViolation, attaches, built_in_cases, check_invariant, run_contract
from trimtab.contract.case import NotApplicable, capabilities_of
from trimtab.contract.declarations import promising
from trimtab.contract.instances import small_instance
from trimtab.contract.processes import loads_in_a_new_process, trains_distributed
from trimtab.contract.report import Outcome, outcome_of
from trimtab.contract.sums import follows_the_weight
from trimtab.contract.table import COLUMNS, DISTRIBUTED, probe_capabilities
from trimtab.kinds.lowrank import Factors
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod
from trimtab.method import Capabilities, Method, Spec, Targets, methods, setting
from trimtab.methods.composition.compose import Compose
from trimtab.methods.weight.lora import LoRA
from zoo import STORED, ZOO

METHODS = sorted(methods())
BUILT_IN = {case.name: case for case in built_in_cases()}
SMOKE_ORDER = ("transformer", "mlp", "cnn", "embedding", "twice-used", "experts")
# Seconds each, or garbage collection of everything that the test process holds: on one model for each method.
LONG = {"compiles_whole", "leaves_nothing_behind"}
# The rest of the matrix: 50 ms and more each. On every model in the long run, marked `long`; on one in every run.
COSTLY = {
    "averages_as_declared", "checkpoints", "checkpoints_reentrantly", "deepcopies_are_independent",
    "detaching_restores", "disabled_is_the_base", "gives_gradients_of_each_row", "pickles_are_independent",
    "refuses_another_base", "refuses_damaged_files", "resumes_bit_for_bit", "rows_route_to_their_adapters",
    "runs_on_quantised_base", "runs_under_autocast", "two_adapters_keep_apart", "unmerge_restores",
}  # fmt: skip
# A wrong declaration of any of these must fail; by the invariants that prove it.
PROOFS = {
    "starts_at_base": ["starts_as_declared"],
    "merge": ["merges_as_declared"],
    "linear_in_parameters": ["averages_as_declared"],
    "additive": ["two_adapters_keep_apart"],
    "input_dependent": ["fast_path_equals_reference", "merges_as_declared"],
    "causal_safe": ["looks_back_only"],
    "cached_generation": ["generates_from_a_cache"],
    "quantized_base": ["runs_on_quantised_base"],
    "per_sample_gradients": ["gives_gradients_of_each_row"],
    "creates_bias": ["merges_as_declared"],
    "routable": ["rows_route_to_their_adapters"],
    "requires_binding": ["schedule_needs_binding"],
    "keeps_base": ["detaching_restores"],
    "checkpointing": ["checkpoints"],
}
# Models beside the built-in ones that show a wrong declaration: those that generate, or attend without a mask.
SHOWING = {"cached_generation": ("gpt2", "mixtral"), "routable": ("gpt2", "llama", "mixtral", "bert", "cnn")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the matrix when slow tests are asked for; listing it alone takes seconds."""
    if metafunc.function is not test_matrix:
        return
    expression = metafunc.config.option.markexpr
    marks = dict.fromkeys(COSTLY, pytest.mark.long)
    wanted = [
        pytest.param(method, case, invariant, id=f"{method}-{case}-{invariant}", marks=marks.get(invariant, ()))
        for method in METHODS
        for case in CASE_NAMES
        for invariant in INVARIANTS
        if expression != "not slow" and invariant not in LONG and differs(method, case)
        if invariant not in COSTLY or "not long" not in expression
    ]
    metafunc.parametrize(("method", "case", "invariant"), wanted)


def differs(method: str, case: str) -> bool:
    """Whether a case is another one for this method: further targets take the place of "all-linear" alone."""
    targets = {field.name: field.default for field in dataclasses.fields(methods()[method])}
    return case in (*ZOO, *STORED) or targets.get("targets") == "all-linear"


@cache
def instance(name: str) -> Method:
    return small_instance(methods()[name], list(BUILT_IN.values()))


@cache
def acceptance(name: str, case: Case | str) -> Outcome:
    """Whether the method attaches to the model at all; asked once."""
    found = zoo_cases()[case] if isinstance(case, str) else case
    return outcome_of(attaches, instance(name), found, "attaches")


@cache
def smoke_case(name: str) -> Case | None:
    """The first built-in model that accepts the method, else the first of the zoo."""
    candidates = [BUILT_IN[key] for key in SMOKE_ORDER]
    for case in candidates:
        if outcome_of(attaches, instance(name), case, "attaches").result == "held":
            return case
    accepting = (key for key in CASE_NAMES if acceptance(name, key).result == "held")
    return next((zoo_cases()[key] for key in accepting), None)


def hold(invariant: str, method: Method, case: Case) -> None:
    """Check; a refusal or an invariant that says nothing here is a skip with its text."""
    try:
        check_invariant(invariant, method, case)
    except ContractViolation:
        raise
    except NotApplicable as reason:
        pytest.skip(f"not applicable: {reason}")
    except tt.TrimtabError as refusal:
        pytest.skip(f"refused: {refusal}")


@pytest.mark.parametrize("name", METHODS)
def test_some_model_accepts_the_method(name: str) -> None:
    assert smoke_case(name) is not None, acceptance(name, "llama").detail


@pytest.mark.parametrize("invariant", [name for name in INVARIANTS if name not in LONG])
@pytest.mark.parametrize("name", METHODS)
def test_smoke(name: str, invariant: str) -> None:
    case = smoke_case(name)
    assert case is not None
    hold(invariant, instance(name), case)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_promise_is_refused_everywhere(name: str) -> None:
    quick = [invariant for invariant in INVARIANTS if invariant != "compiles_whole"]
    cases = list(BUILT_IN.values())
    if all(outcome_of(attaches, instance(name), case, "attaches").result == "refused" for case in cases):
        cases += list(zoo_cases().values())
    report = run_contract(instance(name), cases, quick)
    assert report.held, str(report)


@pytest.mark.slow
def test_matrix(method: str, case: str, invariant: str) -> None:
    accepted = acceptance(method, case)
    if accepted.result == "refused":
        pytest.skip(f"refused: {accepted.detail}")
    assert accepted.result == "held", accepted.detail
    hold(invariant, instance(method), zoo_cases()[case])


PAGE = Path(__file__).resolve().parents[1] / "docs" / "capabilities.md"
SLOW_COLUMNS = {"compile", *DISTRIBUTED}


def written_page() -> dict[str, dict[str, str]]:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def written_column(name: str) -> dict[str, str]:
    return {method: cells[name] for method, cells in written_page().items()}


def cell_of(outcome: Outcome) -> str:
    return {"held": "✓", "refused": "refused", "not applicable": "–"}[outcome.result]


def jobs() -> list[tuple[Method, Case]]:
    return [(instance(name), case) for name in METHODS if (case := smoke_case(name)) is not None]


def unbroken(outcomes: list[Outcome]) -> None:
    assert [str(outcome) for outcome in outcomes if outcome.result == "violated"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_nothing_behind(name: str) -> None:
    case = smoke_case(name)
    assert case is not None
    hold("leaves_nothing_behind", instance(name), case)


@pytest.mark.slow
def test_every_method_compiles() -> None:
    outcomes = [outcome_of(INVARIANTS["compiles_whole"], method, case, "compiles_whole") for method, case in jobs()]
    unbroken(outcomes)
    assert written_column("compile") == {outcome.method: cell_of(outcome) for outcome in outcomes}


def test_every_method_loads_in_a_new_process() -> None:
    outcomes = loads_in_a_new_process(jobs())
    unbroken(outcomes)
    assert sum(outcome.result == "held" for outcome in outcomes) >= len(METHODS) - 2


def test_other_processes_are_heard_only_where_they_fail(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (case,) = (case for case in built_in_cases() if case.name == "mlp")
    assert {outcome.result for outcome in trains_distributed([(tt.LoRA(rank=1), case)])} == {"held"}
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError, match=r"(?s)exit code 7.*What the processes wrote before:\nheard at the end$"):
        processes._spawn(_says_and_ends, tmp_path, [], 1)
    assert capfd.readouterr().err == ""


def _says_and_ends(rank: int, folder: Path, work: object) -> None:
    os.write(2, b"heard at the end\n")
    os._exit(7)


@pytest.mark.slow
def test_every_method_trains_distributed() -> None:
    outcomes = trains_distributed(jobs())
    unbroken(outcomes)
    for column, check in DISTRIBUTED.items():
        found = {outcome.method: cell_of(outcome) for outcome in outcomes if outcome.invariant == check}
        assert written_column(column) == found


@pytest.fixture(autouse=True)
def forget_local_methods() -> Iterator[None]:
    """Methods defined inside a test leave the catalogue with it."""
    yield
    if len(METHODS) != len(methods()):
        gc.collect()


def other_declarations(method: Method, name: str) -> list[dict[str, Any]]:
    """Every declaration of one capability but the method's own."""
    own = getattr(capabilities_of(method), name)
    if isinstance(own, bool):
        return [{name: not own}]
    words = ("exact", "approximate", "no" if name == "starts_at_base" else "none")
    reason = {"merge_reason": "of a reason"} if name == "merge" else {}
    return [{name: word, **reason} for word in words if word != own]


def broken_promises(method: Method, name: str) -> list[Outcome]:
    """What fails on the first model that shows a failure."""
    cases = [zoo_cases()[key] for key in SHOWING.get(name, ())] or [
        *BUILT_IN.values(), zoo_cases()["bert"], zoo_cases()["mixtral-further"]
    ]  # fmt: skip
    for case in cases:
        found = run_contract(method, [case], PROOFS[name]).violations
        if broken := [violation for violation in found if violation.invariant != "attaches"]:
            return broken
    return []


def unjudged(method: Method, name: str, declared: dict[str, Any]) -> bool:
    """What has no measure. Changes of weights add up or do not, unless they follow the weight: then, and for other
    methods, `additive` is a permission, wrong only if it is withheld although changes add up. A start between 1 % and
    50 % of the output may be called approximate, or none."""
    if name == "additive":
        accepting = [c for c in BUILT_IN.values() if outcome_of(attaches, method, c, "attaches").result == "held"]
        weights = all(isinstance(part, WeightMethod) for part in method.parts())
        return not weights or any(follows_the_weight(method, case) for case in accepting)
    return declared == {"starts_at_base": "approximate"} and capabilities_of(method).starts_at_base == "no"


@pytest.mark.parametrize("capability", [pytest.param(name, marks=pytest.mark.slow) for name in PROOFS])
@pytest.mark.parametrize("name", METHODS)
def test_every_wrong_declaration_of_every_method_fails(name: str, capability: str) -> None:
    method = instance(name)
    for declared in other_declarations(method, capability):
        with promising(method, **declared):
            broken = broken_promises(method, capability)
        assert broken or unjudged(method, capability, declared), f"{declared} went undetected"


@pytest.mark.parametrize("capability", PROOFS)
def test_every_wrong_declaration_of_lora_fails(capability: str) -> None:
    for declared in other_declarations(instance("LoRA"), capability):
        with promising(instance("LoRA"), **declared):
            assert broken_promises(instance("LoRA"), capability)


def test_a_permission_that_is_withheld_fails_where_changes_add_up() -> None:
    method = instance("ParallelAdapter")
    with (
        promising(method, additive=False),
        pytest.raises(ContractViolation, match="additive=False, but the changes of two adapters add up"),
    ):
        check_invariant("two_adapters_keep_apart", method, BUILT_IN["transformer"])


def test_another_declaration_ends_with_its_block() -> None:
    before = {cls: (cls.capabilities, cls.promises, set(vars(cls))) for cls in methods().values()}
    for name in METHODS:
        with contextlib.suppress(ZeroDivisionError), promising(instance(name), merge="none", additive=False):
            assert not capabilities_of(instance(name)).additive
            raise ZeroDivisionError
    assert before == {cls: (cls.capabilities, cls.promises, set(vars(cls))) for cls in methods().values()}


def test_a_composition_that_declares_more_than_its_parts_fails() -> None:
    @dataclass(frozen=True)
    class Hasty(Compose):
        capabilities = Capabilities(starts_at_base="exact", merge="exact")

        def __init__(self) -> None:
            super().__init__(tt.LoRA(rank=2), tt.DoRA(rank=2, targets="head"))

        def promises(self) -> Capabilities:
            return self.capabilities

    text = r"promises_what_its_parts_do: additive=True, but its parts together give additive=False"
    with pytest.raises(ContractViolation, match=text):
        check_invariant("promises_what_its_parts_do", Hasty(), BUILT_IN["mlp"])


def test_per_sample_gradients_that_a_fused_function_hides_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.kinds.weight.transformed", lambda: False)
    with pytest.raises(ContractViolation, match="per_sample_gradients=True, but mapped over the model: RuntimeError"):
        check_invariant("gives_gradients_of_each_row", LoRA(rank=2), BUILT_IN["mlp"])


def test_the_page_of_capabilities_is_what_trying_finds() -> None:
    columns, page = [name for name in COLUMNS if name not in SLOW_COLUMNS], written_page()
    found = probe_capabilities(["LoRA", "IA3", "LinearProbe", "PrefixTuning"], columns)
    assert found == {name: {column: page[name][column] for column in columns} for name in found}


@pytest.mark.slow
def test_the_whole_page_of_capabilities_is_what_trying_finds() -> None:
    columns, page = [name for name in COLUMNS if name not in SLOW_COLUMNS], written_page()
    found = probe_capabilities(None, columns)
    assert found == {name: {column: cells[column] for column in columns} for name, cells in page.items()}


def test_an_unknown_column_is_named() -> None:
    with pytest.raises(tt.SettingError, match=r"there is no column 'compiles'\. Did you mean 'compile'"):
        probe_capabilities(["LoRA"], ["compiles"])


def lora_that_declares(**declared: Any) -> Method:
    """A LoRA whose capabilities differ from what it does."""

    @dataclass(frozen=True)
    class Misdeclared(LoRA):
        capabilities = replace(LoRA.capabilities, **declared)

    return Misdeclared(rank=2)


@pytest.mark.parametrize(
    ("declared", "invariant", "case", "text"),
    [
        ({"starts_at_base": "no"}, "starts_as_declared", "mlp", "starts_at_base='no', but the first output is 0"),
        ({"starts_at_base": "approximate"}, "starts_as_declared", "mlp", "starts_at_base='approximate', but"),
        ({"merge": "approximate"}, "merges_as_declared", "mlp", "merge='approximate', but the merged output is"),
        ({"merge": "none"}, "merges_as_declared", "mlp", "merge='none' without a merge_reason"),
        (
            {"merge": "none", "merge_reason": "of a reason"},
            "merges_as_declared",
            "mlp",
            "merge='none', but folding it into the weights is exact",
        ),
        ({"input_dependent": True}, "merges_as_declared", "mlp", "input_dependent=True cannot be merged"),
        ({"linear_in_parameters": True}, "averages_as_declared", "mlp", "linear_in_parameters=True, but"),
        ({"causal_safe": False}, "looks_back_only", "transformer", "causal_safe=False, but"),
        (
            {"quantized_base": False},
            "runs_on_quantised_base",
            "mlp",
            "quantized_base=False, but attached although '0:weight' is quantised",
        ),
        ({"checkpointing": False}, "checkpoints", "mlp", "checkpointing=False, but a checkpointed step went through"),
    ],
)
def test_a_wrong_declaration_fails(declared: dict[str, Any], invariant: str, case: str, text: str) -> None:
    method = lora_that_declares(**declared)
    with pytest.raises(ContractViolation) as raised:
        check_invariant(invariant, method, BUILT_IN[case])
    assert str(raised.value).startswith(f"Misdeclared on {case!r}, {invariant}: {text}")
    check_invariant("starts_as_declared", LoRA(rank=2), BUILT_IN["mlp"])


def test_a_cached_generation_that_is_declared_impossible_must_be_refused() -> None:
    method = lora_that_declares(cached_generation=False)
    with pytest.raises(ContractViolation, match="cached_generation=False, but decoding with a cache went through"):
        check_invariant("generates_from_a_cache", method, zoo_cases()["gpt2"])


def test_a_bias_that_is_created_must_be_declared() -> None:
    @dataclass(frozen=True)
    class OutputShift(WeightMethod):
        targets: Targets = setting("all-linear", "places")
        capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True)

        def tensors(self, site: ParameterSite) -> dict[str, Spec]:
            return {"shift": Spec((site.out_features,))}

        def delta(self, leaf: WeightLeaf) -> Tensor:
            return torch.zeros_like(leaf.weight())

        def bias(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor:
            return leaf.shift if bias is None else bias + leaf.shift

        def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
            return y + leaf.shift

    case = BUILT_IN["transformer"]  # its output projections have no bias
    with pytest.raises(
        ContractViolation, match=r"creates_bias=False, but merging created 'layers\.0\.attention\.o_proj\.bias'"
    ):
        check_invariant("merges_as_declared", OutputShift(), case)


def test_a_method_of_somebody_else_passes_by_itself() -> None:
    @dataclass(frozen=True)
    class RowScale(WeightMethod):
        """W' = diag(1 + s) W: one number for each output."""

        targets: Targets = setting("all-linear", "places to adapt")
        capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True)

        def tensors(self, site: ParameterSite) -> dict[str, Spec]:
            return {"s": Spec(site.matrices(site.out_features, 1))}

        def delta(self, leaf: WeightLeaf) -> Tensor:
            return leaf.s * leaf.weight()

    quick = [name for name in INVARIANTS if name not in LONG]
    report = tt.check_method(RowScale, models=[BUILT_IN["transformer"], BUILT_IN["cnn"]], invariants=quick)
    assert report.held
    assert {outcome.result for outcome in report.outcomes} <= {"held", "not applicable"}
    assert "RowScale" in str(report)


@dataclass(frozen=True)
class _Broken(LoRA):
    """What the broken methods below share; no method of its own, since it declares nothing."""


def test_a_start_at_two_zeros_fails() -> None:
    @dataclass(frozen=True)
    class DoubleZero(_Broken):
        capabilities = LoRA.capabilities

        def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
            pass

    with pytest.raises(ContractViolation, match="after two steps no gradient has reached"):
        check_invariant("every_tensor_moves", DoubleZero(rank=2), BUILT_IN["mlp"])


def test_a_fast_path_that_differs_from_the_reference_fails() -> None:
    @dataclass(frozen=True)
    class WrongScale(_Broken):
        capabilities = LoRA.capabilities

        def factors(self, leaf: WeightLeaf) -> Factors:
            return replace(super().factors(leaf), scale=1.01 * self.scale)

    with pytest.raises(ContractViolation, match=r"fast path against W′ in the plain model: relative difference"):
        check_invariant("fast_path_equals_reference", WrongScale(rank=2), BUILT_IN["mlp"])


def test_drawing_from_the_global_generator_fails() -> None:
    @dataclass(frozen=True)
    class GlobalNoise(_Broken):
        capabilities = LoRA.capabilities

        def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
            leaf.A.normal_()

    with pytest.raises(ContractViolation, match="draws from torch's global generator"):
        check_invariant("start_depends_on_seed_alone", GlobalNoise(rank=2), BUILT_IN["mlp"])


def test_editing_the_base_fails() -> None:
    @dataclass(frozen=True)
    class BaseEditor(_Broken):
        capabilities = LoRA.capabilities

        def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
            super().initialise(leaf, generator)
            leaf.holder.get_parameter("weight").data.mul_(1.1)

    with pytest.raises(ContractViolation, match="disabled output against the base: not the same bits"):
        check_invariant("disabled_is_the_base", BaseEditor(rank=2), BUILT_IN["mlp"])
    with pytest.raises(ContractViolation, match="after detaching: not the same bits"):
        check_invariant("detaching_restores", BaseEditor(rank=2), BUILT_IN["mlp"])


def test_a_schedule_that_could_be_missed_in_silence_fails() -> None:
    @dataclass(frozen=True)
    class SilentSchedule(_Broken):
        capabilities = LoRA.capabilities

        def after_step(self, part: Any, step: int, total_steps: int) -> None:
            pass

    with pytest.raises(ContractViolation, match="acts at optimizer steps, but requires_binding=False"):
        check_invariant("schedule_needs_binding", SilentSchedule(rank=2), BUILT_IN["mlp"])


def test_a_method_that_adds_up_wrongly_fails() -> None:
    @dataclass(frozen=True)
    class Normalised(WeightMethod):
        targets: Targets = setting("all-linear", "places")
        capabilities = Capabilities(starts_at_base="exact", merge="exact")

        def tensors(self, site: ParameterSite) -> dict[str, Spec]:
            return {"s": Spec(site.matrices(site.out_features, 1))}

        def delta(self, leaf: WeightLeaf) -> Tensor:
            return leaf.s * leaf.weight()

        def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
            return y * (1.0 + leaf.s.flatten())

    with pytest.raises(ContractViolation, match="two adapters together against the sum of their changes"):
        check_invariant("two_adapters_keep_apart", Normalised(), BUILT_IN["twice-used"])


def crashing_lora() -> Method:
    """A LoRA whose factors cannot be computed."""

    @dataclass(frozen=True)
    class Crashing(_Broken):
        capabilities = LoRA.capabilities

        def factors(self, leaf: WeightLeaf) -> Factors:
            raise RuntimeError("shapes do not fit")

    return Crashing(rank=2)


def test_a_crash_is_a_violation_and_not_a_refusal() -> None:
    report = run_contract(crashing_lora(), [BUILT_IN["mlp"]], ["starts_as_declared"])
    assert [outcome.detail for outcome in report.violations] == ["RuntimeError: shapes do not fit"]


def test_a_method_that_is_refused_everywhere_fails() -> None:
    with pytest.raises(ContractViolation) as raised:
        tt.check_method(LoRA(rank=10_000), models=[BUILT_IN["mlp"]], invariants=["starts_as_declared"])
    text = str(raised.value)
    assert "breaks its contract in 1 places" in text
    assert "LoRA on 'every model', attaches: violated: refused everywhere: rank 10000 is larger than the layer" in text


def test_a_promise_that_is_refused_everywhere_fails() -> None:
    @dataclass(frozen=True)
    class NeverMerged(_Broken):
        capabilities = LoRA.capabilities

        def before_merge(self, part: Any) -> None:
            raise tt.AttachError("not today")

    report = run_contract(NeverMerged(rank=2), [BUILT_IN["mlp"]], ["merges_as_declared"])
    assert [str(violation) for violation in report.violations] == [
        "NeverMerged on 'every model', merges_as_declared: violated: refused everywhere: not today"
    ]
    assert [refusal.detail for refusal in report.refusals] == ["not today"]


def test_a_promise_that_no_model_shows_fails() -> None:
    method = instance("PfeifferAdapter")  # starts less than 1 % away from the base
    with promising(method, starts_at_base="no"):
        report = run_contract(method, [BUILT_IN["transformer"]], ["starts_as_declared"])
    (violation,) = report.violations
    assert str(violation).startswith(
        "PfeifferAdapter on 'every model', starts_as_declared: violated: shown nowhere: starts_at_base='no', but here"
    )


def test_a_refusal_is_reported_with_its_text_and_does_not_count() -> None:
    report = tt.check_method(
        tt.BitFit, invariants=["starts_as_declared"], models=[*BUILT_IN.values(), zoo_cases()["llama"]]
    )
    (refusal,) = report.refusals
    assert (refusal.case, refusal.invariant) == ("llama", "attaches")
    assert "this model has no part in the role 'bias'" in refusal.detail
    assert "refused" in str(report)


def test_an_unknown_invariant_is_named() -> None:
    with pytest.raises(
        tt.SettingError, match=r"knows no invariant 'merges_as_declare'\. Did you mean 'merges_as_declared'"
    ):
        tt.check_method(LoRA, invariants=["merges_as_declare"])


def test_what_is_no_method_and_no_case_is_named() -> None:
    with pytest.raises(tt.SettingError, match="check_method needs a method or its class, found"):
        tt.check_method(dict)  # type: ignore[arg-type]
    with pytest.raises(tt.SettingError, match=r"needs models as cases, Case\(name, build, inputs\), found"):
        tt.check_method(LoRA, models=[torch.nn.Linear(2, 2)])  # type: ignore[list-item]

    @dataclass(frozen=True)
    class Nowhere(Method):
        capabilities = LoRA.capabilities

        def tensors(self, site: object) -> dict[str, Spec]:
            return {}

    with pytest.raises(tt.SettingError, match="Nowhere lacks the setting 'targets', which says where a method acts"):
        tt.check_method(Nowhere)


def test_the_same_violation_in_many_places_is_told_once() -> None:
    with pytest.raises(ContractViolation, match=r"RuntimeError: shapes do not fit \(and in \d more places\)") as raised:
        tt.check_method(
            crashing_lora(), [BUILT_IN["mlp"]], ["starts_as_declared", "file_is_small", "disabled_is_the_base"]
        )
    assert str(raised.value).count("shapes do not fit") == 1


def test_a_setting_without_a_default_is_asked_for() -> None:
    @dataclass(frozen=True)
    class NeedsWidth(WeightMethod):
        width: int
        targets: Targets = setting("all-linear", "places")
        capabilities = LoRA.capabilities

    with pytest.raises(tt.SettingError, match="NeedsWidth has no default for 'width': give check_method an instance"):
        tt.check_method(NeedsWidth)


@pytest.mark.parametrize("name", METHODS)
def test_small_instances_keep_every_setting_that_fits(name: str) -> None:
    small = instance(name)
    for field in dataclasses.fields(small):
        value = getattr(small, field.name)
        if type(field.default) is int:
            assert value == field.default or value <= max(16, field.metadata.get("minimum") or 0)
        elif field.default is not dataclasses.MISSING:
            assert value == field.default
