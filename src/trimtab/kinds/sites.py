"""What sites at a module have in common, and what leaves that serve a site from elsewhere have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.hooks import Leaf
from trimtab.merge import Edit
from trimtab.structure import Structure


@dataclass(frozen=True)
class ModuleSite:
    """A module whose forward carries the change of one leaf."""

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def owner(self) -> str:
        """The module on which the leaf is registered."""
        return self.path

    @property
    def key(self) -> str:
        """The name that distinguishes this site's leaf on its owner."""
        return ""


class Companion(Leaf):
    """A leaf elsewhere in the model that hands something to a site's own leaf, its `partner`; holds no tensors."""

    partner: Any

    def __init__(self, partner: Leaf, target: nn.Module) -> None:
        super().__init__(partner.part, partner.site, target)
        self.__dict__["partner"] = partner  # a reference: it is registered at its own target

    def edits(self) -> list[Edit]:
        """Nothing: the partner's edits are the site's."""
        return []


def other_holders(structure: Structure, holder: nn.Module, parameter: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (path, module, name) of every other place that holds the same parameter (tied weights)."""
    shared = holder._parameters[parameter]
    for path, module in structure.modules.items():
        for name, other in module._parameters.items():
            if other is shared and not (module is holder and name == parameter):
                yield path, module, name
