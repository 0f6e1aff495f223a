"""Methods that consist of others: how one names another without importing its file, and what they promise together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.errors import SettingError
from trimtab.method import Capabilities, Method, Spec, find_method

_ORDER = ("exact", "approximate", "no", "none")
_ALL = ("linear_in_parameters", "additive", "causal_safe", "cached_generation", "quantized_base", "routable",
        "per_sample_gradients", "keeps_base", "checkpointing")  # fmt: skip
_ANY = ("input_dependent", "creates_bias", "requires_binding")


class Composition(Method):
    """A method that consists of others: a subclass says of which in `parts`."""

    def tensors(self, site: object) -> dict[str, Spec]:
        raise SettingError("a composition has no sites of its own; its parts have.")


def make_method(name: str, settings: Mapping[str, object]) -> Method:
    """Return the method of that name with these settings; raises TrimtabError with the nearest names."""
    make: Callable[..., Method] = find_method(name)
    return make(**settings)


def weakest(parts: Sequence[Method]) -> Capabilities:
    """Return what several methods promise together: each promise is that of the weakest part."""
    given = [part.promises() for part in parts]
    combined: dict[str, Any] = {name: all(getattr(one, name) for one in given) for name in _ALL}
    combined |= {name: any(getattr(one, name) for one in given) for name in _ANY}
    return dataclasses.replace(
        given[0],
        starts_at_base=max((one.starts_at_base for one in given), key=_ORDER.index),
        merge=max((one.merge for one in given), key=_ORDER.index),
        merge_reason="; ".join(one.merge_reason for one in given if one.merge_reason),
        base_mode="eval" if any(one.base_mode == "eval" for one in given) else "follow",
        **combined,
    )
