"""Readers of CSV, TSV, JSON Lines and JSON lists that know the line of every row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from trimtab.training.errors import DataError
from trimtab.training.table import Table


def read_delimited(path: Path, *, delimiter: str, quoted: bool, header: Sequence[str] | None = None) -> Table:
    """Read separated fields; the first line names the columns unless `header` does.

    `quoted`: fields may stand in double quotes and then hold separators and line breaks (RFC 4180). Without it a quote
    is an ordinary character, as in tab-separated files. Blank lines are no rows.
    Raises DataError naming the line for a wrong number of fields, a broken quote or a bad header.
    """
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DataError(
            f"{path}: delimiter={delimiter!r} is no single character, or ends fields anyway; give ',' or ';'."
        )
    records = _records(path, delimiter, quoted)
    if header is None:
        first_line, names = next(records, (0, []))
        origin = f"the header on line {first_line} has"
    else:
        names, origin = list(header), "the given header has"
    _check_header(path, names)
    rows: list[tuple[object, ...]] = []
    positions: list[int] = []
    for line, fields in records:
        if len(fields) != len(names):
            raise DataError(
                f"{path}, line {line}: found {len(fields)} field{'s' if len(fields) != 1 else ''}, but {origin} "
                f"{len(names)} ({', '.join(names)}). {_field_advice(delimiter, quoted)}"
            )
        rows.append(tuple(fields))
        positions.append(line)
    if not rows:
        raise DataError(f"{path} holds a header ({', '.join(names)}) but no rows; at least one row is needed.")
    return Table(str(path), tuple(names), tuple(rows), tuple(positions))


def read_json_lines(path: Path) -> Table:
    """Read one JSON object per line; blank lines are no rows, and a key that a row lacks is a missing value there.

    Raises DataError naming the line for invalid JSON, a repeated key, or a line that is not an object.
    """
    objects: list[tuple[int, object]] = []
    for line, content in enumerate(read_text(path).split("\n"), start=1):
        if content.strip():
            objects.append((line, _parse(path, line, content)))
    return _from_objects(path, objects)


def read_json(path: Path) -> Table:
    """Read a JSON list of objects; a file that starts with an object is read as JSON Lines.

    Raises DataError naming the line for invalid JSON, a repeated key, or an element that is not an object.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        return read_json_lines(path)
    return _from_objects(path, list(_elements(path, text)))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file (a byte-order mark is dropped); raises DataError at the first other byte."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object is what was decoded: the content without its byte-order mark, if it had one.
        offset = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{content[offset]:02x} at offset {offset}). "
            "Save the file as UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8 old > new"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty; at least one row of data is needed.")
    return text


def _records(path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which the record starts, its fields)."""
    lines = io.StringIO(read_text(path), newline="")
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        trouble, advice = str(error), 'A quote inside a quoted field is written twice ("say ""yes"""), and each opening'
        if "field limit" in trouble:
            trouble = f"a field is longer than {csv.field_size_limit():,} characters"
            advice = "Keep such texts in JSON Lines; or a quote is missing: each opening"
        raise DataError(
            f"{path}, line {line}: the record that starts here is not valid: {trouble}. {advice} quote needs a closing "
            "one."
        ) from error


def _check_header(path: Path, names: Sequence[str]) -> None:
    blank = [number for number, name in enumerate(names, start=1) if not name.strip()]
    if blank:
        raise DataError(f"{path}: column {blank[0]} has no name in the header; each column needs one.")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise DataError(f"{path}: the header names the column {repeated[0]!r} twice; give each column its own name.")


def _field_advice(delimiter: str, quoted: bool) -> str:
    if quoted:
        return f"A field that holds {delimiter!r} or a line break must stand in double quotes."
    return "A field of a tab-separated file cannot hold a tab or a line break; for those use CSV or JSON Lines."


def _parse(path: Path, line: int, content: str) -> object:
    try:
        return json.loads(content, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: invalid JSON: {_reason(error)}. Each line holds one object.") from error


def _elements(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """Yield (line on which the element starts, element) of a JSON list."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    position = _skip_blanks(text, 0)
    line, counted = 1, 0
    if text[position] != "[":
        raise DataError(f"{path}: found {text[position : position + 20]!r}; a JSON file holds a list of objects.")
    position = _skip_blanks(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            element, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            broken = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path}, line {broken}: invalid JSON: {_reason(error)}.") from error
        yield line, element
        position = _after_element(path, text, position)
    rest = _skip_blanks(text, position + 1)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise DataError(f"{path}, line {line}: found {text[rest : rest + 20]!r} after the end of the list.")


def _after_element(path: Path, text: str, position: int) -> int:
    """Return the position of the next element, or of the closing bracket."""
    position = _skip_blanks(text, position)
    mark = text[position : position + 1]
    if mark == "]":
        return position
    if mark == ",":
        following = _skip_blanks(text, position + 1)
        if text[following : following + 1] != "]":
            return following
    line = text.count("\n", 0, position) + 1
    found = "the end of the file" if not mark else "a comma before ']'" if mark == "," else repr(mark)
    raise DataError(f"{path}, line {line}: invalid JSON: found {found} where ',' and an object, or ']', must follow.")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return members


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _from_objects(path: Path, objects: Sequence[tuple[int, object]]) -> Table:
    members: list[dict[str, object]] = []
    for line, element in objects:
        if not isinstance(element, dict):
            raise DataError(
                f"{path}, line {line}: found {json.dumps(element)[:40]}, which is not an object. "
                'Each row is an object of named columns: {"text": …, "label": …}.'
            )
        members.append(element)
    columns = tuple(dict.fromkeys(key for member in members for key in member))
    rows = tuple(tuple(member.get(column) for column in columns) for member in members)
    return Table(str(path), columns, rows, tuple(line for line, _ in objects))
