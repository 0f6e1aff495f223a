"""What a model is made of: blocks, attention, feed-forward parts, norms, embeddings, head; found from structure.

Names only serve as evidence where shapes cannot tell (which of three equal projections is the query).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import dropwhile, starmap, takewhile

from torch import nn

from trimtab.hooks import base_children, base_class, base_modules, is_adapters
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


def is_norm(module: nn.Module) -> bool:
    """Say whether the module is a normalisation layer with an affine weight of its own."""
    weight = module._parameters.get("weight")
    named = any(_NORM.search(cls.__name__) for cls in base_class(module).__mro__[:3])
    return named and weight is not None and weight.dim() == 1


def is_linear(module: nn.Module) -> bool:
    """Say whether the module is a linear map over the last axis (plain, transposed, or quantised)."""
    return linear_features(module) is not None


class Structure:
    """The structure of one model, without the leaves of adapters already attached."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(base_modules(model))

    def parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """Yield (path, name, parameter) of every parameter of the base, at the first place that holds it."""
        seen: set[int] = set()
        for path, module in self.modules.items():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen and not is_adapters(name):
                    seen.add(id(parameter))
                    yield path, name, parameter

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
        children = base_children(container)
        if not children or len({base_class(child) for _, child in children}) > 1:
            return []
        paths = [f"{path}.{name}" if path else name for name, _ in children]
        inner = [self.within(p) for p in paths]
        composite = all(sum(is_linear(m) or isinstance(m, Convolution) for m in group.values()) >= 2 for group in inner)
        return paths if composite else []

    def block_index(self, path: str) -> int | None:
        """Return the number of the block that holds `path`, counted within its list; None outside blocks."""
        block = self.block_of(path)
        if block is None:
            return None
        number = block.rpartition(".")[2]
        return int(number) if number.isdigit() else self.blocks.index(block)

    def block_of(self, path: str) -> str | None:
        """Return the path of the block that holds `path`."""
        return next((b for b in self.blocks if path == b or path.startswith(b + ".")), None)

    @cached_property
    def attentions(self) -> list[Attention]:
        """Every attention computation, in order of registration."""
        return list(filter(None, starmap(self._attention_at, self.modules.items())))

    def _attention_at(self, path: str, module: nn.Module) -> Attention | None:
        if isinstance(module, nn.MultiheadAttention):
            return Attention(path, None, None, None, None, None)
        shapes = {name: shape for name, child in base_children(module) if (shape := linear_features(child))}
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
        behind = dropwhile(lambda name: name != path, self.within(path.rpartition(".")[0]))
        outside = [name for name in behind if not name.startswith(path + ".")]
        shapes = {name: linear_features(self.modules[name]) for name in outside}
        return next((name for name, shape in shapes.items() if shape and shape[0] == width), None)

    @cached_property
    def feed_forwards(self) -> list[FeedForward]:
        """The feed-forward part of every block that has one."""
        return list(filter(None, map(self._feed_forward_in, self.blocks)))

    def _feed_forward_in(self, block: str) -> FeedForward | None:
        linears = self.feed_forward_linears(block)
        experts = [path for path, _ in self.expert_parameters if path.startswith(block + ".")]
        members = linears + experts
        if not members or not any(a.path.startswith(block + ".") for a in self.attentions):
            return None
        child = ".".join((experts or members)[0].split(".")[: block.count(".") + 2])  # of the block
        container = child if experts else _common_path(members)
        last = linears[-1] if linears else experts[-1]
        features = linear_features(self.modules[last])
        inputs = [p for p in linears if (s := linear_features(self.modules[p])) and features and s[1] == features[0]]
        inside = container != block and container not in linears
        outputs = (last,) if linears else ()
        source, sink = (container, container) if inside else (linears[0], last)
        return FeedForward(block, source, sink, tuple(inputs), outputs)

    def feed_forward_linears(self, block: str) -> list[str]:
        """Paths of the block's linear maps that belong to no attention."""
        own = {p for a in self.attentions for p in (a.query, a.key, a.value, a.fused, a.output) if p}
        cores = tuple(a.path + "." for a in self.attentions)
        return [p for p in self.linears if p.startswith(block + ".") and p not in own and not p.startswith(cores)]

    @cached_property
    def expert_parameters(self) -> list[tuple[str, str]]:
        """Stacked expert matrices held as raw 3-D parameters: (module path, parameter name)."""
        plain = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, nn.RNNBase)
        return [
            (path, name)
            for path, name, parameter in self.parameters()
            if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(self.modules[path], plain)
        ]

    @cached_property
    def head(self) -> str | None:
        """The output head: the last linear map, when it lies outside every block."""
        return next((path for path in self.linears[-1:] if self.block_of(path) is None), None)


def _common_path(paths: list[str]) -> str:
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
