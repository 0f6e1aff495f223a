"""Errors from below the command line speak Python; here they name what the user can type.

`lr=-1.0` becomes `--lr -1.0`, `accept_other_base=True` becomes `--accept-other-base`, a column's part `label=…` becomes
`--column label=…`, and a method's setting `bottleneck=…` becomes `--set bottleneck=…`. Calls such as `LoRA(rank=8)` and
quoted texts stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from trimtab.method import methods
from trimtab.training.tasks import TASKS

_CALL = r"\w\((?:[^()]|\([^()]*\))*\)"  # with one more level inside


def with_flags(text: str, command: Any, arguments: Sequence[str]) -> str:
    """Return an error's text with the options of `command` (click's) as its flags.

    Where a file gave the settings (`--config`), an option that is not among the arguments keeps the file's spelling.
    """
    known = _flags(command)
    given = {argument.split("=", 1)[0] for argument in arguments}
    if "--config" in given:
        known = {name: flag for name, flag in known.items() if flag.split()[0] in given}
    if not known:
        return text
    names = "|".join(sorted(known, key=len, reverse=True))

    def translated(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0]
        flag = known[match["name"]]
        return flag.rstrip() if match["true"] else flag

    return re.sub(
        rf"{_CALL}|(?<![\w.'\"`-])(?<!--set )(?<!--column )(?P<name>{names})=(?P<true>True\b)?", translated, text
    )


def _flags(command: Any) -> Mapping[str, str]:
    """Return by name what stands in place of `name=`: '--lr ', '--column label=', '--set rank='."""
    options = {param.name: param.opts[0] for param in command.params if param.opts[0].startswith("--")}
    known: dict[str, str] = {}
    if "settings" in options:
        known |= {name: f"--set {name}=" for cls in methods().values() for name in cls.__dataclass_fields__}
    if "columns" in options:
        parts = (entry.name for task in TASKS.values() for entry in fields(task) if entry.name != "labels")
        known |= {part: f"--column {part}=" for part in parts}
    return known | {name: f"{flag} " for name, flag in options.items()}
