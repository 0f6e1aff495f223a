"""LoFiT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.errors import SettingError, TargetError, suggestion
from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite, module_paths, site_at
from trimtab.kinds.initial import normal
from trimtab.kinds.placement import head_size
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import at_least_single
from trimtab.structure import Structure

if TYPE_CHECKING:
    from trimtab.adapter import Adapter, Part


@dataclass(frozen=True)
class LoFiT(ActivationMethod):
    """LoFiT: Localized Fine-tuning on LLM Representations. Yin et al. 2024, arXiv 2406.01563.

    z_i ← (1 + A_i) ⊙ z_i + v_i for the output z_i (d_h,) of attention head i, before the output projection. Stage
    "scale" trains A of every head with the penalty λ·Σ|A|; `select_heads` ranks heads by ‖A_i‖₂. Stage "offset" starts
    again from the base with A = 0 and trains v of the selected heads, which is the result:

        first = attach(model, LoFiT(stage="scale")); …; heads = LoFiT.select_heads(first, 32); first.detach()
        attach(model, LoFiT(stage="offset", heads=heads))

    Initial N(0, 1e-3²): nearly the base, exactly so with `deviation=0`. Merged into the output projection's columns or
    its bias, created where there is none. Paper: λ 5e-4 to 5e-3, learning rate 5e-4 to 5e-3, then 5e-3 to 2e-2, about
    3 % of the heads. Trainable: heads·d_h over all layers, then selected·d_h.
    """

    stage: Literal["scale", "offset"] = setting("scale", "scale all heads to select some, or offset the selected ones")
    heads: tuple[tuple[str, int], ...] = setting((), "stage 'offset': (output projection, head) pairs of select_heads")
    penalty_weight: float = setting(5e-4, "weight λ of Σ|A| in stage 'scale'", minimum=0.0)
    deviation: float = setting(1e-3, "standard deviation at the start; 0: the base itself", minimum=0.0, maximum=100.0)
    head_size: int | None = setting(None, "width d_h of a head; None: as the attention module records it", minimum=1)
    targets: Targets = setting("attention-output", "output projections of the attentions")

    capabilities = Capabilities(
        starts_at_base="approximate", merge="exact", linear_in_parameters=True, additive=False, creates_bias=True,
        requires_binding=True,
    )  # fmt: skip

    def promises(self) -> Capabilities:
        start: Literal["approximate", "exact"] = "approximate" if self.deviation else "exact"
        selects = self.stage == "scale"
        return replace(
            self.capabilities, starts_at_base=start, creates_bias=not selects,
            requires_binding=selects and self.penalty_weight > 0.0,
        )  # fmt: skip

    def validate(self) -> None:
        if (self.stage == "offset") != bool(self.heads):
            raise SettingError("LoFiT: stage 'offset' needs the heads of LoFiT.select_heads, stage 'scale' none.")
        if len(set(self.heads)) < len(self.heads):
            raise SettingError("LoFiT: a head is named twice in heads.")

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        sites = [self._site(structure, path) for path in module_paths(structure, targets)]
        groups = {site.path: site.groups for site in sites}
        for path, head in self.heads:
            if path not in groups:
                raise TargetError(f"LoFiT: the head {(path, head)} is at no target." + suggestion(path, groups))
            if not 0 <= head < groups[path]:
                raise SettingError(f"LoFiT: {path!r} has the heads 0 to {groups[path] - 1}, asked for {head}.")
        return sites if self.stage == "scale" else [site for site in sites if self._selected(site)]

    def _site(self, structure: Structure, path: str) -> ActivationSite:
        part = next((part for part in structure.attentions if part.output == path), None)
        if part is None:
            raise TargetError(f"LoFiT acts on the input of an attention's output projection, and {path!r} is none.")
        site, size = site_at(structure, path, "input"), self.head_size or head_size(structure, part)
        if size is None or site.features % size:
            found = "records no head size" if size is None else f"is not a number of heads of width {size}"
            raise TargetError(f"LoFiT: {part.path!r} with {site.features} channels {found}; state head_size=…")
        return replace(site, groups=site.features // size)

    def _selected(self, site: ActivationSite) -> list[int]:
        return [head for path, head in self.heads if path == site.path]

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        heads = site.groups if self.stage == "scale" else len(self._selected(site))
        return {self.stage: Spec((heads, site.features // site.groups))}

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        normal(getattr(leaf, self.stage), self.deviation, generator)

    def fold(self, leaf: ActivationLeaf) -> tuple[Tensor | None, Tensor | None]:
        if self.stage == "scale":
            return 1.0 + at_least_single(leaf.scale).flatten(), None
        offsets = dict(zip(self._selected(leaf.site), leaf.offset, strict=True))
        absent = torch.zeros_like(leaf.offset[0])
        return None, torch.cat([offsets.get(head, absent) for head in range(leaf.site.groups)])

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        scale, shift = self.fold(leaf)
        scaled = hidden if scale is None else hidden * scale
        return scaled if shift is None else scaled + shift

    def penalty(self, part: Part) -> Tensor | None:
        sums = [leaf.scale.abs().sum() for leaf in part.leaves if self.stage == "scale" and self.penalty_weight]
        return self.penalty_weight * torch.stack(sums).sum() if sums else None

    @staticmethod
    def select_heads(adapter: Adapter, count: int) -> tuple[tuple[str, int], ...]:
        """Return the `count` (output projection, head) pairs of largest ‖A‖₂, largest first; raises SettingError."""
        parts = [p for p in adapter.parts if isinstance(p.method, LoFiT) and p.method.stage == "scale"]
        scales = [(leaf.site.path, leaf.scale.detach().float()) for part in parts for leaf in part.leaves]
        scored = [(float(norm), path, i) for path, scale in scales for i, norm in enumerate(scale.norm(dim=1))]
        if not 1 <= count <= len(scored) or not all(norm < float("inf") for norm, _, _ in scored):
            raise SettingError(f"LoFiT.select_heads: asked for {count} of {len(scored)} heads with finite scales.")
        return tuple((path, head) for _, path, head in sorted(scored, key=lambda entry: -entry[0])[:count])
