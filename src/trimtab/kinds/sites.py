"""What sites at a module have in common, and what leaves that serve a site from elsewhere have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.hooks import Leaf
from trimtab.kinds.edits import Edit


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
        super().__init__(partner.method, partner.site, partner.state, partner.root, target)
        self.__dict__["partner"] = partner  # a reference: it is registered at its own target

    def edits(self) -> list[Edit]:
        """Nothing: the partner's edits are the site's."""
        return []
