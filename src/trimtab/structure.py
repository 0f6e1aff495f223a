"""What a model is made of: blocks, attention, feed-forward parts, norms, embeddings, head; found from structure.

Names only serve as evidence where shapes cannot tell (which of three equal projections is the query).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from torch import nn

from trimtab.hooks import Leaf, base_class
from trimtab.quantized import linear_features

_QUERY_KEY_VALUE = re.compile(r"(^|_)(?P<letter>[qkv])(uery|ey|alue)?(_|$|proj|lin)")
_NORM = re.compile(r"(Layer|RMS|Group|Batch|Instance)\w*Norm|^Norm$|RMSNorm")
Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Attention:
    """One attention computation: the module that runs it and its projections (paths)."""

    path: str
    query: str | None
    key: str | None
    value: str | None
    fused: str | None
    output: str | None


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of one block: where its input is read and its output written (paths)."""

    block: str
    source: str
    sink: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    hidden: int


def is_norm(module: nn.Module) -> bool:
    """Say whether the module is a normalisation layer with an affine weight of its own."""
    weight = module._parameters.get("weight")
    named = any(_NORM.search(cls.__name__) for cls in base_class(module).__mro__[:3])
    return named and weight is not None and weight.dim() == 1


def norm_width(module: nn.Module) -> int:
    """Return the number of channels of a normalisation layer."""
    weight = module._parameters["weight"]
    assert weight is not None
    return int(weight.shape[0])


def is_linear(module: nn.Module) -> bool:
    """Say whether the module is a linear map over the last axis (plain, transposed, or quantised)."""
    return linear_features(module) is not None


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


class Structure:
    """The structure of one model, without the leaves of adapters already attached."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(_base_modules(model, ""))

    def within(self, path: str) -> dict[str, nn.Module]:
        """Return the modules at and below `path`."""
        return {name: m for name, m in self.modules.items() if name == path or name.startswith(path + ".") or not path}

    @cached_property
    def linears(self) -> list[str]:
        """Paths of every linear map, in order of registration."""
        return [path for path, module in self.modules.items() if is_linear(module)]

    @cached_property
    def blocks(self) -> list[str]:
        """Paths of the repeated blocks: equal, composite elements of the outermost lists."""
        found: list[str] = []
        for path, module in self.modules.items():
            if isinstance(module, nn.ModuleList | nn.Sequential) and not any(path.startswith(b + ".") for b in found):
                found += self._blocks_of(path, module)
        return found

    def _blocks_of(self, path: str, container: nn.Module) -> list[str]:
        children = [(name, child) for name, child in container.named_children() if not isinstance(child, Leaf)]
        if not children or len({base_class(child) for _, child in children}) > 1:
            return []
        paths = [f"{path}.{name}" if path else name for name, _ in children]
        inner = [self.within(p) for p in paths]
        composite = all(sum(is_linear(m) or isinstance(m, Convolution) for m in group.values()) >= 2 for group in inner)
        return paths if composite else []

    def block_index(self, path: str) -> int | None:
        """Return the number of the block that holds `path`, counted within its list; None outside blocks."""
        for block in self.blocks:
            if path == block or path.startswith(block + "."):
                return int(block.rsplit(".", 1)[-1]) if block.rsplit(".", 1)[-1].isdigit() else self.blocks.index(block)
        return None

    def block_of(self, path: str) -> str | None:
        """Return the path of the block that holds `path`."""
        return next((b for b in self.blocks if path == b or path.startswith(b + ".")), None)

    @cached_property
    def attentions(self) -> list[Attention]:
        """Every attention computation, in order of registration."""
        found = (self._attention_at(path, module) for path, module in self.modules.items())
        return [attention for attention in found if attention is not None]

    def _attention_at(self, path: str, module: nn.Module) -> Attention | None:
        if isinstance(module, nn.MultiheadAttention):
            return Attention(path, None, None, None, None, None)
        children = {name: linear_features(c) for name, c in _children(module)}
        shapes = {name: shape for name, shape in children.items() if shape is not None}
        prefix = path + "." if path else ""
        letters = {m["letter"]: name for name in shapes if (m := _QUERY_KEY_VALUE.search(name.lower()))}
        if set(letters) == {"q", "k", "v"}:
            rest = [name for name in shapes if name not in letters.values()]
            width = shapes[letters["q"]][1]
            output = next((prefix + name for name in rest if shapes[name][0] == width), None)
            output = output or self._output_beside(path, width)
            query, key, value = (prefix + letters[letter] for letter in "qkv")
            return Attention(path, query, key, value, None, output)
        for name, (inside, outside) in shapes.items():
            partner = next((n for n, s in shapes.items() if n != name and 3 * s[0] == outside), None)
            if partner is not None and outside == 3 * inside:
                return Attention(path, None, None, None, prefix + name, prefix + partner)
        return None

    def _output_beside(self, path: str, width: int) -> str | None:
        """The output projection beside the attention's own module (BERT's layout): the next linear in its parent."""
        parent = path.rsplit(".", 1)[0] if "." in path else ""
        after = False
        for name, module in self.within(parent).items():
            after = after or name == path
            shape = linear_features(module)
            if after and shape is not None and shape[0] == width and not name.startswith(path + "."):
                return name
        return None

    @cached_property
    def feed_forwards(self) -> list[FeedForward]:
        """The feed-forward part of every block that has one."""
        found = (self._feed_forward_in(block) for block in self.blocks)
        return [part for part in found if part is not None]

    def _feed_forward_in(self, block: str) -> FeedForward | None:
        linears = self.feed_forward_linears(block)
        experts = [path for path, _ in self.expert_parameters if path.startswith(block + ".")]
        members = linears + experts
        if not members or not self._has_attention(block):
            return None
        container = _common_path(members)
        if experts:
            container = next((p for p in _ancestors(experts[0], block) if p != block), container)
        last = linears[-1] if linears else experts[-1]
        features = linear_features(self.modules[last])
        hidden = features[1] if features else self._hidden(block)
        inputs = [p for p in linears if (s := linear_features(self.modules[p])) and features and s[1] == features[0]]
        inside = container != block and container not in linears
        outputs = (last,) if linears else ()
        source, sink = (container, container) if inside else (linears[0], last)
        return FeedForward(block, source, sink, tuple(inputs), outputs, hidden)

    def feed_forward_linears(self, block: str) -> list[str]:
        """Paths of the block's linear maps that belong to no attention."""
        own = {p for a in self.attentions for p in (a.query, a.key, a.value, a.fused, a.output) if p}
        cores = [a.path + "." for a in self.attentions]
        inside = [p for p in self.linears if p.startswith(block + ".") and p not in own]
        return [p for p in inside if not any(p.startswith(core) for core in cores)]

    def _has_attention(self, block: str) -> bool:
        return any(a.path.startswith(block + ".") for a in self.attentions)

    def _hidden(self, block: str) -> int:
        widths = [norm_width(module) for module in self.within(block).values() if is_norm(module)]
        return widths[0] if widths else 0

    @cached_property
    def expert_parameters(self) -> list[tuple[str, str]]:
        """Stacked expert matrices held as raw 3-D parameters: (module path, parameter name)."""
        plain = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.RNNBase)
        return [
            (path, name)
            for path, module in self.modules.items()
            if not isinstance(module, plain)
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1
        ]

    @cached_property
    def head(self) -> str | None:
        """The output head: the last linear map, when it lies outside every block."""
        outside = [path for path in self.linears if self.block_of(path) is None]
        return outside[-1] if outside and outside[-1] == self.linears[-1] else None


def _base_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) in order of registration, each module at its first path, without leaves."""
    seen: set[int] = set()

    def walk(current: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(current) in seen:
            return
        seen.add(id(current))
        yield name, current
        for key, child in _children(current):
            yield from walk(child, f"{name}.{key}" if name else key)

    yield from walk(module, path)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((key, child) for key, child in module._modules.items() if child is not None and not isinstance(child, Leaf))


def _common_path(paths: list[str]) -> str:
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _ancestors(path: str, stop: str) -> list[str]:
    """Paths from the child of `stop` down to `path`."""
    steps = path.split(".")
    return [".".join(steps[:depth]) for depth in range(_depth(stop) + 1, len(steps) + 1)]
