"""Activation methods: h → h′ at a named place, the input or output of a module, in series or from a parallel source.

A place that is never reached, or whose width is not what the structure said, stops the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf, base_class, leaves_of
from trimtab.kinds.edits import affine_edits
from trimtab.kinds.layouts import along_axis, callable_alone
from trimtab.kinds.sites import Companion, ModuleSite
from trimtab.merge import Edit
from trimtab.method import Method, Targets
from trimtab.quantized import linear_features
from trimtab.structure import Convolution, FeedForward, Structure, is_norm
from trimtab.targets import Item, resolve


@dataclass(frozen=True)
class ActivationSite(ModuleSite):
    """One place in the forward: the `side` of module `path`, where the hidden state has `features` channels on `axis`.

    At the side "twice" the module runs on its unchanged input, what it gives is the source of the change, and it runs
    again on the changed input. `source` is another module, whose input is read beside this place, in the same forward.
    `groups` are the equal parts of the channels that a method tells apart (heads; query, key and value of a fused
    projection). `holds_shift` is false where the module has no bias into which a shift could be folded.
    """

    side: Literal["input", "output", "twice"]
    features: int
    axis: int = -1
    source: str | None = None
    groups: int = 1
    holds_shift: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.side}" if self.source is None else f"{self.source}→{self.path}"

    @property
    def key(self) -> str:
        """The name that distinguishes this site's leaf on its target."""
        return "" if self.side == "output" else f"_{self.side}"

    @property
    def leaf_class(self) -> type[Leaf]:
        return ActivationLeaf


def site_at(structure: Structure, path: str, side: Literal["input", "output"] = "output") -> ActivationSite:
    """Return the site at one side of a module; raises TargetError where it is out of reach or its width is unknown."""
    module = structure.modules[path]
    linear = linear_features(module)
    if linear is not None and not callable_alone(module):
        owner = path.rpartition(".")[0]
        raise TargetError(
            f"{path!r} is never called: {owner or 'its owner'!r} (nn.MultiheadAttention) only reads its weight. "
            f"Its output is that of {owner!r}, which can be named instead; its input cannot be reached."
        )
    if linear is not None:
        return ActivationSite(path, side, linear[side == "output"])
    if isinstance(module, Convolution):
        channels = module.out_channels if side == "output" else module.in_channels
        return ActivationSite(path, side, channels, axis=1 - module.weight.dim())
    if is_norm(module):
        axis = 1 if _has_channels_second(module) else -1
        (features,) = module.get_parameter("weight").shape
        return ActivationSite(path, side, features, axis, holds_shift="bias" in module._parameters)
    if isinstance(module, nn.Embedding) and side == "output":
        return ActivationSite(path, side, module.embedding_dim)
    if isinstance(module, nn.MultiheadAttention) and side == "output":
        return ActivationSite(path, side, module.embed_dim)
    part = next((part for part in structure.feed_forwards if path == part.sink), None)
    return ActivationSite(path, side, hidden_width(structure, part) if part is not None else _width(structure, path))


def _has_channels_second(norm: nn.Module) -> bool:
    """Say whether a norm's channels are dimension 1, as in images; some layer norms of vision models permute inside."""
    kinds = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
    named = base_class(norm).__name__.endswith(("1d", "2d", "3d"))
    return isinstance(norm, kinds) or named or vars(norm).get("data_format") == "channels_first"


def _width(structure: Structure, path: str) -> int:
    """Width of a composite module's hidden state, from its last linear map or its norms."""
    inside = [s for name in structure.within(path) if (s := linear_features(structure.modules[name]))]
    if not inside:
        children = [name for name, _ in structure.modules[path].named_children()]
        raise TargetError(
            f"the width of {path!r} cannot be told from its structure; its parts are: "
            f"{', '.join(children) or '(none)'}. Name a linear map or a norm instead."
        )
    return inside[-1][1]


def hidden_width(structure: Structure, part: FeedForward) -> int:
    """Return the width of what a feed-forward part writes; stacked experts tell it by the block's norms alone."""
    features = linear_features(structure.modules[part.outputs[0]]) if part.outputs else None
    if features is not None:
        return features[1]
    norms = (module for module in structure.within(part.block).values() if is_norm(module))
    return next((module.get_parameter("weight").shape[0] for module in norms), 0)


def parallel_site(structure: Structure, part: FeedForward) -> ActivationSite:
    """Return the site that reads a feed-forward part's input and adds to its output."""
    source = None if part.source == part.sink else part.source
    return ActivationSite(part.sink, "output", hidden_width(structure, part), source=source)


def feed_forward_of(structure: Structure, item: Item) -> FeedForward:
    """Return the feed-forward part that an item belongs to; raises TargetError."""
    for part in structure.feed_forwards:
        own = (part.block, part.source, part.sink, *structure.feed_forward_linears(part.block))
        if item.path in own or item.path.startswith(part.sink + "."):
            return part
    raise TargetError(f"{str(item)!r} belongs to no feed-forward part; use targets='feed-forward', 'mlp' or 'block'.")


def module_paths(structure: Structure, targets: Targets) -> list[str]:
    """Return the paths of targeted modules, each once; raises TargetError for raw parameters: nobody calls them."""
    items = resolve(structure, targets)
    raw = next((item for item in items if item.parameter is not None), None)
    if raw is not None:
        module = type(structure.modules[raw.path]).__name__
        raise TargetError(
            f"{str(raw)!r} is a parameter that {module} reads by itself: there is no call whose input or output could "
            f"be changed. Leave it out of the targets (… - {raw.path}), or use a method that acts on weights."
        )
    return list(dict.fromkeys(item.path for item in items))


class ActivationLeaf(Leaf):
    """The tensors of an activation method at one site."""

    site: ActivationSite
    method: ActivationMethod
    captured: Tensor | None = None

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        source = first_tensor(args, kwargs) if self.site.source is None else self._captured()
        if self.site.side == "input":
            return change_first(call, self._changed, args, kwargs)
        output = call(*args, **kwargs)
        if self.site.side == "twice":
            return change_first(call, lambda hidden: self._changed(hidden, primary(output)), args, kwargs)
        return change_primary(output, lambda hidden: self._changed(hidden, source))

    def companions(self, structure: Structure, previous: Leaf | None) -> Iterator[tuple[str, str, Leaf]]:
        source = self.site.source
        if source is not None:
            yield source, f"{self.site.key}_source", CaptureLeaf(self, structure.modules[source])

    def _captured(self) -> Tensor:
        source, self.captured = self.captured, None
        if source is None:
            others = [leaf for leaf in leaves_of(self.target) if leaf is not self and leaf.acts]
            if self.site.side == "twice" and others:
                raise AttachError(
                    f"adapters {others[-1].adapter.name!r} and {self.adapter.name!r} both run {self.site.path!r} "
                    f"twice, which has no meaning together; set one of them inactive (adapter.active = False)."
                )
            raise AttachError(
                f"{self.site.path!r} ran, but {self.site.source!r} had not run before it in this forward, so the place "
                f"of {type(self.method).__name__} is not where the model's structure suggested. Name the targets, or "
                f"state the place in the method's settings."
            )
        return source

    def _changed(self, hidden: Tensor, source: Tensor | None = None) -> Tensor:
        if hidden.shape[self.site.axis] != self.site.features:
            raise AttachError(
                f"{str(self.site)!r} was expected to have {self.site.features} channels on axis {self.site.axis}, and "
                f"has the shape {tuple(hidden.shape)}."
            )
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
        return along_axis(vector, self.site.axis, like)

    def edits(self) -> list[Edit]:
        """Return the base tensors after folding h′ = scale ⊙ h + shift into the module."""
        folded = self.method.fold(self)
        if folded is None or self.site.side == "twice":
            return super().edits()
        return affine_edits(self.target, self.site.path, self.site.side, *folded)


class CaptureLeaf(Companion):
    """Hands the input of one module to the leaf of another in the same forward; holds no tensors."""

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        self.partner.captured = first_tensor(args, kwargs)
        return call(*args, **kwargs)


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
    changed = change(primary(output))
    return changed if isinstance(output, Tensor) else (changed, *output[1:])


def primary(output: Any) -> Tensor:
    """Return the hidden state in a module's output: the tensor itself, or the first entry of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise AttachError(f"a module returned {type(output).__name__}, in which the hidden state cannot be found.")


@dataclass(frozen=True)
class ActivationMethod(Method):
    """A method that changes a hidden state. Give `transform`, and `fold` where it is a scale and shift."""

    def sites(self, structure: Structure, targets: Targets) -> list[ActivationSite]:
        return [site_at(structure, path) for path in module_paths(structure, targets)]

    def transform(self, leaf: ActivationLeaf, hidden: Tensor, source: Tensor | None) -> Tensor:
        """Return h′ (..., features); `source` is the module's input, or the parallel branch's."""
        raise NotImplementedError

    def fold(self, leaf: ActivationLeaf) -> tuple[Tensor | None, Tensor | None] | None:
        """Return (scale, shift) when h′ = scale ⊙ h + shift for every input, else None."""
        return None
