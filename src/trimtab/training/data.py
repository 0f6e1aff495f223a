"""Read training data, whatever its form, into a Table: files, folders, and data sets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import suggestion
from trimtab.extras import require
from trimtab.training.errors import DataError
from trimtab.training.hub import hub_is_reachable
from trimtab.training.table import Table
from trimtab.training.text_files import read_delimited, read_json, read_json_lines

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


def read_table(
    source: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    delimiter: str | None = None,
    header: Sequence[str] | None = None,
) -> Table:
    """Read `source`: a file (its ending names the format), a folder, or a name on the hub of the `datasets` library.

    A folder holds what `Dataset.save_to_disk` wrote, or one file named after the split (`train.csv`), or anything else
    that `datasets.load_dataset` reads. `split` and `config` choose within folders and hub data sets; `delimiter`
    and `header` (the column names of a file that has no header line) are for CSV and TSV.
    Raises DataError for anything missing or malformed, MissingExtraError when a format needs an absent package.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, config, delimiter, header)
    if path.is_file():
        return _read_file(path, delimiter, header)
    if path.suffix.lower() in FORMATS or looks_like_path(str(source)):
        near = suggestion(path.name, _local_data(path.parent))
        raise DataError(f"there is no file or folder {str(source)!r}.{near}")
    _refuse_text_options(str(source), delimiter, header)
    return _read_hub(str(source), split, config)


def looks_like_path(name: str) -> bool:
    """Return whether `name` can only be a local path: hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")


def _local_data(folder: Path) -> list[str]:
    """Return the names in `folder` that could be data: visible folders, and files of a known format."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        entry.name
        for entry in entries
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in FORMATS)
    ]


def _read_file(path: Path, delimiter: str | None, header: Sequence[str] | None) -> Table:
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        separator = delimiter if delimiter is not None else ("," if ending == ".csv" else "\t")
        return read_delimited(path, delimiter=separator, quoted=ending == ".csv", header=header)
    _refuse_text_options(str(path), delimiter, header)
    if ending in (".jsonl", ".ndjson"):
        return read_json_lines(path)
    if ending == ".json":
        return read_json(path)
    if ending == ".parquet":
        return _read_parquet(path)
    raise DataError(f"{path}: the ending {ending!r} names no known format. Known: {', '.join(FORMATS)}.")


def _refuse_text_options(source: str, delimiter: str | None, header: Sequence[str] | None) -> None:
    if delimiter is not None or header is not None:
        asked = "delimiter" if delimiter is not None else "header"
        raise DataError(f"{source}: {asked}=… is for .csv and .tsv files; leave it out.")


def _read_parquet(path: Path) -> Table:
    pyarrow = require("pyarrow", "hf")
    parquet = require("pyarrow.parquet", "hf")
    try:
        return _from_arrow(str(path), parquet.read_table(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {_first_line(error)}.") from error


def _read_folder(
    path: Path, split: str, config: str | None, delimiter: str | None, header: Sequence[str] | None
) -> Table:
    files = sorted(entry for entry in path.iterdir() if entry.stem == split and entry.suffix.lower() in FORMATS)
    if len(files) > 1:
        names = ", ".join(entry.name for entry in files)
        raise DataError(f"{path} holds several files for the split {split!r}: {names}. Name the one to read.")
    if files:
        return _read_file(files[0], delimiter, header)
    _refuse_text_options(str(path), delimiter, header)
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    return _read_saved(path, split) if saved else _load(str(path), split, config)


def _read_saved(path: Path, split: str) -> Table:
    datasets = require("datasets", "hf")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is not a readable saved data set: {_first_line(error)}.") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}.{suggestion(split, list(found))}")
        return _from_dataset(f"{path} [{split}]", found[split])
    if split not in ("train", str(found.split)):
        raise DataError(f"{path} holds one data set without splits, so not {split!r}; leave the split out.")
    return _from_dataset(str(path), found)


def _read_hub(name: str, split: str, config: str | None) -> Table:
    if not hub_is_reachable():
        local = suggestion(name, _local_data(Path()))
        raise DataError(
            f"{name!r} is no file or folder here, and the data-set hub cannot be reached.{local} "
            "Give a path, or connect to the network."
        )
    return _load(name, split, config)


def _load(name: str, split: str, config: str | None) -> Table:
    datasets = require("datasets", "hf")
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        asked = f"split {split!r}" + (f", config {config!r}" if config else "")
        raise DataError(f"the datasets library cannot load {name!r} ({asked}): {_first_line(error)}") from error
    return _from_dataset(f"{name} [{split}]", dataset)


def _from_dataset(source: str, dataset: Any) -> Table:
    """Turn a `datasets.Dataset` into a Table, class numbers into their names (−1, the library's mark, into none)."""
    class_label = require("datasets", "hf").ClassLabel
    table = _from_arrow(source, dataset.with_format("arrow")[:])
    names = [
        feature.names if isinstance(feature := dataset.features[column], class_label) else None
        for column in table.columns
    ]
    rows = tuple(
        tuple(value if known is None else _class_name(known, value) for known, value in zip(names, row, strict=True))
        for row in table.rows
    )
    return Table(source, table.columns, rows, table.positions, table.unit)


def _class_name(names: Sequence[str], value: Any) -> str | None:
    return None if value is None or value < 0 else names[value]


def _from_arrow(source: str, table: Any) -> Table:
    columns = [column.to_pylist() for column in table.columns]
    rows = tuple(zip(*columns, strict=True))
    return Table(source, tuple(table.column_names), rows, tuple(range(1, len(rows) + 1)), unit="row")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
