"""Selection methods: train a part of the base's own weights, on a copy that the forward reads; the base stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import TargetError
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, parameter_site
from trimtab.method import Targets
from trimtab.quantized import is_packed
from trimtab.structure import Structure
from trimtab.targets import Item, resolve


@dataclass(frozen=True)
class SelectionMethod(WeightMethod):
    """A method that replaces whole tensors of the base. Give `weight`; a target module means all its parameters."""

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        found, seen = [], set()
        for item in resolve(structure, targets):
            for single in self._parameters(structure, item):
                module, name = structure.modules[single.path], single.parameter or "weight"
                if is_packed(module, name) and not self.promises().quantized_base:
                    raise TargetError(
                        f"'{single.path}:{name}' is stored quantised, so {type(self).__name__} cannot train its "
                        f"numbers; load the base in full precision, or leave this place out of the targets."
                    )
                parameter = module._parameters[name]
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found.append(parameter_site(structure, single, whole=True))
        if not found:
            raise TargetError(f"targets {targets!r} hold no parameter of the kind {type(self).__name__} trains.")
        return found

    def _parameters(self, structure: Structure, item: Item) -> list[Item]:
        if item.parameter is not None:
            return [item]
        return [
            Item(path, name)
            for path, module in structure.within(item.path).items()
            for name, parameter in module._parameters.items()
            if parameter is not None and self.selects(name, parameter)
        ]

    def selects(self, name: str, parameter: Tensor) -> bool:
        """Say whether a parameter of a targeted module is trained."""
        return parameter.dtype.is_floating_point or not self.promises().quantized_base  # packed ones are refused

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        """Start from the base's own numbers."""
        leaf.value.copy_(leaf.weight())

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        """Return the effective tensor: the leaf's own copy."""
        return leaf.value
