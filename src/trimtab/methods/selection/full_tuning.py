"""Full fine-tuning of chosen tensors."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.kinds.selection import SelectionMethod
from trimtab.kinds.weight import ParameterSite
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class FullTuning(SelectionMethod):
    """Full fine-tuning of the targeted tensors, on a copy that the forward reads; the base stays as it was.

    `targets="all"` is ordinary full fine-tuning; `targets="head"` trains a new head as part of the adapter.
    Trainable: every number of the targeted tensors; tied tensors are one.
    """

    lr_scale: float = setting(1.0, "learning rate relative to the adapter's; a fresh head needs more", above=0.0)
    targets: Targets = setting("all", "tensors, or modules whose tensors are trained")

    capabilities = Capabilities(
        starts_at_base="exact",
        merge="exact",
        linear_in_parameters=True,
        additive=False,
        quantized_base=False,
    )

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        return {"value": Spec(site.shape, lr_scale=self.lr_scale, decay=len(site.shape) > 1)}
