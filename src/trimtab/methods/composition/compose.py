"""Composition of methods."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimtab.errors import SettingError
from trimtab.kinds.composition import Composition, weakest
from trimtab.method import Capabilities, Method, fits


@dataclass(frozen=True, init=False)
class Compose(Composition):
    """Several methods as one adapter: attached, trained, saved and disabled together.

    `Compose(PrefixTuning(length=30), ParallelAdapter(bottleneck=512))`. Each part keeps its own targets; parts that
    act on the same place act in the order given; where one of two on a weight is not additive, both are refused.
    Mergeable when every part is.
    """

    methods: tuple[Method, ...] = field(
        metadata={"help": "the parts, each an argument of its own: Compose(LoRA(), IA3()), or Compose(*parts)"}
    )

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def __init__(self, *parts: Method, methods: tuple[Method, ...] = ()) -> None:
        # What is no sequence is kept, so that the check of settings names it.
        object.__setattr__(self, "methods", (*parts, *methods) if fits(methods, tuple | list) else methods)

    def parts(self) -> tuple[Method, ...]:
        return tuple(part for method in self.methods for part in method.parts())

    def promises(self) -> Capabilities:
        return weakest(self.parts()) if self.methods else self.capabilities

    def exported(self) -> Method:
        return Compose(*(method.exported() for method in self.methods))

    def validate(self) -> None:
        if not self.parts():
            raise SettingError("Compose() needs at least one method.")
