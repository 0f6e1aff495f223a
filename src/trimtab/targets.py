"""Targets: roles, patterns and functions, resolved to places in a model. Every clause must match, or it is an error.

Grammar of a string: clauses joined by `|` (union) and `-` (without, blanks around it). A clause is a role
(`attention`), a name or glob over module names (`q_proj`, `encoder.*.dense`), or `re:` and a regular expression;
`[first:last]` behind it keeps the blocks first … last-1. `module:parameter` names one parameter; `=` in front takes a
module's name whole, whatever role or longer name it also fits. What begins with `re:` or `=` takes all that follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from trimtab.errors import TargetError, brief, suggestion
from trimtab.method import Targets
from trimtab.structure import Attention, Convolution, Structure, is_linear, is_norm

_HALVES = re.compile(r"(?s)^((?:|.*?(?:\||\s-\s))\s*(?=re:|=)|.*)(.*)$")  # the second takes all that follows
_ADVICE = " 're:' and '=' take all that follows: write them last, or give a tuple of targets."
_CLAUSE = re.compile(r"^(?P<name>.+?)(\[(?P<first>\d{0,9}):(?P<last>\d{0,9})\])?$")


@dataclass(frozen=True)
class Item:
    """One place: a module, or one parameter of it."""

    path: str
    parameter: str | None = None

    def __str__(self) -> str:
        return self.path if self.parameter is None else f"{self.path}:{self.parameter}"


def _paths(names: Iterable[str | None]) -> list[Item]:
    return [Item(name) for name in names if name]


def _projections(part: Attention) -> list[Item]:
    if part.query is None and part.fused is None:  # nn.MultiheadAttention keeps raw parameters
        return [Item(part.path, "in_proj_weight"), Item(part.path + ".out_proj", "weight")]
    return _paths((part.fused, part.query, part.key, part.value, part.output))


def _raw_projections(s: Structure) -> dict[str, Item]:
    """Projections that no module of their own computes, by the path of the module that holds them."""
    return {i.path: i for a in s.attentions for i in _projections(a) if i.parameter is not None}


def _parameters(s: Structure, wanted: Callable[[str, nn.Parameter], bool]) -> list[Item]:
    return [Item(path, name) for path, name, parameter in s.parameters() if wanted(name, parameter)]


def _operations(s: Structure) -> list[Item]:
    raw = _raw_projections(s)
    calls = {p for p, m in s.modules.items() if is_linear(m) or isinstance(m, Convolution) or is_norm(m)} - {s.head}
    return [raw.get(path, Item(path)) for path in s.modules if path in calls or path in raw]


def _all_linear(s: Structure) -> list[Item]:
    raw = _raw_projections(s)
    return [Item(path) for path in s.linears if path != s.head and path not in raw] + list(raw.values())


ROLES: dict[str, Callable[[Structure], list[Item]]] = {
    "all-linear": _all_linear,
    "attention": lambda s: [i for a in s.attentions for i in _projections(a)],
    "attention-core": lambda s: _paths(a.path for a in s.attentions),
    "query": lambda s: _paths(a.query or a.fused for a in s.attentions),
    "key": lambda s: _paths(a.key or a.fused for a in s.attentions),
    "value": lambda s: _paths(a.value or a.fused for a in s.attentions),
    "attention-output": lambda s: [Item(a.output or a.path) for a in s.attentions],
    "mlp": lambda s: _paths(p for f in s.feed_forwards for p in s.feed_forward_linears(f.block)),
    "mlp-input": lambda s: _paths(p for f in s.feed_forwards for p in f.inputs),
    "mlp-output": lambda s: _paths(p for f in s.feed_forwards for p in f.outputs),
    "feed-forward": lambda s: _paths(f.sink for f in s.feed_forwards),
    "operation": _operations,
    "experts": lambda s: [Item(path, name) for path, name in s.expert_parameters],
    "norm": lambda s: [Item(path) for path, module in s.modules.items() if is_norm(module)],
    "embedding": lambda s: [Item(path) for path, module in s.modules.items() if isinstance(module, nn.Embedding)],
    "convolution": lambda s: [Item(path) for path, module in s.modules.items() if isinstance(module, Convolution)],
    "block": lambda s: _paths(s.blocks),
    "head": lambda s: _paths([s.head]),
    "bias": lambda s: _parameters(s, lambda name, p: name.endswith("bias") and p.dim() == 1),
    "all": lambda s: _parameters(s, lambda name, p: True),
}


def resolve(structure: Structure, targets: Targets) -> list[Item]:
    """Return the items that the targets name, in order of registration; raises TargetError.

    `targets` is a string (see the module's grammar), a tuple of strings (union), or a function (name, module) -> bool.
    """
    if callable(targets):
        try:
            found = [Item(path) for path, module in structure.modules.items() if path and targets(path, module)]
        except Exception as error:
            raise TargetError(f"the target function {brief(targets)} failed: {error}.") from error
        if not found:
            raise TargetError("the target function accepted no module; `trimtab plan --sites` lists what there is.")
        return found
    expressions = (targets,) if isinstance(targets, str) else targets
    if not expressions:
        raise TargetError("no targets were given.")
    found = [item for expression in expressions for item in _evaluate(structure, expression)]
    return list(dict.fromkeys(found))


def _evaluate(structure: Structure, expression: str) -> list[Item]:
    items: list[Item] = []
    for sign, clause in split_clauses(expression):
        matched = _match(structure, clause)
        if sign == "|":
            items += matched
            continue
        kept = [item for item in items if not any(_covers(other, item) for other in matched)]
        if len(kept) == len(items):
            raise TargetError(f"target {expression!r}: {clause!r} removes nothing from what stands before it.")
        items = kept
    if not items:
        raise TargetError(f"target {expression!r} leaves nothing.")
    return items


def _covers(outer: Item, inner: Item) -> bool:
    """Say whether one item is the other, or a module that holds it."""
    return outer == inner or (outer.parameter is None and f"{inner.path}.".startswith(f"{outer.path}."))


def split_clauses(expression: str) -> list[tuple[str, str]]:
    """Return the clauses of an expression, each with the operator in front of it; raises TargetError."""
    before, whole = _HALVES.findall(expression)[0]
    *others, last = re.split(r"\s*(\||(?<=\s)-(?=\s))\s*", before.lstrip())
    first, *rest = (*others, last.strip() + whole)
    clauses = [("|", first), *zip(rest[::2], rest[1::2], strict=True)]
    if not first or first == "-":
        raise TargetError(f"target {expression!r} does not start with a clause.")
    if not all(clause for _, clause in clauses):
        raise TargetError(f"target {expression!r} ends with an operator.")
    return clauses


def _match(structure: Structure, clause: str) -> list[Item]:
    parsed = None if clause.startswith(("re:", "=")) else _CLAUSE.match(clause)
    name = parsed["name"] if parsed else clause
    items = ROLES[name](structure) if name in ROLES else _named(structure, name)
    if not items:
        names = [*ROLES, *(path for path in structure.modules if path)]
        if name in ROLES:
            there = ", ".join(repr(role) for role, find in ROLES.items() if find(structure))
            raise TargetError(f"target {clause!r}: this model has no part in the role {name!r}; it has {there}.")
        hint = _ADVICE if name.startswith("re:") or "|" in name else suggestion(name, names)
        raise TargetError(f"target {clause!r}: no module or role is called {name!r}.{hint} See `trimtab plan --sites`.")
    if parsed is None or parsed["first"] is None:
        return items
    return _in_blocks(structure, clause, items, parsed["first"], parsed["last"])


def _in_blocks(structure: Structure, clause: str, items: list[Item], first: str, last: str) -> list[Item]:
    count = 1 + max((structure.block_index(block) or 0 for block in structure.blocks), default=-1)
    low, high = int(first or 0), int(last or count)
    if not 0 <= low < high <= count:
        raise TargetError(f"target {clause!r}: the model has the blocks 0 to {count - 1}, not {low} to {high - 1}.")
    kept = [i for i in items if (index := structure.block_index(i.path)) is not None and low <= index < high]
    if not kept:
        raise TargetError(f"target {clause!r}: nothing of it lies in the blocks {low} to {high - 1}.")
    return kept


def _named(structure: Structure, name: str) -> list[Item]:
    module_name, _, parameter = name.partition(":") if not name.startswith("re:") else (name, "", "")
    if module_name.startswith("re:"):
        try:
            pattern = re.compile(module_name[3:])
        except re.error as error:
            raise TargetError(f"target {name!r} is not a regular expression: {error}.{_ADVICE}") from error
        paths = [path for path in structure.modules if path and pattern.fullmatch(path)]
    elif module_name.startswith("="):
        paths = [path for path in structure.modules if path == module_name[1:]]
    else:
        paths = [""] if parameter and not module_name else [p for p in structure.modules if p and _fits(p, module_name)]
    if not parameter:
        return [Item(path) for path in paths]
    holders = [path for path in paths if structure.modules[path]._parameters.get(parameter) is not None]
    if paths and not holders:
        have = sorted({key for path in paths for key in structure.modules[path]._parameters})
        raise TargetError(f"target {name!r}: no such parameter." + suggestion(parameter, have or ["(none)"]))
    return [Item(path, parameter) for path in holders]


def _fits(path: str, pattern: str) -> bool:
    return path == pattern or fnmatchcase(path, pattern) or fnmatchcase(path, "*." + pattern)
