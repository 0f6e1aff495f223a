"""Token methods: added keys and values at every attention, or added inputs; independent of cache classes.

The attention tap intercepts scaled-dot-product attention inside one attention module's forward. A forward in which it
was never called (eager attention) is an error, never silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf
from trimtab.kinds.sites import ModuleSite
from trimtab.method import Method, Targets
from trimtab.quantized import linear_features
from trimtab.structure import Attention, Structure
from trimtab.targets import resolve


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one scaled-dot-product attention: query (B, H, L, d), key and value (B, H or groups, S, d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self) -> Tensor:
        """Compute the attention."""
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            self.attn_mask,
            self.dropout_p,
            self.is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )

    def prepend(self, key: Tensor, value: Tensor) -> AttentionCall:
        """Return the call with l more visible positions in front; key (l, width_k), value (l, width_v)."""
        return dataclasses.replace(
            self,
            key=torch.cat([self._positions(key, self.key), self.key], dim=2),
            value=torch.cat([self._positions(value, self.value), self.value], dim=2),
            attn_mask=self._wider_mask(key.shape[0]),
            is_causal=False,
        )

    def _positions(self, table: Tensor, like: Tensor) -> Tensor:
        """Shape (l, width) as (B, heads, l, d); grouped heads repeat as the model repeated its own."""
        batch, heads, _, size = like.shape
        own = table.view(table.shape[0], -1, size).transpose(0, 1).to(like.dtype)  # (own heads, l, d)
        return own.repeat_interleave(heads // own.shape[0], dim=0).expand(batch, -1, -1, -1)

    def _wider_mask(self, length: int) -> Tensor | None:
        mask = self.attn_mask
        if self.is_causal:
            mask = torch.ones(self.query.shape[2], self.key.shape[2], dtype=torch.bool, device=self.key.device).tril()
        if mask is None:
            return None
        return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)


class AttentionTap(TorchFunctionMode):
    """Hands every scaled-dot-product attention inside one forward to `change`."""

    def __init__(self, change: Callable[[AttentionCall], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.change(AttentionCall(*args, **(kwargs or {})))


def untapped(path: str, method: Method) -> AttachError:
    """Return the error of a forward in which the attention at `path` could not be seen."""
    return AttachError(
        f"the attention {path!r} never called scaled_dot_product_attention, so {type(method).__name__} would do "
        f"nothing. Load the model with attn_implementation='sdpa'."
    )


@dataclass(frozen=True)
class AttentionSite(ModuleSite):
    """One attention module, with the widths of its keys and values over all their heads."""

    key_features: int
    value_features: int

    @property
    def leaf_class(self) -> type[Leaf]:
        return AttentionLeaf


def attention_site(structure: Structure, part: Attention) -> AttentionSite:
    """Return the site of one attention; raises TargetError for torch's own fused module."""
    if isinstance(structure.modules[part.path], nn.MultiheadAttention):
        raise TargetError(
            f"{part.path!r} is an nn.MultiheadAttention, whose attention cannot be tapped; "
            f"this method needs a model that calls scaled_dot_product_attention itself."
        )
    if part.fused is not None:
        features = linear_features(structure.modules[part.fused])
        assert features is not None
        return AttentionSite(part.path, features[1] // 3, features[1] // 3)
    key, value = (linear_features(structure.modules[p]) for p in (part.key, part.value) if p is not None)
    assert key is not None
    assert value is not None
    return AttentionSite(part.path, key[1], value[1])


class AttentionLeaf(Leaf):
    """The tensors of a method that acts inside one attention."""

    site: AttentionSite
    method: AttentionMethod

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        tap = AttentionTap(self)
        with tap:
            output = call(*args, **kwargs)
        if tap.calls == 0:
            raise untapped(self.site.path, self.method)
        return output

    def forward(self, call: AttentionCall) -> Tensor:
        """Return the changed attention output (B, H, L, d)."""
        return self.method.attend(self, call)


@dataclass(frozen=True)
class AttentionMethod(Method):
    """A method that acts on the queries, keys and values of attentions. Give `attend`."""

    def sites(self, structure: Structure, targets: Targets) -> list[AttentionSite]:
        items = resolve(structure, targets)
        found = [a for a in structure.attentions if any(self._belongs(structure, a, item.path) for item in items)]
        if not found:
            raise TargetError(f"targets {targets!r} name no attention; use 'attention-core', or 'attention-core[0:2]'.")
        return [attention_site(structure, part) for part in found]

    def _belongs(self, structure: Structure, part: Attention, path: str) -> bool:
        return path in (part.path, part.query, part.key, part.value, part.fused, part.output)

    def attend(self, leaf: AttentionLeaf, call: AttentionCall) -> Tensor:
        """Return the attention output (B, H, L, d) for the call."""
        raise NotImplementedError
