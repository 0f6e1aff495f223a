"""(IA)³."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import TargetError
from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite, module_paths, site_at
from trimtab.kinds.placement import named_roles
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import at_least_single, is_transposed
from trimtab.structure import Structure


@dataclass(frozen=True)
class IA3(ActivationMethod):
    """(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.

    Liu et al. 2022, arXiv 2205.05638. Learned vectors scale the keys (l_k ⊙ k), the values (l_v ⊙ v) and the inner
    activation of the feed-forward part (l_ff ⊙ act(…), the input of its output projection; T-Few's code scales the
    linear half of a gated activation, which is the same). All start at one: the base exactly. Merged into weight
    and bias: W ← diag(l)·W, b ← l ⊙ b behind a map, W ← W·diag(l) in front of one.

    A targeted output projection of a feed-forward part, or what `input_targets` names, is scaled at its input, every
    other target at its output. A fused projection of query, key and value gets one vector each for key and value: its
    layout is known for GPT-2's kind, stated by `fused="contiguous"` for others, and refused where it is neither, or
    where key and value are not targeted together. Trainable: d_k + d_v for each attention, d_ff for each feed-forward
    part; T0-3B 540,672.
    """

    fused: Literal["detect", "contiguous"] = setting(
        "detect", "layout of fused projections: known kinds, or q, k, v in turn"
    )
    input_targets: Targets | None = setting(
        None, "targets scaled at their input; None: feed-forward output projections"
    )
    targets: Targets = setting("key | value | mlp-output", "modules whose output (or input) is scaled")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", linear_in_parameters=True, additive=False)

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        at_input = {path for part in structure.feed_forwards for path in part.outputs}
        if self.input_targets is not None:
            at_input = set(module_paths(structure, self.input_targets))
        fused = {part.fused for part in structure.attentions}
        sites = []
        for path in module_paths(structure, targets):
            site = site_at(structure, path, "input" if path in at_input else "output")
            sites.append(self._fused(structure, site) if path in fused and path not in at_input else site)
        return sites

    def _fused(self, structure: Structure, site: ActivationSite) -> ActivationSite:
        """Return the site with its query, key and value told apart; raises TargetError where that is impossible."""
        roles = named_roles(self.targets) & {"query", "key", "value"}
        if roles and roles != {"key", "value"}:
            raise TargetError(
                f"{site.path!r} computes query, key and value in one; IA3 scales the key and the value there, not only "
                f"{' and '.join(sorted(roles))}. Use targets='key | value'."
            )
        if self.fused == "detect" and not is_transposed(structure.modules[site.path]):
            raise TargetError(
                f"{site.path!r} computes query, key and value in one, and its structure does not tell where each lies. "
                f"If its output is all queries, then all keys, then all values, use IA3(fused='contiguous'); otherwise "
                f"leave it out of the targets, for example targets='mlp-output'."
            )
        return replace(site, groups=3)

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        return {"scale": Spec((site.features,) if site.groups == 1 else (2, site.features // 3), decay=False)}

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        leaf.scale.fill_(1.0)

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        return hidden * leaf.channels(self._scale(leaf), hidden)

    def _scale(self, leaf: ActivationLeaf) -> Tensor:
        """Return the factor of every channel; queries keep theirs."""
        scale: Tensor = leaf.scale
        return scale if leaf.site.groups == 1 else torch.cat([torch.ones_like(scale[0]), *scale])

    def fold(self, leaf: ActivationLeaf) -> tuple[Tensor, None]:
        return at_least_single(self._scale(leaf)), None
