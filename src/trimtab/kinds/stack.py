"""Stack methods: run beside the list of blocks, or rewrite it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf
from trimtab.kinds.activation import change_primary, first_tensor, site_at
from trimtab.kinds.recomputation import in_backward
from trimtab.kinds.sites import ModuleSite
from trimtab.kinds.tokens import AttentionCall, AttentionTap, attention_site, untapped
from trimtab.method import Method, Targets
from trimtab.structure import Structure
from trimtab.targets import resolve


@dataclass(frozen=True)
class BlockSite(ModuleSite):
    """One block beside which a side network runs: its place among the `count` chosen blocks,
    its width, and whether attention runs inside."""

    index: int
    count: int
    features: int
    attends: bool

    @property
    def leaf_class(self) -> type[Leaf]:
        return BlockLeaf

    @property
    def first(self) -> bool:
        """Whether the side network starts here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether the side network's result leaves here."""
        return self.index == self.count - 1


class BlockLeaf(Leaf):
    """The side block beside one frozen block; the base runs without gradient, so nothing of it is saved."""

    site: BlockSite
    method: StackMethod
    stream: Tensor | None = None

    def companions(self, structure: Structure, previous: Leaf | None) -> Iterator[tuple[str, str, Leaf]]:
        self.__dict__["previous"] = previous  # a reference, not a child
        return iter(())

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        entering = first_tensor(args, kwargs)
        seen: list[AttentionCall] = []
        with torch.no_grad(), AttentionTap(_recorder(seen)):
            output = call(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        self._check(hidden, seen)
        state = self(entering, hidden, self._previous_stream(), seen[0] if seen else None)
        if not self.site.last:
            self.stream = state
            return output
        return change_primary(output, lambda _: state.to(hidden.dtype))

    def _previous_stream(self) -> Tensor | None:
        """Take the side state from the block before, which then lets go of it."""
        previous = self.__dict__["previous"]
        if previous is None:
            return None
        stream, previous.stream = previous.stream, None
        if stream is None:
            raise AttachError(
                f"block {self.site.path!r} ran without the block before it, so its side state is missing: activation "
                f"checkpointing recomputes single blocks. A side network keeps nothing of the base for the backward "
                f"pass; switch checkpointing off."
            )
        return stream  # type: ignore[no-any-return]

    def _check(self, hidden: Any, seen: list[AttentionCall]) -> None:
        """Stop where the side network would see another thing than the block does."""
        method, path = type(self.method).__name__, self.site.path
        if in_backward():
            raise AttachError(
                f"activation checkpointing recomputes block {path!r} in the backward pass, which {method} does not "
                f"need: the base runs without gradient and keeps nothing. Switch checkpointing off."
            )
        if torch.is_grad_enabled() and any(cls.__name__ == "FSDPModule" for cls in type(self.target).__mro__):
            raise AttachError(
                f"block {path!r} is sharded by itself, which frees its tensors before {method} runs backward: its "
                f"state leaves beside the block's output. Shard the whole model only."
            )
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != self.site.features:
            found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise AttachError(
                f"block {path!r} returned {found}; {method} needs a hidden state whose last axis is "
                f"{self.site.features}."
            )
        if self.site.attends and not seen:
            raise untapped(path, self.method)
        queries, keys = (seen[0].query.shape[-2], seen[0].key.shape[-2]) if seen else (0, 0)
        if queries != keys:
            raise AttachError(
                f"{method} keeps no cache of its side states, but block {path!r} attends from {queries} to {keys} "
                f"positions. Generate with use_cache=False."
            )

    def forward(
        self, entering: Tensor, hidden: Tensor, stream: Tensor | None, attention: AttentionCall | None
    ) -> Tensor:
        """Return the side state after this block (or, at the last block, its projection to the base's width)."""
        return self.method.side(self, entering, hidden, stream, attention)


def _inside(path: str, blocks: list[str]) -> bool:
    return any(path.startswith(block + ".") for block in blocks)


def _recorder(seen: list[AttentionCall]) -> Callable[[AttentionCall], Tensor]:
    def record(call: AttentionCall) -> Tensor:
        seen.append(call)
        return call.run()

    return record


@dataclass(frozen=True)
class StackMethod(Method):
    """A side network along the blocks. Give `side`."""

    def sites(self, structure: Structure, targets: Targets) -> list[BlockSite]:
        paths = [item.path for item in resolve(structure, targets) if item.path in structure.blocks]
        if not paths:
            raise TargetError(f"targets {targets!r} name no block; use 'block', or 'block[0:4]'.")
        lists = {path.rsplit(".", 1)[0] for path in paths}
        if len(lists) > 1:
            raise TargetError(
                f"a side network runs along one list of blocks, the targets name {len(lists)}: {sorted(lists)}; "
                f"choose one, for example targets='{sorted(lists)[0]}.*'."
            )
        widths = [site_at(structure, path).features for path in paths]
        if len(set(widths)) > 1:
            raise TargetError(f"a side network needs blocks of one width, the targets have {sorted(set(widths))}.")
        tapped = [attention_site(structure, part).path for part in structure.attentions if _inside(part.path, paths)]
        attends = [any(_inside(attention, [path]) for attention in tapped) for path in paths]
        count = len(paths)
        return [BlockSite(p, i, count, w, a) for i, (p, w, a) in enumerate(zip(paths, widths, attends, strict=True))]

    def side(
        self,
        leaf: BlockLeaf,
        entering: Tensor,
        hidden: Tensor,
        stream: Tensor | None,
        attention: AttentionCall | None,
    ) -> Tensor:
        """Return the next side state."""
        raise NotImplementedError
