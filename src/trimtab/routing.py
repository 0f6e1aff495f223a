"""Routing: one adapter per row of the batch, in inference and in training, safe under activation checkpointing."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.attachment import Attached, attached_to
from trimtab.errors import AttachError, brief, suggestion
from trimtab.hooks import Call, Leaf, through
from trimtab.kinds.recomputation import in_backward
from trimtab.method import fits

_tickets = itertools.count(1)


@dataclass(frozen=True)
class Route:
    """The adapter of each row (None: the base), grouped; `ticket` tells one `with` block from another."""

    rows: tuple[str | None, ...]
    ticket: int
    groups: dict[str | None, Tensor]
    inverse: Tensor
    repeats: int = 1

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

    def checked(self, output: Any) -> Any:
        """Return the model's output; stops where its batch is not that of the rows which the route names."""
        entries = _first_length(output)
        if entries not in (None, len(self.rows), len(self.rows) * self.repeats):
            raise AttachError(
                f"route was given {len(self.rows)} rows, but the model returned {entries}: name one adapter (or None) "
                f"for each row of the batch, or route(…, repeats=n) where each stands for n (the beams of generate)."
            )
        return output

    def only(self, name: str | None) -> Route:
        """Return the route of a batch that holds this adapter's rows alone."""
        order = torch.arange(len(self.groups[name]))
        return Route((name,) * len(order), self.ticket, {name: order}, order)


@dataclass
class Routing:
    """The routing state of one model."""

    route: Route | None = None
    last_routed: bool = False
    of_backward: int | None = None  # the ticket of the forward whose backward runs

    @property
    def engaged(self) -> bool:
        """Whether calls must go through `run`: inside a route, or in a recomputation that may have missed one."""
        repeats = self.last_routed or self.of_backward is not None
        return self.route is not None or (repeats and in_backward())

    def before_forward(self) -> None:
        """A forward of the whole model begins."""
        self.last_routed, self.of_backward = self.route is not None, None

    def __call__(
        self, module: nn.Module, call: Call, leaves: list[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one hooked module: by rows where a route is set, through each of its leaves elsewhere."""
        if module.__dict__["_trimtab_attached"].root is module and not torch.compiler.is_compiling():
            self.before_forward()
        if self.engaged:
            return self.run(module, call, leaves, args, kwargs)
        return through(leaves, call)(*args, **kwargs)

    def run(
        self, module: nn.Module, call: Call, leaves: list[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one hooked module for a routed batch."""
        if self.route is None:
            raise AttachError(
                "activation checkpointing recomputes a routed forward after its `with trimtab.route(...)` has ended: "
                "the gradients would be those of other adapters. Run backward inside the `with`."
            )
        route, is_root = self.route, module.__dict__["_trimtab_attached"].root is module
        if in_backward() and self.of_backward != route.ticket:
            raise AttachError(
                "activation checkpointing recomputes a forward that did not run in this `with trimtab.route(...)` "
                "block, or not through the model's own call: run each backward inside its own block."
            )
        if not leaves:
            output = call(*args, **kwargs)
            return self._ticketed(route.checked(output), route) if is_root else output
        fixed = next((leaf for leaf in leaves if not leaf.method.promises().routable), None)
        if fixed is not None:
            raise AttachError(
                f"{type(fixed.method).__name__} (adapter {fixed.adapter.name!r}) cannot be routed by rows."
            )
        apply = _beside if all(leaf.beside for leaf in leaves) else functools.partial(_apart, self, module)
        output = apply(route, call, leaves, args, kwargs)
        output = route.checked(output) if is_root else output
        return self._ticketed(output, route) if is_root or isinstance(output, Tensor) else output

    def _ticketed(self, output: Any, route: Route) -> Any:
        """Let the backward from an output know the route of its forward."""
        if torch.compiler.is_compiling():  # which recomputes nothing behind our back
            return output
        if isinstance(output, Tensor) and output.requires_grad:
            return _SameRoute.apply(output, torch.tensor(route.ticket), route.ticket, self)  # type: ignore[no-untyped-call]
        if type(output) is tuple:
            return tuple(self._ticketed(item, route) for item in output)
        if isinstance(output, dict):
            for name, item in output.items():
                output[name] = self._ticketed(item, route)
        return output


class _SameRoute(torch.autograd.Function):
    """Identity whose backward tells the routing whose forward it belongs to.

    The ticket is kept twice: as an attribute (the forward's) and as a saved tensor, which a recomputation replaces.
    Reentrant checkpointing records nothing in its first pass; there, the ticket of the model's own output counts.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, ticket: Tensor, own: int, routing: Routing) -> Tensor:
        ctx.save_for_backward(ticket)
        ctx.own, ctx.routing = own, routing
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (ticket,) = ctx.saved_tensors
        if int(ticket) != ctx.own:
            raise AttachError(
                "activation checkpointing recomputed a routed forward under another `with trimtab.route(...)` block; "
                "run each backward inside its own block."
            )
        ctx.routing.of_backward = ctx.own
        return grad, None, None, None


def _members(leaves: list[Leaf], name: str | None) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.adapter.name == name and leaf.acts]


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
    routing: Routing, module: nn.Module, route: Route, call: Call, leaves: list[Leaf],
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """Run the module once for each adapter, on that adapter's rows; so do the modules inside it."""
    if isinstance(module, nn.RNNBase):
        raise AttachError(
            f"a batch cannot be routed by rows through adapters inside {type(module).__name__}, which returns states "
            f"whose first axis is layers, not rows; leave its weights out of the targets, or run each adapter's rows "
            f"by themselves."
        )
    _refuse_cache(module, [*args, *kwargs.values()])
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
    """Return each adapter's part of an argument: its rows of a tensor, also inside tuples; all of anything else."""
    if type(value) is tuple:
        return list(zip(*(_shares(route, item) for item in value), strict=True)) or [()] * len(route.groups)
    rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) > 1  # one row is every row's
    return route.split(value) if rows else [value] * len(route.groups)


def _refuse_cache(module: nn.Module, values: list[Any]) -> None:
    found = next((type(value).__name__ for value in values if "Cache" in type(value).__name__), None)
    if found is not None:
        raise AttachError(
            f"a batch cannot be routed by rows through adapters around a {type(module).__name__} that is given a cache "
            f"({found}), which holds the keys and values of all rows; run the model with use_cache=False."
        )


def _first_length(output: Any) -> int | None:
    """Return the first axis of the first tensor that has one, None where there is none (a loss alone)."""
    if isinstance(output, Tensor):
        return len(output) if output.dim() else None
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return next((length for value in values if (length := _first_length(value)) is not None), None)


def route(model: nn.Module, rows: Sequence[str | None], repeats: int = 1) -> contextlib.AbstractContextManager[None]:
    """Inside the `with`, row i of every batch goes through the adapter `rows[i]` (None: the base), vectorised.

    `repeats`: a batch may also hold each row so many times in succession, as generate does for beams. Run backward
    inside the same `with` when activation checkpointing recomputes. Raises AttachError.
    """
    if not fits(rows, list | tuple) or not rows:
        raise AttachError(f"route: rows is a list with an adapter's name or None for each row, found {brief(rows)}.")
    if type(repeats) is not int or repeats < 1:
        raise AttachError(f"route: repeats must be a whole number from 1, found {brief(repeats)}.")
    attached = attached_to(model)
    if attached is None:
        raise AttachError("route: no adapter is attached to this model (pass the model that `attach` was called on).")
    for name in rows:
        if name is not None and name not in attached.adapters:
            raise AttachError(f"route: there is no adapter {name!r}." + suggestion(name, attached.adapters))
        if name is not None and not attached.adapters[name].active:
            raise AttachError(f"route: adapter {name!r} is inactive or disabled; set its `active` to True first.")
    return _routed(attached, rows, repeats)


def _new_routing(root: nn.Module) -> Routing:
    """Rows are told apart along the first axis: a module that says its batch lies elsewhere cannot be routed."""
    for path, module in root.named_modules():
        if getattr(module, "batch_first", True) is False:
            raise AttachError(
                f"a batch cannot be routed by rows through {path!r}, whose first axis is positions, not rows; build it "
                f"with batch_first=True."
            )
    return Routing()


@contextlib.contextmanager
def _routed(attached: Attached, rows: Sequence[str | None], repeats: int) -> Iterator[None]:
    attached.router = routing = attached.router or _new_routing(attached.root)
    assert isinstance(routing, Routing)
    before = routing.route
    groups = {name: torch.tensor([i for i, row in enumerate(rows) if row == name]) for name in dict.fromkeys(rows)}
    inverse = torch.argsort(torch.cat(list(groups.values())))
    routing.route = Route(tuple(rows), next(_tickets), groups, inverse, repeats)
    try:
        yield
    finally:
        routing.route, routing.of_backward = before, None
