"""Methods from flags and from TOML or JSON files: typed by the method's own dataclass, which is the only schema."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trimtab.errors import SettingError, suggestion
from trimtab.method import Method, check_settings, find_method

SECTIONS = ("method", "train")


def make_method(name: str, values: Mapping[str, object]) -> Method:
    """Return the method `name` with `values` (texts are parsed by each setting's type), checked.

    Raises TrimtabError for an unknown method, SettingError for an unknown setting or a value of the wrong type or
    range, always with the nearest right names.
    """
    cls = find_method(name)
    hints = get_type_hints(cls)
    # An unknown setting is left as it is: the constructor refuses it and names the nearest.
    parsed = {
        key: _parsed(value, hints[key], f"{cls.__name__}({key}={value!r})") if key in hints else value
        for key, value in values.items()
    }
    method = cls(**parsed)
    check_settings(method)
    return method


def parse_assignments(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Return `name=value` texts as a dictionary; raises SettingError for another form or a name given twice."""
    values: dict[str, str] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise SettingError(f"{option} {text!r}: write name=value, for example {option} {_example(option)}.")
        if name.strip() in values:
            raise SettingError(f"{option} {text!r}: {name.strip()!r} is given twice; leave one out.")
        values[name.strip()] = value.strip()
    return values


def parse_value(option: str, text: str, hint: Any) -> Any:
    """Return the value of a flag as the type `hint`, 'none' as None where the type has it; raises SettingError."""
    return _from_text(text, hint, f"{option} {text}")


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections `method` and `train` of a TOML (or .json) file; raises SettingError naming file and cause."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SettingError(f"--config {path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:  # of both parsers, and of the decoding; they name the line
        raise SettingError(f"--config {path}: is not valid: {error}.") from error
    if not isinstance(content, dict):
        raise SettingError(f"--config {path}: holds no sections; write [method] and [train].")
    for section, values in content.items():
        if section not in SECTIONS:
            raise SettingError(f"--config {path}: there is no section {section!r}." + suggestion(section, SECTIONS))
        if not isinstance(values, dict):
            raise SettingError(f"--config {path}: {section!r} is a section of settings: write [{section}].")
    return content


def method_from(
    name: str | None, assignments: Sequence[str], targets: str | None, config: Mapping[str, object]
) -> Method:
    """Return the method that flags and the [method] section describe together; flags come first.

    Raises SettingError where there is no method, or two different ones.
    """
    values = dict(config)
    described = values.pop("name", None)
    if described is not None and not isinstance(described, str):
        raise SettingError(f"[method] name={described!r}: write the name of a method, for example name = 'LoRA'.")
    if name is not None and described is not None and name.lower() != described.lower():
        raise SettingError(f"--method {name}, but the configuration describes {described}; leave one of them out.")
    chosen = name or described
    if chosen is None:
        raise SettingError("no method was given; for example --method LoRA. `trimtab methods` lists them.")
    values |= parse_assignments("--set", assignments)
    if targets is not None:
        values["targets"] = targets
    return make_method(chosen, values)


@dataclass(frozen=True)
class SettingInfo:
    """One setting of a method, for people."""

    name: str
    type: str
    default: str
    range: str
    help: str


def describe_settings(cls: type[Method]) -> tuple[SettingInfo, ...]:
    """Return name, type, default, range and help of every setting."""
    hints = get_type_hints(cls)
    return tuple(
        SettingInfo(
            entry.name,
            type_text(hints[entry.name]),
            "required" if entry.default is dataclasses.MISSING else _value_text(entry.default),
            _range_text(entry.metadata),
            str(entry.metadata.get("help", "")),
        )
        for entry in dataclasses.fields(cls)
    )


def type_text(hint: Any) -> str:
    """Return a type as people write its values: 'number or none', 'on or off' becomes 'true or false'."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(type_text(option) for option in inner if "Callable" not in str(option))
    if origin is Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin is tuple:
        return f"list of {type_text(inner[0])}"
    names: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if hint is type(None):
        return "none"
    return names.get(hint) or (hint.__name__ if isinstance(hint, type) else str(hint))


def _example(option: str) -> str:
    return "rank=8" if option == "--set" else "text=question"


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _range_text(metadata: Mapping[str, Any]) -> str:
    if metadata.get("choices"):
        return ", ".join(str(choice) for choice in metadata["choices"])
    parts = [("≥", metadata.get("minimum")), (">", metadata.get("above")), ("≤", metadata.get("maximum"))]
    return ", ".join(f"{sign} {bound:g}" for sign, bound in parts if bound is not None)


def _parsed(value: object, hint: Any, where: str) -> Any:
    """Return a value of a flag or a file as the type `hint`; values that are not texts keep their type."""
    if isinstance(value, Mapping):
        return _nested(value, where)
    if isinstance(value, list):
        inner = get_args(hint)[0] if get_origin(hint) is tuple else str
        return tuple(_parsed(item, inner, where) for item in value)
    return _from_text(value, hint, where) if isinstance(value, str) else value


def _nested(value: Mapping[str, object], where: str) -> Method:
    rest = {str(key): item for key, item in value.items() if key != "name"}
    name = value.get("name")
    if not isinstance(name, str):
        raise SettingError(f"{where}: a method inside a method needs a name, for example name = 'LoRA'.")
    return make_method(name, rest)


def _from_text(text: str, hint: Any, where: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_fitting(text, inner, where)
    if origin is Literal:
        return _choice(text, inner, where)
    if origin is tuple:
        return tuple(_from_text(part.strip(), inner[0], where) for part in text.split(",") if part.strip())
    if hint is bool:
        return _choice(text.lower(), (True, False), where)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            raise SettingError(f"{where}: expected a {type_text(hint)}, found {text!r}.") from error
    if isinstance(hint, type) and issubclass(hint, Method):
        return make_method(text, {})
    return text


def _first_fitting(text: str, options: tuple[Any, ...], where: str) -> Any:
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return _from_text(text, option, where)
        except SettingError:
            continue
    return _from_text(text, rest[-1], where)


def _choice(text: str, choices: tuple[Any, ...], where: str) -> Any:
    by_name = {_value_text(choice): choice for choice in choices}
    if text not in by_name:
        raise SettingError(f"{where}: choose one of {', '.join(by_name)}." + suggestion(text, by_name))
    return by_name[text]
