"""LN-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.errors import TargetError
from trimtab.kinds.selection import SelectionMethod
from trimtab.kinds.weight import ParameterSite
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.structure import Structure, is_norm
from trimtab.targets import resolve


@dataclass(frozen=True)
class LNTuning(SelectionMethod):
    """Tuning LayerNorm in Attention. Zhao et al. 2023, arXiv 2312.11420; CLIP recipe: arXiv 2503.19683.

    Trains gain γ (C,) and bias β (C,) of normalisation layers, which are found by their type: LayerNorm, RMSNorm (gain
    only), GroupNorm, BatchNorm; norms without either are skipped. Starts at the pretrained values, never decays them
    (gains sit near one, not zero). Combine it with a head: `Compose(LNTuning(), FullTuning(targets="head"))`.
    Trainable: 2·C for each LayerNorm; BERT-base 38,400, the image tower of CLIP ViT-L/14 102,400. BatchNorm's running
    statistics still follow the data while training: `attach(…, base_mode="eval")` holds them.
    Activation memory is that of a full backward down to the first norm: every gain needs its normalised input.
    """

    targets: Targets = setting("norm", "norms, or modules whose norms are trained")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True, additive=False)

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        inside = {path for item in resolve(structure, targets) for path in structure.within(item.path)}
        norms = tuple(f"={p}" for p, module in structure.modules.items() if p in inside and is_norm(module))
        if not norms:
            raise TargetError(f"targets {targets!r} hold no norm; use 'norm', or a pattern over the names of norms.")
        return super().sites(structure, norms)

    def selects(self, name: str, parameter: Tensor) -> bool:
        return name in ("weight", "bias")

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        return {"value": Spec(site.shape, decay=False)}
