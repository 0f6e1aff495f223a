"""What checking found: one outcome for each invariant on each model, and the report of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trimtab.contract.case import Case, ContractViolation, NotApplicable, Undecided
from trimtab.errors import TrainingError, TrimtabError
from trimtab.method import Method
from trimtab.report import table

Invariant = Callable[[Method, Case], None]
Result = Literal["held", "violated", "refused", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """What one invariant came to for one method on one model; `detail` holds figures, the refusal, or the reason.

    `shows`: whether it says anything about the promise; a refusal does not, nor does a model that cannot decide it.
    """

    invariant: str
    method: str
    case: str
    result: Result
    detail: str = ""
    shows: bool = True

    def __str__(self) -> str:
        return f"{self.method} on {self.case!r}, {self.invariant}: {self.result}" + (
            f": {self.detail}" if self.detail else ""
        )


def outcome_of(check: Invariant, method: Method, case: Case, name: str) -> Outcome:
    """Run one invariant. A TrimtabError is a refusal, never a pass; a TrainingError or any other is a violation."""
    try:
        check(method, case)
    except ContractViolation as violation:
        return Outcome(name, type(method).__name__, case.name, "violated", str(violation))
    except NotApplicable as reason:
        shows = not isinstance(reason, Undecided)
        return Outcome(name, type(method).__name__, case.name, "not applicable", str(reason), shows)
    except TrainingError as unreached:  # attached, and then it does not train
        return Outcome(name, type(method).__name__, case.name, "violated", str(unreached))
    except TrimtabError as refusal:
        return Outcome(name, type(method).__name__, case.name, "refused", str(refusal), shows=False)
    except Exception as crash:  # noqa: BLE001 - whatever a method raises that is no refusal is the finding itself
        return Outcome(name, type(method).__name__, case.name, "violated", f"{type(crash).__name__}: {crash}")
    return Outcome(name, type(method).__name__, case.name, "held")


@dataclass(frozen=True)
class ContractReport:
    """Everything that was checked for one method."""

    method: Method
    outcomes: tuple[Outcome, ...]

    @property
    def violations(self) -> list[Outcome]:
        """The broken promises, and those that no model the method accepts has shown."""
        broken = [outcome for outcome in self.outcomes if outcome.result == "violated"]
        return broken + self._never_shown()

    @property
    def refusals(self) -> list[Outcome]:
        """What was refused, with the text of the refusal in `detail`."""
        return [outcome for outcome in self.outcomes if outcome.result == "refused"]

    @property
    def held(self) -> bool:
        """Whether every promise holds."""
        return not self.violations

    def _never_shown(self) -> list[Outcome]:
        """A promise that every model refuses, or cannot decide, has not been kept anywhere."""
        name = type(self.method).__name__
        by_invariant: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            by_invariant.setdefault(outcome.invariant, []).append(outcome)
        return [
            Outcome(invariant, name, "every model", "violated", f"{_everywhere(found)}: {found[-1].detail}")
            for invariant, found in by_invariant.items()
            if not any(outcome.shows for outcome in found)
        ]

    def __str__(self) -> str:
        kinds: tuple[Result, ...] = ("held", "violated", "refused", "not applicable")
        counts = {i: dict.fromkeys(kinds, 0) for i in dict.fromkeys(outcome.invariant for outcome in self.outcomes)}
        for outcome in self.outcomes:
            counts[outcome.invariant][outcome.result] += 1
        rows = [(invariant, *(str(found[kind] or "") for kind in kinds)) for invariant, found in counts.items()]
        lines = [f"contract of {self.method!r}", table(("invariant", *kinds), rows)]
        lines += [str(outcome) for outcome in dict.fromkeys((*self.violations, *self.refusals))]
        return "\n".join(lines)


def _everywhere(found: list[Outcome]) -> str:
    return "refused everywhere" if found[-1].result == "refused" else "shown nowhere"
