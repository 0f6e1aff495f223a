"""A small instance of a method class for small models, found by rule from its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints

from trimtab.contract.case import Case
from trimtab.errors import SettingError, TrimtabError
from trimtab.method import Method, check_settings, find_method
from trimtab.planning import plan

LIMITS = (4, 8, 2, 16, 1)


def small_instance(cls: type[Method], cases: Sequence[Case]) -> Method:
    """Return an instance whose sizes suit models a few numbers wide.

    Every whole-number setting whose default is larger than a limit takes the limit (or its own minimum, if that is
    larger); choices, fractions, booleans and settings that are None stay. The limits 4, 8, 2, 16 and 1 are tried in
    this order, then the defaults: the first instance counts that plans on the most cases. A setting without a default
    that holds several methods gets a LoRA and a BitFit. Raises SettingError for any other setting without a default.
    """
    candidates = [_limited(cls, limit) for limit in LIMITS] + [_limited(cls, None)]
    return max(dict.fromkeys(candidates), key=lambda method: sum(_plans(method, case) for case in cases))


def _limited(cls: type[Method], limit: int | None) -> Method:
    hints = get_type_hints(cls)
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            settings[field.name] = _methods_for(cls, field.name, hints[field.name])
        elif limit is not None and type(field.default) is int and field.metadata.get("choices") is None:
            least = field.metadata.get("minimum")
            small = max(limit, int(least) if least is not None else limit)
            settings[field.name] = min(field.default, small)
    return cls(**settings)


def _methods_for(cls: type[Method], name: str, hint: Any) -> tuple[Method, ...]:
    if hint != tuple[Method, ...]:
        raise SettingError(
            f"{cls.__name__} has no default for {name!r}: give check_method an instance, for example "
            f"check_method({cls.__name__}({name}=…))."
        )
    return (_limited(find_method("LoRA"), LIMITS[0]), find_method("BitFit")())


def _plans(method: Method, case: Case) -> bool:
    try:
        check_settings(method)
        plan(case.build(), case.method(method))
    except TrimtabError:
        return False
    return True
