"""A whole training run: data and model in, a folder with adapter, record and report out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.adapter import Adapter
from trimtab.adapter_file import FILE_NAME
from trimtab.attach import attach
from trimtab.errors import SettingError
from trimtab.kinds.calibration import starts_from_data
from trimtab.method import Batches, Method
from trimtab.storage import load
from trimtab.training.batches import Loader, make_loader
from trimtab.training.checkpoints import newest_checkpoint
from trimtab.training.classification import Classification
from trimtab.training.data import read_table
from trimtab.training.encoding import Encoded
from trimtab.training.heads import head_numbers, with_fresh_head
from trimtab.training.loop import train
from trimtab.training.metrics import Metrics
from trimtab.training.models import LoadedModel, load_model
from trimtab.training.processes import Processes, current_processes
from trimtab.training.progress import Progress, TrainingResult
from trimtab.training.run_folder import RunRecord, clear, differences, read_record, write_record
from trimtab.training.run_settings import RunSettings, method_text
from trimtab.training.splits import Split, refuse_training_rows, split_table
from trimtab.training.table import Table
from trimtab.training.tasks import AnyTask, make_task

DEFAULT_MAX_LENGTH = 512
CALIBRATION_BATCHES = 8
EXAMPLE_CHARACTERS = 60


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is ready to train: nothing has been written yet."""

    record: RunRecord
    loaded: LoadedModel
    adapter: Adapter
    base_numbers: int
    train: Encoded
    validation: Encoded | None
    test: Encoded | None
    example: str

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base's."""
        return self.adapter.trainable_count / max(self.base_numbers, 1)

    @property
    def new_head_numbers(self) -> int:
        """How many of the trained numbers are those of a new head."""
        return head_numbers(self.loaded.model, self.loaded.fresh)


@dataclass(frozen=True)
class RunReport:
    """What a finished run gave. `seconds` of training, `peak_bytes` of memory, `file` the adapter.

    `saved_step`: the step whose state the file holds, the best on the validation rows, the last without any.
    `metrics` and `baseline` are of the rows `evaluated_on`: "test" where there are such, else "validation"; None
    without either. The metrics are those of the state in the file; `final_loss` is of the last step.
    `new_head_numbers`: how many of the trained numbers are the new head's.
    """

    model: str
    task: str
    method: str
    new_head: tuple[str, ...]
    new_head_numbers: int
    trainable: int
    share: float
    steps: int
    saved_step: int
    resumed_from: int
    seconds: float
    peak_bytes: int
    final_loss: float
    evaluated_on: str | None
    metrics: Metrics | None
    baseline: Metrics | None
    file: str
    example: str


def prepare(settings: RunSettings) -> Run:
    """Read the data, load the model, encode and attach; raises TrimtabError for anything that would not train."""
    task, split = read_parts(settings)
    seed = settings.loop.seed
    loaded = load_model(settings.model, task, seed, dtype=settings.dtype)
    max_length = settings.max_length or min(loaded.longest_input or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    loaded.check_length(max_length)

    def encode(rows: Table | None) -> Encoded | None:
        return None if rows is None else task.encode(rows, loaded.tokenizer, max_length)

    validation, test = encode(split.validation), encode(split.test)
    base_numbers = sum(parameter.numel() for parameter in loaded.model.parameters())
    training = task.encode(split.train, loaded.tokenizer, max_length)
    method = with_fresh_head(loaded.model, settings.method, loaded.fresh)
    adapter = attach(loaded.model, method, seed=seed, calibration=_calibration(method, training, settings))
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    rows = {name: 0 if table is None else len(table) for name, table in parts.items()}
    return Run(
        RunRecord(settings, task, max_length, rows), loaded, adapter, base_numbers,
        training, validation, test,
        _example(split.train.texts(input_column(task))),
    )  # fmt: skip


def _calibration(method: Method, training: Encoded, settings: RunSettings) -> Batches | None:
    """Return the first batches of the training data for a method that starts from data, None for any other."""
    if not starts_from_data(method):
        return None
    loader = make_loader(training, settings.loop.batch_size, seed=settings.loop.seed)
    return Batches(list(itertools.islice(loader, CALIBRATION_BATCHES)), lambda model, batch: model(**batch).loss)


def read_parts(settings: RunSettings) -> tuple[AnyTask, Split]:
    """Read the task and its training, validation and test rows; shares are split off, class by class.

    Raises DataError for data that is missing or malformed.
    """
    if Path(settings.data).is_file() and (settings.split != "train" or settings.data_config is not None):
        asked = "split" if settings.split != "train" else "data_config"
        raise SettingError(f"{asked}={getattr(settings, asked)!r}, but {settings.data} is one file; leave it out.")
    whole = _read(settings, settings.data, settings.split)
    task = make_task(settings.task, whole, settings.columns)
    shares = {name: _share(value) for name, value in (("validation", settings.validation), ("test", settings.test))}
    split = split_table(
        whole,
        validation=shares["validation"] or 0.0,
        test=shares["test"] or 0.0,
        seed=settings.loop.seed,
        label=task.label if isinstance(task, Classification) else None,
    )
    validation, test = split.validation, split.test
    if shares["validation"] is None:
        validation = _read(settings, settings.validation, "validation")
        refuse_training_rows("validation", validation, whole)
    if shares["test"] is None:
        test = _read(settings, settings.test, "test")
        refuse_training_rows("test", test, whole)
    return task, Split(split.train, validation, test)


def execute(
    run: Run,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunReport:
    """Train, evaluate and write `folder`: adapter.safetensors, run.json, and checkpoints on the way.

    `resume` continues from the newest checkpoint (from the beginning where there is none); `overwrite` removes the run
    that is there. Only the main process of several writes. Raises TrimtabError; what was written before stays.
    """
    processes = current_processes()
    if resume:
        _check_same(read_record(folder), run.record)
    if processes.is_main:
        if overwrite and not resume:
            clear(folder)
        write_record(folder, run.record)
    processes.meet()
    result = train(
        run.loaded.model,
        run.adapter,
        run.record.task,
        run.train,
        run.validation,
        run.record.settings.loop,
        output=folder,
        resume=resume and newest_checkpoint(folder) is not None,
        on_progress=on_progress,
    )
    report = _report(run, result, folder / FILE_NAME, processes)
    if processes.is_main:
        write_record(folder, dataclasses.replace(run.record, report=dataclasses.asdict(report)))
    return report


def report_from_dict(values: Mapping[str, Any]) -> RunReport:
    """Return the report that a finished run's record holds."""
    metrics = {name: None if values[name] is None else Metrics(**values[name]) for name in ("metrics", "baseline")}
    return RunReport(**{**values, **metrics, "new_head": tuple(values["new_head"])})


def load_run(
    folder: Path, model: str | None = None, accept_other_base: bool = False
) -> tuple[RunRecord, LoadedModel, Adapter]:
    """Load what a run has trained, ready for use; `model` where the base has moved. Raises TrimtabError."""
    record = read_record(folder)
    if record.report is None and not (folder / FILE_NAME).exists():
        raise SettingError(f"{folder} holds a run that was interrupted; finish it with --resume before using it.")
    settings = record.settings
    loaded = load_model(model or settings.model, record.task, settings.loop.seed, dtype=settings.dtype)
    adapter = load(loaded.model, folder, accept_other_base=accept_other_base)
    return record, loaded, adapter


def input_column(task: AnyTask) -> str:
    """Return the column that a model of this task reads."""
    if isinstance(task, Classification):
        return task.text
    columns = dataclasses.asdict(task)
    return next(str(columns[part]) for part in ("source", "prompt", "text") if columns.get(part) is not None)


def _read(settings: RunSettings, source: str, split: str) -> Table:
    delimited = Path(source).suffix.lower() in (".csv", ".tsv")
    return read_table(
        source,
        split=split,
        config=settings.data_config,
        # Given for the training data; validation data in another format needs neither.
        delimiter=settings.delimiter if delimited or source == settings.data else None,
        header=settings.header if delimited or source == settings.data else None,
    )


def _share(value: str) -> float | None:
    """Return a share of the rows as a number, None where `value` names data."""
    try:
        return float(value)
    except ValueError:
        return None


def _check_same(stored: RunRecord, asked: RunRecord) -> None:
    changed = differences(stored, asked)
    if changed:
        raise SettingError(
            f"the run to resume is another one: {'; '.join(changed)}. Resume without these options and with the same "
            "data, or begin a new run in another folder."
        )


def _report(run: Run, result: TrainingResult, file: Path, processes: Processes) -> RunReport:
    settings, task = run.record.settings, run.record.task
    metrics, baseline = result.best, None
    held_out = run.test or run.validation
    if held_out is not None:
        loader = make_loader(held_out, settings.loop.batch_size, shuffle=False, processes=processes)
        metrics = task.evaluate(run.loaded.model, loader) if held_out is run.test else metrics
        baseline = _baseline(run.loaded.model, run, loader)
    return RunReport(
        model=settings.model,
        task=task.name,
        method=method_text(settings.method),
        new_head=run.loaded.fresh,
        new_head_numbers=run.new_head_numbers,
        trainable=run.adapter.trainable_count,
        share=run.share,
        steps=result.steps,
        saved_step=result.saved_step,
        resumed_from=result.resumed_from,
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        final_loss=result.final_loss,
        evaluated_on=None if held_out is None else "test" if held_out is run.test else "validation",
        metrics=metrics,
        baseline=baseline,
        file=str(file),
        example=run.example,
    )


def _example(texts: Sequence[str]) -> str:
    """Return a short text to try the model on: one that needs no quoting tricks in a shell, where there is one."""
    plain = (text for text in texts if "'" not in text)
    words = next(plain, texts[0]).split()
    kept = [word for index, word in enumerate(words) if len(" ".join(words[: index + 1])) <= EXAMPLE_CHARACTERS]
    return " ".join(kept) or words[0]


def _baseline(model: nn.Module, run: Run, loader: Loader) -> Metrics:
    with run.adapter.disabled():
        return run.record.task.baseline(run.train, loader, model)
