"""BitFit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.kinds.selection import SelectionMethod
from trimtab.kinds.weight import ParameterSite
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class BitFit(SelectionMethod):
    """BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

    Ben Zaken et al. 2021, arXiv 2106.10199. Trains every bias (of linear maps, convolutions and norms) and nothing
    else: b → b + Δb, kept here as b itself. A linear map with a trained bias saves no input for its gradient.
    Trainable: the sum of the bias widths; BERT-base with pooler 102,912. T5's relative attention bias is a matrix,
    not a bias, and is left alone. Models without biases have nothing to train, which is an error.
    """

    targets: Targets = setting("bias", "biases, or modules whose biases are trained")

    capabilities = Capabilities(
        starts_at_base="exact", merge="exact", linear_in_parameters=True, additive=False, quantized_base=True
    )

    def selects(self, name: str, parameter: Tensor) -> bool:
        return name.endswith("bias") and parameter.dim() == 1

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        return {"value": Spec(site.shape, decay=False)}
