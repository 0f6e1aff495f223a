"""RepAdapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError, TargetError
from trimtab.hooks import Leaf
from trimtab.kinds.activation import ActivationLeaf, ActivationMethod, ActivationSite, feed_forward_of
from trimtab.kinds.edits import input_edits
from trimtab.kinds.initial import uniform
from trimtab.merge import Edit
from trimtab.method import Capabilities, Spec, Targets, setting
from trimtab.quantized import linear_features
from trimtab.structure import Attention, FeedForward, Structure
from trimtab.targets import resolve


class _RepAdapterLeaf(ActivationLeaf):
    """A leaf whose affine map of the input folds into every linear map that reads it."""

    site: _InputSite
    method: RepAdapter

    def edits(self) -> list[Edit]:
        points = torch.eye(self.site.features + 1, self.site.features).roll(1, 0).to(self.A)  # zero, then the axes
        images = _change(self, points, dropout=0.0)  # t, then t + each column of M − I
        matrix = (images[1:] - images[0]).t()
        readers = [(self.root.get_submodule(path), path) for path in self.site.readers]
        return [edit for reader in readers for edit in input_edits(*reader, matrix, images[0])]


@dataclass(frozen=True)
class _InputSite(ActivationSite):
    """The input of an attention or feed-forward part, and the linear maps that read it and nothing else does."""

    readers: tuple[str, ...] = ()

    @property
    def leaf_class(self) -> type[Leaf]:
        return _RepAdapterLeaf


@dataclass(frozen=True)
class RepAdapter(ActivationMethod):
    """RepAdapter: Towards Efficient Visual Adaption via Structural Re-parameterization. Luo et al. 2023, 2302.08106.

    h′ = h + s·(B·dropout(A·h + a) + b) at the input of each attention and each feed-forward part (behind the norm):
    A (r, d) Xavier-uniform, B (d, r/g) = 0 in g groups, output group i reading hidden group i, biases a (r,) and
    b (d,) = 0. Starts at the base. Merged into the linear maps that read this input, W′ = W·(I + s·B̃·A) and
    b′ = b + s·W·(B̃·a + b), B̃ (d, r) block-diagonal: query, key and value, fused or not, and the first map(s) of the
    feed-forward part; a bias is created where there is none. Paper: r = 8, g = 2, dropout 0.1, s of 0.1 to 10 by task;
    "attention-core" alone is its smaller variant. Trainable: d·r + r + d·r/g + d for each place;
    ViT-B/16, r = 8: 239,808. The authors' merge with one group is broken for the feed-forward part.
    """

    bottleneck: int = setting(8, "hidden numbers r", minimum=1)
    groups: int = setting(2, "equal groups g of the map upwards", minimum=1)
    scale: float = setting(1.0, "factor s of the change", above=0.0)
    dropout: float = setting(0.1, "dropout on the hidden numbers", minimum=0.0, maximum=0.99)
    targets: Targets = setting("attention-core | feed-forward", "attention and feed-forward parts")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False, creates_bias=True)

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        attentions = {attention.path: attention for attention in structure.attentions}
        found: dict[str, ActivationSite] = {}
        for item in resolve(structure, targets):
            part = attentions.get(item.path) or feed_forward_of(structure, item)
            path, readers = _input_of(structure, part)
            features = linear_features(structure.modules[readers[0]])
            assert features is not None
            found[path] = _InputSite(path, "input", features[0], readers=readers)
        return list(found.values())

    def tensors(self, site: ActivationSite) -> dict[str, Spec]:
        width, inner, groups = site.features, self.bottleneck, self.groups
        if width % groups or inner % groups:
            raise SettingError(f"RepAdapter(groups={groups}) must divide the bottleneck {inner} and the width {width}.")
        shapes = {"A": (inner, width), "a": (inner,), "B": (width, inner // groups), "b": (width,)}
        return {name: Spec(shape) for name, shape in shapes.items()}

    def initialise(self, leaf: ActivationLeaf, generator: torch.Generator) -> None:
        uniform(leaf.A, math.sqrt(6.0 / sum(leaf.A.shape)), generator)

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        return hidden + _change(leaf, hidden, self.dropout if leaf.training else 0.0)


def _change(leaf: ActivationLeaf, hidden: Tensor, dropout: float) -> Tensor:
    """Return s·(B·dropout(A·h + a) + b) for h (..., d)."""
    method: Any = leaf.method
    inner = torch.dropout(F.linear(hidden, leaf.A, leaf.a), dropout, train=dropout > 0.0)  # (..., r)
    pairs = zip(inner.chunk(method.groups, dim=-1), leaf.B.chunk(method.groups), strict=True)
    return method.scale * (torch.cat([F.linear(part, up) for part, up in pairs], dim=-1) + leaf.b)  # type: ignore[no-any-return]


def _input_of(structure: Structure, part: Attention | FeedForward) -> tuple[str, tuple[str, ...]]:
    """Return the module whose input is meant, and the linear maps that read it; raises TargetError."""
    if isinstance(part, FeedForward):
        alone = part.source in part.inputs
        if not part.inputs or (alone and len(part.inputs) > 1):
            raise TargetError(f"RepAdapter: more than linear maps read the input of {part.sink!r}; leave it out.")
        return part.source, part.inputs
    readers = (part.fused,) if part.fused else (part.query, part.key, part.value)
    known = tuple(path for path in readers if path is not None)
    block = structure.block_of(part.path)
    earlier = [a.path for a in structure.attentions if structure.block_of(a.path) == block]
    if not known or (block is not None and earlier.index(part.path) > 0):
        raise TargetError(
            f"RepAdapter needs one input that query, key and value read; {part.path!r} has none (its key and value "
            f"come from elsewhere, or it has no linear maps of its own). Leave it out of the targets."
        )
    return part.path, known
