"""Activation methods: h → h′ at a named place, the input or output of a module, in series or from a parallel source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf
from trimtab.kinds.edits import Edit, affine_edits
from trimtab.method import Method, Targets
from trimtab.quantized import linear_features
from trimtab.structure import Convolution, FeedForward, Structure, is_norm
from trimtab.targets import Item, resolve


@dataclass(frozen=True)
class ActivationSite:
    """One place in the forward: the `side` of module `path`; `source` is the module whose input is read beside it."""

    path: str
    side: Literal["input", "output"]
    features: int
    axis: int = -1
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.side}" if self.source is None else f"{self.source}→{self.path}"

    @property
    def owner(self) -> str:
        """The module whose forward carries the change."""
        return self.path

    @property
    def key(self) -> str:
        """The name that distinguishes this site's leaf on its target."""
        return "" if self.side == "output" else "_input"


def site_at(structure: Structure, path: str, side: Literal["input", "output"] = "output") -> ActivationSite:
    """Return the site at one side of a module; raises TargetError where its width cannot be told."""
    module = structure.modules[path]
    linear = linear_features(module)
    if linear is not None:
        return ActivationSite(path, side, linear[side == "output"])
    if isinstance(module, Convolution):
        return ActivationSite(path, side, module.out_channels if side == "output" else module.in_channels, axis=1)
    if is_norm(module):
        channels_second = isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase)
        return ActivationSite(path, side, int(module.weight.shape[0]), axis=1 if channels_second else -1)
    if isinstance(module, nn.Embedding) and side == "output":
        return ActivationSite(path, side, module.embedding_dim)
    if isinstance(module, nn.MultiheadAttention):
        return ActivationSite(path, side, module.embed_dim)
    return ActivationSite(path, side, _hidden_width(structure, path))


def _hidden_width(structure: Structure, path: str) -> int:
    """Width of a composite module's hidden state, from its last linear map or its norms."""
    inside = [s for name in structure.within(path) if (s := linear_features(structure.modules[name]))]
    if not inside:
        children = [name for name, _ in structure.modules[path].named_children()]
        raise TargetError(
            f"the width of {path!r} cannot be told from its structure; its parts are: "
            f"{', '.join(children) or '(none)'}. Name a linear map or a norm instead."
        )
    return inside[-1][1]


def parallel_site(structure: Structure, part: FeedForward) -> ActivationSite:
    """Return the site that reads a feed-forward part's input and adds to its output."""
    source = None if part.source == part.sink else part.source
    return ActivationSite(part.sink, "output", part.hidden, source=source)


def feed_forward_of(structure: Structure, item: Item) -> FeedForward:
    """Return the feed-forward part that an item belongs to; raises TargetError."""
    for part in structure.feed_forwards:
        if item.path.startswith((part.source, part.sink)) or item.path in structure.feed_forward_linears(part.block):
            return part
    raise TargetError(f"{str(item)!r} belongs to no feed-forward part; use targets='feed-forward' or 'mlp'.")


class ActivationLeaf(Leaf):
    """The tensors of an activation method at one site."""

    site: ActivationSite
    method: ActivationMethod
    captured: Tensor | None = None

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        if self.site.side == "input":
            return change_first(call, self._changed, args, kwargs)
        source = self.captured if self.site.source is not None else first_tensor(args, kwargs)
        self.captured = None
        output = call(*args, **kwargs)
        return change_primary(output, lambda hidden: self._changed(hidden, source))

    def _changed(self, hidden: Tensor, source: Tensor | None = None) -> Tensor:
        dtype = next((p.dtype for p in self.parameters(recurse=False)), hidden.dtype)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = hidden.dtype
        source = source.to(dtype) if source is not None and source.is_floating_point() else source
        return self(hidden.to(dtype), source).to(hidden.dtype)  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor, source: Tensor | None = None) -> Tensor:
        """Return h′; `source` is the input of the module (or of the parallel branch's start)."""
        return self.method.transform(self, hidden, source)

    def channels(self, vector: Tensor, like: Tensor) -> Tensor:
        """Shape a vector of one number per channel so that it acts along the site's channel axis."""
        return vector if self.site.axis == -1 else vector.view(-1, *[1] * (like.dim() - 2))

    def edits(self) -> list[Edit]:
        """Return the base tensors after folding h′ = scale ⊙ h + shift into the module."""
        folded = self.method.fold(self)
        if folded is None:
            raise AttachError(f"{type(self.method).__name__} cannot be merged: {self.method.capabilities.merge_reason}.")
        return affine_edits(self.target, self.site.path, self.site.side, *folded)


class CaptureLeaf(Leaf):
    """Hands the input of one module to the leaf of another in the same forward; holds no tensors."""

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["partner"].captured = first_tensor(args, kwargs)
        return call(*args, **kwargs)

    def edits(self) -> list[Edit]:
        """Nothing to merge here."""
        return []


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the first tensor among the inputs, or None."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def change_first(call: Call, change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call with the first input tensor changed."""
    if args:
        return call(change(args[0]), *args[1:], **kwargs)
    name = next(iter(kwargs))
    return call(**{**kwargs, name: change(kwargs[name])})


def change_primary(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the hidden state in a module's output: the tensor itself, or the first entry of a tuple."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (change(output[0]), *output[1:])
    raise AttachError(f"a module returned {type(output).__name__}, in which the hidden state cannot be found.")


@dataclass(frozen=True)
class ActivationMethod(Method):
    """A method that changes a hidden state. Give `transform`, and `fold` where it is a scale and shift."""

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        paths = dict.fromkeys(item.path for item in resolve(structure, targets))
        return [site_at(structure, path) for path in paths]

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        """Return h′ (..., features); `source` is the module's input, or the parallel branch's."""
        raise NotImplementedError

    def fold(self, leaf: ActivationLeaf) -> tuple[Tensor | None, Tensor | None] | None:
        """Return (scale, shift) when h′ = scale ⊙ h + shift for every input, else None."""
        return None
