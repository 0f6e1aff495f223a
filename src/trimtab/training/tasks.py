"""What a model is trained to do: the protocol that every task fulfils, and the tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.errors import SettingError, suggestion
from trimtab.training.batches import Loader
from trimtab.training.causal_lm import CausalLM
from trimtab.training.classification import Classification
from trimtab.training.encoding import Encoded
from trimtab.training.errors import DataError
from trimtab.training.metrics import Metrics
from trimtab.training.seq2seq import Seq2Seq
from trimtab.training.table import Table


class Task(Protocol):
    """A task encodes rows, names the transformers class of its models, and evaluates them. Tasks are immutable."""

    @property
    def name(self) -> str:
        """The name by which the command line and files know the task."""

    @property
    def model_class(self) -> Any:
        """The transformers Auto class that loads models for this task."""

    def model_settings(self) -> dict[str, Any]:
        """Return the configuration entries that a model of this task needs."""

    def encode(self, rows: Table, tokenizer: Any, max_length: int) -> Encoded:
        """Return `rows` as token ids of at most `max_length` tokens and labels."""

    def loss_terms(self, labels: Tensor) -> int:
        """Return how many terms the model's mean loss of a batch with these labels is the mean of."""

    def evaluate(self, model: nn.Module, loader: Loader) -> Metrics:
        """Return the model's figures over one pass of `loader`, in evaluation mode and without gradients."""

    def baseline(self, train: Encoded, loader: Loader, base: nn.Module) -> Metrics:
        """Return the figures that training has to beat."""


AnyTask = Classification | CausalLM | Seq2Seq
TASKS: Mapping[str, type[Classification] | type[CausalLM] | type[Seq2Seq]] = {
    "classification": Classification,
    "causal-lm": CausalLM,
    "seq2seq": Seq2Seq,
}


def make_task(name: str, train: Table, columns: Mapping[str, str] | None = None) -> AnyTask:
    """Return the task `name` for training data; `columns` maps its parts (text, label, prompt, …) to column names.

    Parts that are not named are found by their conventional names. Raises SettingError for an unknown task or part.
    """
    kind = _task_type(name)
    given = dict(columns or {})
    parts = _parts(name)
    for part in given:
        if part not in parts:
            raise SettingError(f"the task {name!r} has no column {part!r}.{suggestion(part, parts)}")
    return kind.from_table(train, **given)


def task_to_dict(task: AnyTask) -> dict[str, Any]:
    """Return the task as JSON values, from which `task_from_dict` makes it again."""
    return {"task": task.name} | asdict(task)


def task_from_dict(values: Mapping[str, Any]) -> AnyTask:
    """Return the task that `task_to_dict` described; raises SettingError for an unknown task, DataError for entries."""
    given = dict(values)
    name = str(given.pop("task", "nothing"))
    kind = _task_type(name)
    known = {entry.name for entry in fields(kind)}
    if set(given) != known:
        raise DataError(
            f"the saved task {name!r} has the entries {', '.join(sorted(given))}; it needs {', '.join(sorted(known))}."
        )
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return kind(**settings)


def _task_type(name: str) -> type[Classification] | type[CausalLM] | type[Seq2Seq]:
    if name not in TASKS:
        raise SettingError(f"there is no task {name!r}.{suggestion(name, TASKS)}")
    return TASKS[name]


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a task that are columns."""
    return tuple(entry.name for entry in fields(TASKS[name]) if entry.name != "labels")


_: tuple[type[Task], ...] = (Classification, CausalLM, Seq2Seq)  # checked by mypy: each fulfils the protocol
