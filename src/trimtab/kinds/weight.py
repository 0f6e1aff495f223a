"""Weight methods: W → W′ (and b → b′) of a linear map, convolution, embedding, or a raw parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Part
from trimtab.errors import SettingError, TargetError
from trimtab.hooks import Call, Leaf, base_class
from trimtab.kinds.layouts import ConvolutionLayout, EmbeddingLayout, Layout, callable_alone, layout_of
from trimtab.kinds.lowrank import Factors as Factors
from trimtab.kinds.lowrank import add_update, linear_with_update
from trimtab.kinds.placement import refuse_part_of_fused
from trimtab.kinds.sites import Companion, other_holders
from trimtab.kinds.transforms import transformed
from trimtab.merge import Edit
from trimtab.method import Method, Targets
from trimtab.quantized import at_least_single, dense_weight, is_packed, linear_features
from trimtab.structure import Structure
from trimtab.targets import Item, resolve


@dataclass(frozen=True)
class ParameterSite:
    """One weight: the parameter of a module, the module whose forward reads it, and whether a bias is added there."""

    path: str
    parameter: str
    owner: str
    shape: tuple[int, ...]
    layout: Layout
    called: bool
    whole: bool = False
    has_bias: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.parameter}" if self.path else self.parameter

    @property
    def key(self) -> str:
        """The name that distinguishes this site's leaf on its target."""
        return (
            ""
            if self.called
            else "_" + str(self).removeprefix(self.owner).strip(".:").replace(".", "_").replace(":", "_")
        )

    @property
    def leaf_class(self) -> type[Leaf]:
        """The leaf beside the module's call, or the one that replaces a weight which is only read."""
        return CallLeaf if self.called else ReadLeaf

    @property
    def in_features(self) -> int:
        """Width of the weight's input (columns of the matrix)."""
        return self.layout.in_features

    @property
    def out_features(self) -> int:
        """Width of the weight's output (rows of the matrix)."""
        return self.layout.out_features

    def matrices(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of one (rows, columns) matrix for each of the weight's own matrices."""
        return (*self.layout.lead, rows, columns)

    def rank(self, rank: int) -> int:
        """Check a rank against this weight; raises SettingError when it is larger than the layer."""
        limit = min(self.in_features, self.out_features)
        split = self.layout.rank(rank)
        if split > limit:
            raise SettingError(
                f"rank {rank} is larger than the layer {str(self)!r} of shape {self.out_features}×{self.in_features}; "
                f"use at most {limit * rank // split}, or leave this layer out of the targets."
            )
        return split


def parameter_site(structure: Structure, item: Item, *, whole: bool = False) -> ParameterSite:
    """Return the site of one item; raises TargetError where it is not a weight."""
    module = structure.modules[item.path]
    parameter = item.parameter or "weight"
    if not whole or module._parameters.get(parameter) is None:
        layout = layout_of(item.path, module, item.parameter)
    else:
        layout = Layout((), *_flat(module._parameters[parameter]))
    called = not whole and callable_alone(module) and (item.parameter is None or _own_weight(module, parameter))
    owner = item.path if callable_alone(module) else item.path.rsplit(".", 1)[0]
    weight = module._parameters[parameter]
    assert weight is not None
    packed = is_packed(module, parameter)
    shape = (layout.out_features, layout.in_features) if packed else tuple(weight.shape)
    has_bias = called and module._parameters.get("bias") is not None
    return ParameterSite(item.path, parameter, owner, shape, layout, called, whole, has_bias)


def _flat(weight: Tensor | None) -> tuple[int, int]:
    assert weight is not None
    return (int(weight.shape[0]) if weight.dim() else 1), int(weight[0].numel()) if weight.dim() and len(weight) else 1


def _own_weight(module: nn.Module, parameter: str) -> bool:
    kinds = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return parameter == "weight" and (linear_features(module) is not None or isinstance(module, kinds))


class WeightLeaf(Leaf):
    """The tensors of a weight method at one site."""

    site: ParameterSite
    method: WeightMethod

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight: the target itself, unless another module reads it."""
        inside = self.site.path.removeprefix(self.site.owner).strip(".")
        return self.target.get_submodule(inside)

    def weight(self) -> Tensor:
        """Return the base weight as a dense float matrix (*lead, out, in); not recorded by autograd."""
        stored = dense_weight(self.holder, self.site.parameter)
        return self.site.layout.matrix(stored)

    def bias(self) -> Tensor | None:
        """Return the base bias, or None."""
        return self.holder._parameters.get("bias")

    def stored(self, matrix: Tensor) -> Tensor:
        """Bring a matrix (*lead, out, in) to the shape of the base's tensor, or of its numbers where it is packed."""
        return self.site.layout.stored(matrix, dense_weight(self.holder, self.site.parameter))

    def edits(self) -> list[Edit]:
        """Return the base tensors after merging, at least in float32: W′, and b′ where the method changes it."""
        holder = self.holder
        value = self.stored(self.method.weight(self, at_least_single(self.weight())))
        edits = [Edit(holder, self.site.path, self.site.parameter, value, for_all_holders=self.site.whole)]
        bias = self.bias() if self.site.called else None
        new_bias = self.method.bias(self, bias)
        if new_bias is not None and new_bias is not bias:
            edits.append(Edit(holder, self.site.path, "bias", new_bias))
        return edits


class CallLeaf(WeightLeaf):
    """A leaf beside the call of a module that applies its own weight."""

    beside = True

    def __init__(self, part: Part, site: Any, target: nn.Module) -> None:
        super().__init__(part, site, target)
        plain = base_class(target).forward is nn.Linear.forward and not is_packed(target)
        given, base = type(self.method), WeightMethod
        by_factors = given.factors is not base.factors and given.forward is base.forward
        self.fusible = plain and (by_factors or given.fused is not base.fused)
        self.padding = target.padding_idx if isinstance(target, nn.Embedding) else None

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if self._fused(call):
            return self(x)  # type: ignore[no-any-return]
        return self(x, call(*args, **kwargs))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the changed output; without `y`, the base product is computed here too."""
        if y is None and not transformed():
            return self.method.fused(self, x)
        y = nn.Linear.forward(self.target, x) if y is None else y  # type: ignore[arg-type]
        output, still = self.method.forward(self, x, y), self.padding
        # A table learns nothing from padding.
        return output if still is None else torch.where((x == still).unsqueeze(-1), output.detach(), output)

    def _fused(self, call: Any) -> bool:
        """One function for base and update: a plain float linear map, this leaf innermost, no autocast."""
        innermost = getattr(call.func, "__self__", None) is None
        return self.fusible and innermost and not torch.is_autocast_enabled(self.target.weight.device.type)  # type: ignore[arg-type]


class ReadLeaf(WeightLeaf):
    """A leaf whose weight is read, not called: its effective value is visible only inside the owner's forward."""

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return _with_value(self.holder, self.site.parameter, self, call, args, kwargs)

    def companions(self, structure: Structure, previous: Leaf | None) -> Iterator[tuple[str, str, Leaf]]:
        if not self.site.whole:
            return
        for path, holder, name in other_holders(structure, self.holder, self.site.parameter):
            alias = AliasLeaf(self, holder)
            alias.parameter = name
            yield path, f"_alias_{name}", alias

    def read_through(self) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
        return [(self.holder, self.site.path, (self.site.parameter,))]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the effective tensor in the storage orientation and dtype of `weight`."""
        layout = self.site.layout
        changed = self.method.weight(self, layout.matrix(weight))
        return layout.stored(changed, weight).to(weight.dtype)


class AliasLeaf(Companion):
    """Lets another holder of the same tied parameter read the effective value too; the owner's edit reaches it."""

    parameter: str

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return _with_value(self.target, self.parameter, self.partner, call, args, kwargs)

    def read_through(self) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
        return [(self.target, str(self.site), (self.parameter,))]


def _with_value(holder: Any, name: str, change: Call, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call while `holder.name` reads as its changed value."""
    before = holder._trimtab_values
    holder._trimtab_values = {**before, name: change(getattr(holder, name))}
    try:
        return call(*args, **kwargs)
    finally:
        holder._trimtab_values = before


@dataclass(frozen=True)
class WeightMethod(Method):
    """A method that changes a weight. Give `delta` (or `weight`), and `factors` or `forward` where that is faster."""

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        found = [parameter_site(structure, item) for item in resolve(structure, targets)]
        for site in found:
            refuse_part_of_fused(self, structure, site.path)
            self.check_site(site)
        return found

    def check_site(self, site: ParameterSite) -> None:
        """Refuse a site this method cannot act on; raises TargetError."""

    def delta(self, leaf: WeightLeaf) -> Tensor:
        """Reference: return ΔW (*lead, out, in)."""
        raise NotImplementedError

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        """Reference: return W′ from W (*lead, out, in); W + ΔW unless the method is not additive."""
        return weight + self.delta(leaf)

    def bias(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor | None:
        """Reference: return b′ from b."""
        return bias

    def factors(self, leaf: WeightLeaf) -> Factors | None:
        """Fast path: return ΔW as a product, or None where this method has none."""
        return None

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        """Return the output of a plain float `nn.Linear` from its input alone: base product and update together."""
        target: Any = leaf.target
        factors = self.factors(leaf)
        assert factors is not None
        return linear_with_update(x, target.weight, target.bias, factors, leaf.training)

    def unfused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        """Return what `forward` makes of the base's own product, for a `fused` that cannot do better."""
        return self.forward(leaf, x, nn.Linear.forward(leaf.target, x))  # type: ignore[arg-type]

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        """Return the output for input x, where y is the base module's output."""
        factors = self.factors(leaf)
        if factors is None:
            return y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype)
        return add_update(leaf.site.layout, leaf.target, x, y, factors, leaf.training)


def reference_update(leaf: WeightLeaf, x: Tensor, delta: Tensor) -> Tensor:
    """Apply a dense ΔW (*lead, out, in) as the target applies its weight."""
    layout, target = leaf.site.layout, leaf.target
    if x.is_floating_point():
        x = x.to(delta.dtype)
    if isinstance(layout, ConvolutionLayout):
        weight: Any = target.weight
        return target._conv_forward(x, layout.stored(delta, weight), None)  # type: ignore[no-any-return,operator]
    return layout.down(target, x, delta)


def refuse_embedding(method: str, site: ParameterSite) -> None:
    """Refuse an embedding table for a method that needs real-valued inputs; raises TargetError."""
    if isinstance(site.layout, EmbeddingLayout):
        raise TargetError(f"{method} is not defined for the embedding {site.path!r}; leave it out of the targets.")
