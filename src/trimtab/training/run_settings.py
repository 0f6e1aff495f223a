"""Everything that decides a training run, as one value: from flags or a file, into the run's folder and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch

from trimtab.adapter_file import decode_method, encode_method
from trimtab.errors import SettingError, suggestion
from trimtab.method import Method, settings_of
from trimtab.training.heads import default_learning_rate
from trimtab.training.model_sources import resolve_model
from trimtab.training.schedule import LoopSettings

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
DEFAULT_EPOCHS = 3.0
SHOWN = 4
"""Of a longer list of names the first so many are shown."""
_LOOP_NAMES = tuple(entry.name for entry in dataclasses.fields(LoopSettings))


@dataclass(frozen=True)
class RunSettings:
    """One run. `model`: a folder, a hub id or 'minilm'; `data`: a file, a folder or a name of the `datasets` hub.

    `columns` maps parts of the task (text, label, …) to column names; `validation` and `test` are data like `data`, or
    a share of its rows, from 0 to below 1 (0: none). `max_length` in tokens; None: what the model reads, at most 512.
    `precision` is that of the base model; "auto" keeps the checkpoint's. `method` is without the head that is added.
    """

    model: str
    data: str
    method: Method
    loop: LoopSettings
    task: str = "classification"
    columns: Mapping[str, str] = field(default_factory=dict)
    validation: str = "0.1"
    test: str = "0"
    split: str = "train"
    data_config: str | None = None
    delimiter: str | None = None
    header: tuple[str, ...] | None = None
    max_length: int | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            near = suggestion(self.precision, PRECISIONS)
            raise SettingError(f"precision={self.precision!r}; choose one of {', '.join(PRECISIONS)}.{near}")
        if self.max_length is not None and self.max_length < 1:
            raise SettingError(f"max_length={self.max_length}; it must be at least 1 token.")

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of the base model as torch names it; None keeps the checkpoint's own."""
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return known.get(self.precision)


def method_text(method: Method) -> str:
    """Return a method for people: its name and the settings that differ from their defaults."""
    return f"{type(method).__name__}({', '.join(f'{k}={_value_text(v)}' for k, v in settings_of(method).items())})"


def option_types() -> dict[str, Any]:
    """Return the type of every option of a run by name, those of the loop among them; None in it marks an optional."""
    run, loop = get_type_hints(RunSettings), get_type_hints(LoopSettings)
    return {name: hint for name, hint in (run | loop).items() if name not in ("method", "loop")}


def make_run_settings(method: Method, options: Mapping[str, object]) -> RunSettings:
    """Return the settings of a run from its options by name (flags or the section [train]).

    The learning rate defaults to the method's, the length to 3 epochs. Local paths become absolute, so that a run can
    be continued and used from anywhere. Raises SettingError for an unknown, missing or ill-typed option.
    """
    types = option_types()
    for name, value in options.items():
        if name not in types:
            raise SettingError(f"training has no setting {name!r}.{suggestion(name, types)}")
        _check_type(name, value, types[name])
    for name, example in (("model", "minilm"), ("data", "train.csv"), ("validation", "0.1"), ("test", "0")):
        if name not in options and name in ("model", "data"):
            raise SettingError(f"no {name} was given; for example: trimtab train minilm train.csv --method LoRA")
        if name in options and not options[name]:
            raise SettingError(f"{name}={options[name]!r} is empty; give for example {example!r}.")
    loop: dict[str, Any] = {"lr": default_learning_rate(method)}
    loop |= {name: value for name, value in options.items() if name in _LOOP_NAMES}
    if loop.get("steps") is None and loop.get("epochs") is None:
        loop["epochs"] = DEFAULT_EPOCHS
    rest: dict[str, Any] = {name: value for name, value in options.items() if name not in _LOOP_NAMES}
    rest |= {name: _absolute(str(rest[name])) for name in ("data", "validation", "test") if name in rest}
    if resolve_model(rest["model"]).kind == "folder":
        rest["model"] = _absolute(rest["model"])
    return RunSettings(method=method, loop=LoopSettings(**loop), **rest)


def run_options(settings: RunSettings) -> dict[str, Any]:
    """Return the options by name from which `make_run_settings` makes `settings` again, the method apart."""
    return {name: getattr(settings.loop if name in _LOOP_NAMES else settings, name) for name in option_types()}


def settings_to_dict(settings: RunSettings) -> dict[str, Any]:
    """Return the settings as JSON values, from which `settings_from_dict` makes them again."""
    values = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(RunSettings)}
    return values | {
        "method": encode_method(settings.method),
        "loop": dataclasses.asdict(settings.loop),
        "columns": dict(settings.columns),
        "header": None if settings.header is None else list(settings.header),
    }


def settings_from_dict(values: Mapping[str, Any]) -> RunSettings:
    """Return the settings that `settings_to_dict` described; raises TrimtabError or TypeError for anything else."""
    header = values["header"]
    rebuilt = {
        "method": decode_method(values["method"]),
        "loop": LoopSettings(**values["loop"]),
        "header": None if header is None else tuple(header),
    }
    return RunSettings(**{**values, **rebuilt})


def _value_text(value: object) -> str:
    if isinstance(value, Method):
        return method_text(value)
    if isinstance(value, tuple) and len(value) > SHOWN and all(isinstance(item, str) for item in value):
        return f"({', '.join(map(repr, value[:SHOWN]))}, … {len(value)} in all)"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_value_text, value)) + ")"
    return repr(value)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _check_type(name: str, value: object, hint: Any) -> None:
    options = get_args(hint) if NoneType in get_args(hint) else (hint,)
    allowed: tuple[type, ...] = tuple(
        option if isinstance(option, type) else _BARE.get(name, str) for option in options
    )
    number = isinstance(value, int) and not isinstance(value, bool) and float in allowed
    if number or (isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)):
        return
    names = " or ".join(kind.__name__ for kind in allowed if kind is not NoneType)
    raise SettingError(f"{name}={value!r}: expected {names}, found {type(value).__name__}.")


_BARE: Mapping[str, type] = {"columns": dict, "header": tuple}  # their hints have parameters
