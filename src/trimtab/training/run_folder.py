"""The folder of a run: what it holds, whether it is finished, and that nothing in it is overwritten unasked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.adapter_file import FILE_NAME, write_atomically
from trimtab.errors import AdapterFileError, SettingError, TrimtabError
from trimtab.training.checkpoints import newest_checkpoint
from trimtab.training.run_settings import RunSettings, settings_from_dict, settings_to_dict
from trimtab.training.tasks import AnyTask, task_from_dict, task_to_dict

RECORD_NAME = "run.json"
FORMAT = 1


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` says: the run's settings, its task, the tokens of a row, and the report once it is finished.

    `rows`: number of rows by part (train, validation, test).
    """

    settings: RunSettings
    task: AnyTask
    max_length: int
    rows: Mapping[str, int]
    report: Mapping[str, Any] | None = None


def state_of(folder: Path) -> Literal["new", "interrupted", "finished"]:
    """Return whether a folder holds no run, one without its end, or a finished one; raises AdapterFileError."""
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file; a run needs a folder of its own. Give another --output.")
    if (folder / RECORD_NAME).exists():
        return "interrupted" if read_record(folder).report is None else "finished"
    return "finished" if (folder / FILE_NAME).exists() else "new"


def check_free(folder: Path) -> None:
    """Raise SettingError where a new run in `folder` would overwrite another."""
    state = state_of(folder)
    if state == "finished":
        raise SettingError(
            f"{folder} holds a finished run. Give another --output, or --overwrite to train anew in its place."
        )
    if state == "interrupted":
        raise SettingError(
            f"{folder} holds a run that was interrupted. Continue it with --resume, give another --output, or "
            "--overwrite to begin again."
        )


def clear(folder: Path) -> None:
    """Remove a run, and nothing else, from its folder."""
    for name in (RECORD_NAME, FILE_NAME, "README.md"):
        (folder / name).unlink(missing_ok=True)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        shutil.rmtree(checkpoint.parent, ignore_errors=True)


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json` atomically; raises AdapterFileError where the folder cannot be written."""
    write_atomically(folder / RECORD_NAME, (json.dumps(_to_dict(record), indent=2, ensure_ascii=False) + "\n").encode())


def read_record(folder: Path) -> RunRecord:
    """Read `run.json`; raises AdapterFileError where it is absent or damaged."""
    file = folder / RECORD_NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] > FORMAT:
            raise SettingError(f"it has format {values['format']}, this version reads up to {FORMAT}; upgrade trimtab")
        return RunRecord(
            settings_from_dict(values["settings"]),
            task_from_dict(values["task"]),
            values["max_length"],
            values["rows"],
            values["report"],
        )
    except OSError as error:
        raise AdapterFileError(
            f"{file}: cannot be read ({error.strerror}); give the folder in which `trimtab train` left a run."
        ) from error
    except (ValueError, KeyError, TypeError, TrimtabError) as error:
        raise AdapterFileError(f"{file}: is not a readable description of a run ({error}).") from error


def find_record(file: Path) -> RunRecord | None:
    """Return the run that an adapter file (or its folder) belongs to, None where it stands alone."""
    folder = file if file.is_dir() else file.parent
    return read_record(folder) if (folder / RECORD_NAME).is_file() else None


def differences(stored: RunRecord, asked: RunRecord) -> list[str]:
    """Return by name what differs between two runs, apart from their reports; each as 'name: stored, now asked'."""
    before, now = (_flat(dataclasses.replace(record, report=None)) for record in (stored, asked))
    return [
        f"{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in before | now
        if before.get(name) != now.get(name)
    ]


def _to_dict(record: RunRecord) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "settings": settings_to_dict(record.settings),
        "task": task_to_dict(record.task),
        "max_length": record.max_length,
        "rows": dict(record.rows),
        "report": record.report,
    }


def _flat(record: RunRecord) -> dict[str, Any]:
    values = _to_dict(record)
    settings: dict[str, Any] = values["settings"]
    loop: dict[str, Any] = settings["loop"]
    return settings | loop | {"loop": None, "task": values["task"], "rows": values["rows"]}
