"""Linear probing."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TargetError
from trimtab.kinds.selection import SelectionMethod
from trimtab.kinds.weight import ParameterSite
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.structure import Structure


@dataclass(frozen=True)
class LinearProbe(SelectionMethod):
    """Understanding intermediate layers using linear classifier probes. Alain and Bengio 2016, arXiv 1610.01644.

    Trains the head W (classes, d) and its bias, and nothing else. The backbone stays in evaluation mode while training
    (no dropout, fixed BatchNorm statistics), so that features are a function of the input alone; `attach(…,
    base_mode="follow")` gives that up. Nothing of the backbone is saved for the backward pass.
    A head that is tied to the embedding is refused: training it would change the features.
    Trainable: classes·(d + 1).
    """

    targets: Targets = setting("head", "head, or the modules that belong to it")

    capabilities = Capabilities(
        starts_at_base="exact",
        merge="exact",
        linear_in_parameters=True,
        additive=False,
        quantized_base=False,
        base_mode="eval",
    )

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        found = super().sites(structure, targets)
        own = {site.path for site in found}
        for site in found:
            parameter = structure.modules[site.path]._parameters[site.parameter]
            for path, module in structure.modules.items():
                if path not in own and any(other is parameter for other in module._parameters.values()):
                    raise TargetError(
                        f"the head {str(site)!r} is tied to {path!r}: a probe would change the features it reads. "
                        f"Give the head a weight of its own, or train both with FullTuning(targets={str(site)!r})."
                    )
        return found

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        return {"value": Spec(site.shape, decay=len(site.shape) > 1)}
