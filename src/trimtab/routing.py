"""Routing: one adapter per row of the batch, in inference and in training, safe under activation checkpointing."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import AttachError, suggestion
from trimtab.hooks import Call, Leaf

if TYPE_CHECKING:
    from trimtab.attachment import Attached

_tickets = itertools.count(1)


@dataclass(frozen=True)
class Route:
    """The adapter of each row (None: the base), grouped; `ticket` tells one `with` block from another."""

    rows: tuple[str | None, ...]
    ticket: int
    groups: dict[str | None, Tensor]
    inverse: Tensor

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return the rows of each adapter, in the order of `groups`; views, where the batch lies in that order."""
        sizes = [len(rows) * self._entries(tensor) for rows in self.groups.values()]
        tensor = self._arranged(tensor, torch.cat(list(self.groups.values())))
        return [tensor[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]

    def restore(self, pieces: list[Tensor]) -> Tensor:
        """Put the groups' rows back into the order of the batch."""
        return self._arranged(torch.cat(pieces), self.inverse)

    @functools.cached_property
    def _in_order(self) -> bool:
        return self.inverse.tolist() == list(range(len(self.rows)))

    def _arranged(self, tensor: Tensor, order: Tensor) -> Tensor:
        entries = self._entries(tensor)
        if self._in_order:
            return tensor
        positions = order if entries == 1 else (order.unsqueeze(1) * entries + torch.arange(entries)).view(-1)
        return tensor.index_select(0, positions.to(tensor.device))

    def _entries(self, tensor: Tensor) -> int:
        """Return how many entries of dimension 0 belong to one row: rows may be flattened with tokens."""
        rows, total = len(self.rows), tensor.shape[0]
        if total % rows:
            raise AttachError(
                f"a routed batch of {rows} rows reached a module with {total} entries in its first dimension; "
                f"the rows cannot be told apart there."
            )
        return total // rows

    def only(self, name: str | None) -> Route:
        """Return the route of a batch that holds this adapter's rows alone."""
        order = torch.arange(len(self.groups[name]))
        return Route((name,) * len(order), self.ticket, {name: order}, order)


@dataclass
class Routing:
    """The routing state of one model."""

    route: Route | None = None
    outstanding: set[int] = field(default_factory=set)
    recomputed: set[int] = field(default_factory=set)
    root_records: bool = False
    last_routed: bool = False

    @property
    def engaged(self) -> bool:
        """Whether calls must go through `run`: inside a route, or in a recomputation that may have missed one."""
        return self.route is not None or (self.last_routed and in_backward())

    def before_forward(self) -> None:
        """A forward of the whole model begins."""
        self.root_records = torch.is_grad_enabled()
        self.last_routed = self.route is not None

    def run(
        self, module: nn.Module, call: Call, leaves: list[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one hooked module for a routed batch."""
        if self.route is None:
            raise AttachError(
                "activation checkpointing recomputes a routed forward after its `with trimtab.route(...)` has ended: "
                "the gradients would be those of other adapters. Run backward inside the `with`."
            )
        self._check_recomputation(self.route)
        if not leaves:
            return call(*args, **kwargs)
        fixed = next((leaf for leaf in leaves if not leaf.method.promises().routable), None)
        if fixed is not None:
            raise AttachError(f"{type(fixed.method).__name__} (adapter {fixed.state.name!r}) cannot be routed by rows.")
        apply = _beside if all(leaf.beside for leaf in leaves) else functools.partial(_apart, self)
        output = apply(self.route, call, leaves, args, kwargs)
        if isinstance(output, Tensor) and output.requires_grad:
            return _SameRoute.apply(output, torch.tensor(self.route.ticket), self.route.ticket)  # type: ignore[no-untyped-call]
        return output

    def _check_recomputation(self, route: Route) -> None:
        """Reentrant checkpointing records nothing in its first pass; only counting shows whose forward it repeats."""
        if not torch.is_grad_enabled() and self.root_records and not in_backward():
            self.outstanding.add(route.ticket)
        if not in_backward():
            return
        self.recomputed.add(route.ticket)
        if self.outstanding - {route.ticket}:
            raise AttachError(
                "activation checkpointing recomputes a forward of another `with trimtab.route(...)` block: run each "
                "backward inside its own block, or use checkpointing with use_reentrant=False."
            )


def in_backward() -> bool:
    """Say whether this call runs inside a backward pass, where only a recomputation calls modules."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _SameRoute(torch.autograd.Function):
    """Identity whose backward stops when a recomputation ran under another route than the forward did.

    The ticket is kept twice: as an attribute (the forward's) and as a saved tensor, which a recomputation replaces.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, ticket: Tensor, own: int) -> Tensor:
        ctx.save_for_backward(ticket)
        ctx.own = own
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ticket,) = ctx.saved_tensors
        if int(ticket) != ctx.own:
            raise AttachError(
                "activation checkpointing recomputed a routed forward under another `with trimtab.route(...)` block; "
                "run each backward inside its own block."
            )
        return grad, None, None


def _members(leaves: list[Leaf], name: str | None) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.state.name == name and not leaf.state.merged]


def _beside(route: Route, call: Call, leaves: list[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Every leaf acts beside the module: the module runs once, each adapter on its own rows."""
    x = args[0] if args else next(iter(kwargs.values()))
    y = call(*args, **kwargs)
    pieces = []
    for name, own_x, piece in zip(route.groups, route.split(x), route.split(y), strict=True):
        for leaf in _members(leaves, name):
            piece = leaf(own_x, piece)
        pieces.append(piece)
    return route.restore(pieces)


def _apart(
    routing: Routing, route: Route, call: Call, leaves: list[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the module once for each adapter, on that adapter's rows; so do the modules inside it."""
    shares, named = [_shares(route, value) for value in args], {k: _shares(route, v) for k, v in kwargs.items()}
    outputs = []
    for position, name in enumerate(route.groups):
        chain = call
        for leaf in _members(leaves, name):
            chain = functools.partial(leaf.around, chain)
        routing.route = route.only(name)
        try:
            outputs.append(chain(*(s[position] for s in shares), **{k: s[position] for k, s in named.items()}))
        finally:
            routing.route = route
    return _joined(route, outputs)


def _joined(route: Route, outputs: Sequence[Any]) -> Any:
    """Put the rows of tensors together, also inside tuples; what all calls returned alike (a cache, None) stays."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return route.restore(list(outputs))
    if type(first) is tuple:
        return tuple(_joined(route, members) for members in zip(*outputs, strict=True))
    if all(output is first for output in outputs):
        return first
    raise AttachError(f"a routed module returned {type(first).__name__}, whose rows cannot be put together again.")


def _shares(route: Route, value: Any) -> list[Any]:
    """Return each adapter's part of an argument: its rows of a tensor, all of anything else."""
    return route.split(value) if isinstance(value, Tensor) and value.dim() else [value] * len(route.groups)


@contextlib.contextmanager
def route_rows(attached: Attached, rows: Sequence[str | None]) -> Iterator[None]:
    """Give each row of the batch its own adapter inside the `with`; None is the base model."""
    for name in rows:
        if name is not None and name not in attached.adapters:
            raise AttachError(f"route: there is no adapter {name!r}." + suggestion(name, attached.adapters))
    routing, before = attached.routing, attached.routing.route
    groups = {name: torch.tensor([i for i, row in enumerate(rows) if row == name]) for name in dict.fromkeys(rows)}
    inverse = torch.argsort(torch.cat(list(groups.values())))
    routing.route = Route(tuple(rows), next(_tickets), groups, inverse)
    try:
        yield
    finally:
        routing.outstanding -= routing.recomputed
        routing.route = before
