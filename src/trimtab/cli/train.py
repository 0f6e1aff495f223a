"""`trimtab train`: train an adapter, and go on where a run was interrupted."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.console import Grid, is_main_process, new_head_text, note, program, show, show_json, time_text
from trimtab.cli.options import AsJson
from trimtab.cli.plan import MODEL_HELP
from trimtab.cli.progress import shown_progress
from trimtab.cli.settings import method_from, parse_assignments, parse_value, read_config
from trimtab.errors import SettingError
from trimtab.planning import bytes_text
from trimtab.training.checkpoints import newest_checkpoint
from trimtab.training.errors import Interrupted
from trimtab.training.processes import leave_together
from trimtab.training.run import Run, RunReport, execute, prepare, report_from_dict
from trimtab.training.run_folder import check_free, read_record, state_of
from trimtab.training.run_settings import (
    PRECISIONS,
    RunSettings,
    make_run_settings,
    method_text,
    option_types,
    run_options,
)
from trimtab.training.tasks import TASKS

Text = str | None
Whole = int | None
Number = float | None
Many = list[str] | None
_OWN = ("method", "settings", "targets", "config", "output", "resume", "overwrite", "json")


def train(
    context: typer.Context,
    model: Annotated[Text, typer.Argument(help=MODEL_HELP)] = None,
    data: Annotated[Text, typer.Argument(help="CSV, TSV, JSON(L) or Parquet file, folder, or data-set name.")] = None,
    method: Annotated[Text, typer.Option(help="Name of the method; `trimtab methods` lists them.")] = None,
    settings: Annotated[Many, typer.Option("--set", help="A setting of the method: name=value.")] = None,
    targets: Annotated[Text, typer.Option(help="Roles, names or patterns: 'attention | mlp-output'.")] = None,
    task: Annotated[Text, typer.Option(help=f"One of {', '.join(TASKS)}. Default: classification.")] = None,
    columns: Annotated[Many, typer.Option("--column", help="Which column is what: label=category.")] = None,
    validation: Annotated[Text, typer.Option(help="Data to evaluate on, or a share of the rows. Default: 0.1.")] = None,
    test: Annotated[Text, typer.Option(help="Data for the final figure, or a share. Default: none.")] = None,
    split: Annotated[Text, typer.Option(help="Split of a folder or data set. Default: train.")] = None,
    data_config: Annotated[Text, typer.Option(help="Configuration of a data set of the hub.")] = None,
    delimiter: Annotated[Text, typer.Option(help="What separates the fields of a CSV or TSV file.")] = None,
    header: Annotated[Text, typer.Option(help="Names of the columns where the file has none: text,label.")] = None,
    max_length: Annotated[Whole, typer.Option(help="Tokens of a row. Default: what the model reads, ≤ 512.")] = None,
    precision: Annotated[Text, typer.Option(help=f"Of the base model: {', '.join(PRECISIONS)}.")] = None,
    lr: Annotated[
        Number, typer.Option("--lr", "--learning-rate", help="Default: 1e-3; 5e-5 for the whole model.")
    ] = None,
    epochs: Annotated[Number, typer.Option(help="Passes over the data. Default: 3.")] = None,
    steps: Annotated[Whole, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[Whole, typer.Option(help="Rows of a batch. Default: 16.")] = None,
    accumulation: Annotated[Whole, typer.Option(help="Batches of one step. Default: 1.")] = None,
    weight_decay: Annotated[Number, typer.Option(help="Decay of AdamW. Default: 0.")] = None,
    warmup: Annotated[Number, typer.Option(help="Share of the steps in which the rate rises. Default: 0.06.")] = None,
    schedule: Annotated[Text, typer.Option(help="linear, cosine or constant. Default: linear.")] = None,
    clip: Annotated[Text, typer.Option(help="Largest norm of the gradient, or 'none'. Default: 1.")] = None,
    seed: Annotated[Whole, typer.Option(help="Decides head, adapter, split and order. Default: 0.")] = None,
    evaluate_every: Annotated[Whole, typer.Option(help="Steps between evaluations. Default: an epoch.")] = None,
    checkpoint_every: Annotated[Whole, typer.Option(help="Steps between checkpoints. Default: an epoch.")] = None,
    group_by_length: Annotated[bool | None, typer.Option(help="Batches of rows of like length.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with sections [method] and [train].")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/MODEL-METHOD.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    json: AsJson = False,
) -> None:
    """Train an adapter, evaluate it against its baseline, and save it."""
    _train(context.params)


def _train(flags: Mapping[str, Any]) -> None:
    resume, overwrite = flags["resume"], flags["overwrite"]
    if resume and overwrite:
        raise SettingError("--resume goes on with a run, --overwrite removes it; give one of them.")
    if resume:
        folder = _output_to_resume(flags["output"])
        wanted = _stored_settings(folder, flags)
        if state_of(folder) == "finished":
            note("this run was finished before; there is nothing left to train")
            _show_report(report_from_dict(read_record(folder).report or {}), folder, flags["json"])
            return
    else:
        wanted = _settings(flags)
        folder = flags["output"] or _default_folder(wanted)
        if not overwrite and is_main_process():  # which may have begun to write before another one looks
            check_free(folder)
    run = prepare(wanted)
    _announce(run, folder, resume)
    try:
        with shown_progress() as on_progress:
            report = execute(run, folder, resume=resume, overwrite=overwrite, on_progress=on_progress)
    except (Interrupted, KeyboardInterrupt) as error:
        raise _interruption(folder) from error
    leave_together()
    _show_report(report, folder, flags["json"])


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the run that flags state, in the form of the section [train]."""
    given = {name: value for name, value in flags.items() if name not in _OWN and value not in (None, [])}
    if "columns" in given:
        given["columns"] = parse_assignments("--column", given["columns"])
    if "clip" in given:
        given["clip"] = parse_value("--clip", given["clip"], option_types()["clip"])
    if "header" in given:
        given["header"] = tuple(name.strip() for name in given["header"].split(","))
    return given


def _settings(flags: Mapping[str, Any]) -> RunSettings:
    config = read_config(flags["config"]) if flags["config"] is not None else {}
    method = method_from(flags["method"], flags["settings"] or [], flags["targets"], config.get("method", {}))
    options = _from_file(config.get("train", {})) | _given(flags)
    model = options.get("model")
    if "data" not in options and isinstance(model, str) and Path(model).is_file():
        raise SettingError(f"{model} is data; give the model first, for example: trimtab train minilm {model}")
    return make_run_settings(method, options)


def _from_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section [train] with lists as tuples, shares as texts and 'none' as None, which TOML cannot write."""
    values = {name: None if name == "clip" and value == "none" else value for name, value in values.items()}
    shares = {name: str(values[name]) for name in ("validation", "test") if isinstance(values.get(name), float | int)}
    header = {"header": tuple(values["header"])} if isinstance(values.get("header"), list) else {}
    return {**values, **shares, **header}


def _output_to_resume(output: Path | None) -> Path:
    if output is None:
        raise SettingError("--resume needs --output, the folder of the run to go on with.")
    if state_of(output) == "new":
        raise SettingError(f"--resume: {output} holds no run. Give the folder in which `trimtab train` left one.")
    return output


def _stored_settings(folder: Path, flags: Mapping[str, Any]) -> RunSettings:
    """Return the settings of the run to go on with; other ones on the command line are another run."""
    stored = read_record(folder).settings
    for name in ("method", "settings", "targets", "config"):
        if flags[name]:
            option = "set" if name == "settings" else name
            raise SettingError(f"--resume goes on with the method and settings in {folder}; leave --{option} out.")
    before = run_options(stored)
    # Through the same function as the run itself, so that paths are compared as the run keeps them.
    now = run_options(make_run_settings(stored.method, before | _given(flags)))
    changed = [name for name in before if now[name] != before[name]]
    if changed:
        told = "; ".join(f"{name}: {before[name]!r} then, {now[name]!r} now" for name in changed)
        raise SettingError(f"--resume goes on with the run as it was ({told}). Leave these options out, or begin anew.")
    return stored


def _default_folder(settings: RunSettings) -> Path:
    return Path("runs") / f"{Path(settings.model).name}-{type(settings.method).__name__}".lower()


def _announce(run: Run, folder: Path, resume: bool) -> None:
    rows = ", ".join(f"{count:,} rows for {part}" for part, count in run.record.rows.items() if count)
    note(f"{run.record.settings.data}: {rows}. {run.train.report()}")
    method = method_text(run.record.settings.method)
    head = new_head_text(run.new_head_numbers)
    note(f"{method} trains {run.adapter.trainable_count:,} numbers{head}: {run.share:.3%} of the base")
    if run.loaded.fresh:
        note(
            "the checkpoint has no head for this task: a new one is trained and saved with the adapter "
            f"({', '.join(run.loaded.fresh)})"
        )
    if resume and newest_checkpoint(folder) is None:
        note("there is no checkpoint yet: the run starts at its beginning")


def _interruption(folder: Path) -> Interrupted:
    checkpoint = newest_checkpoint(folder)
    kept = "There is no checkpoint yet" if checkpoint is None else f"The checkpoint is {checkpoint}"
    command = shlex.join(["trimtab", "train", "--resume", "--output", str(folder)])
    return Interrupted(f"interrupted. {kept}. Go on with:\n  {command}")


def _show_report(report: RunReport, folder: Path, json: bool) -> None:
    command = f"{program()} {shlex.join(['predict', str(folder), report.example])}"
    if json:
        show_json(dataclasses.asdict(report) | {"next_command": command})
        return
    head = f" and a new head ({', '.join(report.new_head)})" if report.new_head else ""
    again = f", {report.resumed_from} of them in earlier sessions" if report.resumed_from else ""
    part = new_head_text(report.new_head_numbers)
    rows = [
        ("trained", f"{report.method}{head}"),
        ("on", f"{report.model} for {report.task}"),
        ("trainable", f"{report.trainable:,} numbers{part}: {report.share:.3%} of the base"),
        ("steps", f"{report.steps}{again}, last training loss {report.final_loss:.4f}"),
        ("saved", _saved_text(report)),
    ]
    if report.metrics is not None and report.baseline is not None:
        # The state that is kept was chosen on the validation rows: its figure there is the best, not an unbiased one.
        figure = "test" if report.evaluated_on == "test" else "best on validation"
        rows += [(figure, str(report.metrics)), ("baseline", _baseline_text(report))]
    rows += [
        ("time", time_text(report.seconds)),
        ("peak memory", bytes_text(report.peak_bytes)),
        ("file", f"{report.file}, {bytes_text(Path(report.file).stat().st_size)}"),
    ]
    show(Grid(("result", ""), tuple(rows)), f"\nUse it:\n  {command}")


def _saved_text(report: RunReport) -> str:
    chosen = "the last" if report.saved_step == report.steps else "the best on validation"
    return f"the state after step {report.saved_step} of {report.steps}, {chosen}"


def _baseline_text(report: RunReport) -> str:
    what = "always the most frequent class" if report.task == "classification" else "the model without the adapter"
    return f"{report.baseline} – {what}"
