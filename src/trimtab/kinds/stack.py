"""Stack methods: run beside the list of blocks, or rewrite it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf
from trimtab.kinds.activation import change_primary, first_tensor, site_at
from trimtab.kinds.edits import Edit
from trimtab.kinds.tokens import AttentionCall, _AttentionTap
from trimtab.method import Method, Targets
from trimtab.structure import Structure
from trimtab.targets import resolve


@dataclass(frozen=True)
class BlockSite:
    """One block beside which a side network runs: its place among the `count` chosen blocks,
    its width, and whether attention runs inside."""

    path: str
    index: int
    count: int
    features: int
    attends: bool

    def __str__(self) -> str:
        return self.path

    @property
    def owner(self) -> str:
        """The module whose forward is wrapped."""
        return self.path

    @property
    def key(self) -> str:
        """Distinguishes this site's leaf on its target."""
        return ""

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

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        entering = first_tensor(args, kwargs)
        seen: list[AttentionCall] = []
        with torch.no_grad(), _AttentionTap(_recorder(seen)):
            output = call(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        previous = self.__dict__["previous"]
        stream = None if previous is None else previous.stream
        if previous is not None:
            previous.stream = None
        state = self(entering, hidden, stream, seen[0] if seen else None)
        if not self.site.last:
            self.stream = state
            return output
        return change_primary(output, lambda _: state.to(hidden.dtype))

    def forward(
        self, entering: Tensor, hidden: Tensor, stream: Tensor | None, attention: AttentionCall | None
    ) -> Tensor:
        """Return the side state after this block (or, at the last block, its projection to the base's width)."""
        return self.method.side(self, entering, hidden, stream, attention)

    def edits(self) -> list[Edit]:
        """A side network has no weight to be folded into."""
        raise AttachError(f"{type(self.method).__name__} cannot be merged: {self.method.capabilities.merge_reason}.")


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
        attends = [any(a.path.startswith(path + ".") for a in structure.attentions) for path in paths]
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
