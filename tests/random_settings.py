"""Random settings, targets and arguments, drawn from what methods declare; and what must hold for each of them.

The tests run a few examples of each, the reliability report many: both through the functions of this file.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from hypothesis import strategies as st
from torch import nn

import trimtab as tt
from contract_cases import pristine
from trimtab.method import Targets

MODELS = ("bert", "llama", "gpt2", "mlp")
# Sizes between the small and the absurd would really be allocated; these are refused by every machine.
HUGE = (2**44, 2**63 - 1, 2**63, 10**30, 10**5000)
WRONG: tuple[Any, ...] = (
    None, float("nan"), float("inf"), float("-inf"), 0, -0.0, -1, 1e308, 5e-324, *HUGE, -(10**30), True, False, "", " ",
    "8", "x" * 5000, "\0", "\ud800", (), (1,), (("a", 1),), [8], {"rank": 8}, {1}, b"8", 1j, Fraction(1, 2),
    Decimal("NaN"), len, int, object(), torch.tensor(1.0), torch.tensor([1, 2]), tt.LoRA, tt.LoRA(),
)  # fmt: skip
ROLES = (
    "all-linear", "attention", "attention-core", "query", "key", "value", "attention-output", "mlp", "mlp-input",
    "mlp-output", "feed-forward", "operation", "norm", "embedding", "block", "head", "bias", "all",
)  # fmt: skip
BROKEN_TARGETS = (
    "", " ", "|", "-", "attention |", "| attention", "attention - attention", "attention - ", "attention -", "re:(",
    "re:", "re:nothing", "=", "=nothing", "[0:1]", "attention[", "attention[0:0]", "attention[1:0]", "attention[:]",
    "attention[-1:]", "attention[0:99]", f"attention[0:{'9' * 5000}]", "attention[٣:]", "*", "**", "[", "[!",
    "a" * 9000, "query:weigth", ":weight", ":", "query:", "re:.*:weight", "attention\n", "\0",
    "attention | | mlp", "qurey",
)  # fmt: skip


# what is drawn


def clauses() -> st.SearchStrategy[str]:
    """One clause of the target language, mostly right."""
    block = st.sampled_from(("", "", "", "[0:1]", "[1:]", "[:2]", "[:1]"))
    named = st.sampled_from(("re:.*", "*", "*.0*", "=head", "*:weight", "layers.0"))
    return st.one_of(st.builds("{}{}".format, st.sampled_from(ROLES), block), named)


def target_texts() -> st.SearchStrategy[str]:
    """An expression of the target language, right or wrong."""
    joined = st.builds("{}{}{}".format, clauses(), st.sampled_from((" | ", " - ", "|", " |")), clauses())
    return st.one_of(clauses(), clauses(), joined, st.sampled_from(BROKEN_TARGETS), st.text(max_size=12))


def target_values() -> st.SearchStrategy[Any]:
    """Targets as a text, a tuple of texts or a function, right or wrong."""
    functions = st.sampled_from((lambda name, module: isinstance(module, nn.Linear), lambda name, module: False))
    return st.one_of(target_texts(), target_texts(), st.lists(target_texts(), max_size=3).map(tuple), functions)


def fitting(hint: Any, metadata: Any) -> st.SearchStrategy[Any]:
    """Values that a setting's type and range allow, its edges among them."""
    if metadata.get("choices"):
        return st.sampled_from(metadata["choices"])
    if hint == Targets:
        return target_values()
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.one_of(*(fitting(option, metadata) for option in inner))
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        items = inner[:1] if inner[-1] is Ellipsis else inner
        entries = [fitting(item, metadata) for item in items]
        return st.lists(entries[0], max_size=3).map(tuple) if inner[-1] is Ellipsis else st.tuples(*entries)
    simple: dict[Any, Callable[[], st.SearchStrategy[Any]]] = {
        NoneType: st.none,
        bool: st.booleans,
        int: lambda: st.sampled_from(_whole_numbers(metadata)),
        float: lambda: st.sampled_from(_numbers(metadata)),
        str: clauses,
        tt.Method: lambda: methods(parts=False),
    }
    return simple[hint]() if hint in simple else st.just(None)


def _whole_numbers(metadata: Any) -> list[int]:
    least = int(metadata.get("minimum") or 0)
    return [least, least, least + 1, least + 2, least + 3, least + 7]


def _numbers(metadata: Any) -> list[float]:
    edges = [metadata.get("minimum"), metadata.get("maximum")]
    return [
        1e-3,
        0.5,
        1,
        *(edge for edge in edges if edge is not None),
        2.0 if metadata.get("maximum") is None else 0.9,
    ]


@st.composite
def settings_for(draw: st.DrawFn, cls: type[tt.Method], wrong: bool = True) -> dict[str, Any]:
    """Settings of one method: most fit, some are of another type or out of range."""
    hints = get_type_hints(cls)
    chosen: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        required = entry.default is dataclasses.MISSING
        kind = draw(st.sampled_from(("default",) * 6 + ("fitting",) * 6 + ("wrong",) * wrong))
        if kind == "wrong":
            chosen[entry.name] = draw(st.sampled_from(WRONG))
        elif kind == "fitting" or required:
            chosen[entry.name] = draw(fitting(hints[entry.name], entry.metadata))
        elif type(entry.default) is int and entry.default > 16:
            chosen[entry.name] = draw(st.sampled_from(_whole_numbers(entry.metadata)))
    return chosen


@st.composite
def methods(draw: st.DrawFn, parts: bool = True) -> tt.Method:
    """An instance of any method; only settings of the right type, since a part cannot be made with others."""
    names = [name for name, cls in tt.methods().items() if parts or cls.__dataclass_fields__.keys() != {"methods"}]
    cls = tt.methods()[draw(st.sampled_from(names))]
    return cls(**draw(settings_for(cls, wrong=False)))


def mostly(right: tuple[Any, ...], wrong: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """A right value nine times in ten."""
    return st.sampled_from(right * (9 * len(wrong)) + wrong * len(right))


@dataclasses.dataclass(frozen=True, repr=False)
class Attempt:
    """One run to try: the verbs' arguments. `make` gives the method, or refuses."""

    model: str
    make: Callable[[], Any]
    name: Any
    seed: Any
    dtype: Any
    base_mode: Any
    total_steps: Any
    lr: Any

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return f"Attempt({_shown(given)})"


class _Made:
    """A method yet to be made: failing examples print its settings."""

    def __init__(self, cls: type[tt.Method], settings: dict[str, Any]) -> None:
        self.cls, self.settings = cls, settings

    def __repr__(self) -> str:
        return f"{self.cls.__name__}({_shown(self.settings)})"

    def __call__(self) -> tt.Method:
        return self.cls(**self.settings)


def _shown(values: dict[str, Any]) -> str:
    """Python cannot print integers of more than 4300 digits."""
    short = {
        k: f"10**{len(hex(v)) * 0.83:.0f}" if isinstance(v, int) and abs(v) > 10**40 else repr(v)[:300]
        for k, v in values.items()
    }
    return ", ".join(f"{name}={value}" for name, value in short.items())


@st.composite
def attempts(draw: st.DrawFn, cls: type[tt.Method]) -> Attempt:
    """A run of one method with random arguments everywhere."""
    names = ("a", "default", "A-1_b", "0")
    return Attempt(
        model=draw(st.sampled_from(MODELS)),
        make=_Made(cls, draw(settings_for(cls))),
        name=draw(mostly(names, ("", "a b", "a\n", "ä", "_a", "a.b", 1, None, "a" * 300, ("a",)))),
        seed=draw(mostly((0, 1, 2**31, 2**63), (-1, True, 1.0, "0", None, float("nan"), torch.tensor(1), *HUGE[2:]))),
        dtype=draw(
            mostly(
                (torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16),
                (
                    torch.int8,
                    torch.float8_e4m3fn,
                    torch.complex64,
                    torch.bool,
                    "float32",
                    None,
                    32,
                    torch.float4_e2m1fn_x2,
                ),
            )
        ),
        base_mode=draw(mostly((None, "follow", "eval"), ("evil", "", True, 0))),
        total_steps=draw(mostly((30, 100), (0, -1, 2.5, "9", None, True, float("nan"), 10**30))),
        lr=draw(mostly((1e-3, 0.1), (0.0, -1.0, float("nan"), float("inf"), "1e-3", None, True, 1e308))),
    )


# what must hold


def state_of(model: nn.Module) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Everything about a model that an error must leave as it was: structure, modes, hooks, flags and numbers."""
    modules = [
        (
            name, type(module), module.training, *map(tuple, (module._parameters, module._buffers, module._modules)),
            *(len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")),
        )
        for name, module in model.named_modules()
    ]  # fmt: skip
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return [modules, flags], {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    """The model is what it was before, bit by bit."""
    facts, tensors = state_of(model)
    assert facts == before[0]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in before[1].items())
    assert tt.adapters(model) == {}


def run(attempt: Attempt) -> str:
    """Plan, attach, train a step, save and load; returns 'ran', or the class of the one TrimtabError.

    Any other exception is the failure this is about, and so are an error that leaves the model changed, a plan that
    says another thing than attaching does, and a run whose start is not finite.
    """
    entry = pristine(attempt.model)
    model = copy.deepcopy(entry.model)
    before = state_of(model)
    planned = _planned(model, attempt)
    assert_unchanged(model, before)
    try:
        adapter = tt.attach(
            model, attempt.make(), attempt.name, attempt.seed, attempt.dtype, base_mode=attempt.base_mode
        )
    except tt.TrimtabError as error:
        assert_unchanged(model, before)
        _check_text(error)
        return type(error).__name__
    assert planned is not None, "plan refused what attach accepted"
    assert planned.trainable == adapter.trainable_count
    try:
        _use(entry, model, adapter, attempt)
        ended = "ran"
    except tt.TrimtabError as error:
        _check_text(error)
        ended = type(error).__name__
    finally:
        adapter.detach()
    assert_unchanged(model, before)
    return ended


def _planned(model: nn.Module, attempt: Attempt) -> Any:
    try:
        return tt.plan(model, attempt.make())
    except tt.TrimtabError as error:
        _check_text(error)
        return None


def _check_text(error: tt.TrimtabError) -> None:
    """One error for people: it says something, and not endlessly."""
    text = str(error)
    assert 10 < len(text) < 30_000, text[:200]


def _use(entry: Any, model: nn.Module, adapter: tt.Adapter, attempt: Attempt) -> None:
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=attempt.lr), lr=1e-3)
    adapter.bind(optimizer, total_steps=attempt.total_steps)
    loss = entry.loss(model)
    assert torch.isfinite(loss), "a start that is not finite must be refused"
    loss.backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        file = adapter.save(Path(folder) / "a.safetensors")
        copied = copy.deepcopy(pristine(attempt.model).model)
        tt.load(copied, file)
        with torch.no_grad():
            expected, found = entry.output(model.eval()), entry.output(copied)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@cache
def known_methods() -> tuple[str, ...]:
    """Names of every method, as the catalogue has them."""
    return tuple(tt.methods())
