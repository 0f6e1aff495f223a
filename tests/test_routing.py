"""One adapter for each row of the batch: the same as row by row, in training too, and never by mistake."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab
from zoo import BATCH, HIDDEN, LENGTH, ZOO, ZooModel

LORA = {"first": trimtab.LoRA(rank=2), "second": trimtab.LoRA(rank=4, alpha=8.0)}
MIXED = {
    "first": trimtab.LoRA(rank=2),
    "second": trimtab.LNTuning(),
    "third": trimtab.PaCA(rank=3, targets="query | value"),
}
ROWS = ["second", None, "first"]
LEFT_OUT = {"tied_embedding", "cnn"}


def attached(entry: ZooModel, methods: dict[str, trimtab.Method]) -> dict[str, trimtab.Adapter]:
    """The adapters, away from their start."""
    torch.manual_seed(7)
    double = torch.float64
    adapters = {name: trimtab.attach(entry.model, method, name=name, dtype=double) for name, method in methods.items()}
    with torch.no_grad():
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return adapters


def row_by_row(entry: ZooModel, adapters: dict[str, trimtab.Adapter], rows: list[str | None]) -> Tensor:
    """The main output of each row of the batch alone, through its own adapter."""
    outputs = []
    for index, row in enumerate(rows):
        for name, adapter in adapters.items():
            adapter.active = name == row
        outputs.append(entry.output(inputs=entry.rows(index)))
    for adapter in adapters.values():
        adapter.active = True
    return torch.cat(outputs)


def scalar(output: Tensor) -> Tensor:
    """A loss that weighs every number of the output differently; rows do not mix."""
    return (output * torch.linspace(-1.0, 2.0, output[0].numel()).view_as(output[0])).sum()


def gradients(adapters: dict[str, trimtab.Adapter]) -> list[Tensor | None]:
    found = []
    for adapter in adapters.values():
        for parameter in adapter.parameters():
            found.append(None if parameter.grad is None else parameter.grad.clone())
            parameter.grad = None
    return found


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        if other is None or one is None:
            assert all(gradient is None or gradient.abs().max() == 0 for gradient in (one, other))
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7 * other.abs().max().item())


def without_labels(name: str) -> ZooModel:
    """Outputs are compared, since losses average over rows; in float64, where sums in another order do not matter."""
    entry = ZOO[name](0, 0.0)
    entry.model.double()
    if name == "mixtral":
        entry.model.set_experts_implementation("eager")  # the grouped product knows no float64
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in entry.inputs.items()}
    if name != "t5":
        inputs.pop("labels", None)
    return dataclasses.replace(entry, inputs=inputs)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in LEFT_OUT])
def test_a_routed_batch_is_its_rows_one_by_one(name: str) -> None:
    entry = without_labels(name)
    adapters = attached(entry, LORA)
    expected = row_by_row(entry, adapters, ROWS)
    scalar(expected).backward()
    one_by_one = gradients(adapters)
    with trimtab.route(entry.model, ROWS):
        found = entry.output()
        scalar(found).backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert_same(gradients(adapters), one_by_one)
    base = row_by_row(entry, adapters, [None, None, None])
    assert torch.allclose(found[1], base[1], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found[0], base[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit", "mixtral"])
def test_methods_of_several_kinds_in_one_batch(name: str) -> None:
    entry = without_labels(name)
    methods = MIXED if name not in ("gpt2",) else MIXED | {"third": trimtab.PaCA(rank=3)}
    adapters = attached(entry, methods)
    for rows in (["third", "second", "first"], ["second", "second", None], ["first", "third", "first"]):
        with trimtab.route(entry.model, rows):
            found = entry.output()
        torch.testing.assert_close(found, row_by_row(entry, adapters, rows), rtol=1e-6, atol=1e-7)


def test_a_composition_is_routed_with_all_its_parts() -> None:
    entry = without_labels("bert")
    both = trimtab.Compose(trimtab.LoRA(rank=2, targets="query"), trimtab.BitFit())
    adapters = attached(entry, {"first": both, "second": trimtab.LoRA(rank=2)})
    with trimtab.route(entry.model, ROWS):
        found = entry.output()
    torch.testing.assert_close(found, row_by_row(entry, adapters, ROWS), rtol=1e-6, atol=1e-7)


def test_experts_that_see_rows_and_tokens_as_one_axis() -> None:
    entry = without_labels("mixtral")
    adapters = attached(entry, {name: trimtab.LoRA(rank=2, targets="experts") for name in LORA})
    shapes = set()
    experts = entry.model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: shapes.add(tuple(args[0].shape)))
    with trimtab.route(entry.model, ROWS):
        found = entry.output()
        scalar(found).backward()
    routed = gradients(adapters)
    handle.remove()
    assert shapes == {(BATCH * LENGTH, HIDDEN)}
    expected = row_by_row(entry, adapters, ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    scalar(expected).backward()
    assert_same(routed, gradients(adapters))


def test_rows_that_a_module_flattens_are_told_apart() -> None:
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            flat = self.inner(hidden.flatten(0, 1))  # (rows · tokens, 6)
            return self.outer(flat.view_as(hidden))

    torch.manual_seed(0)
    model, hidden = Flattening(), torch.randn(3, 5, 6)
    plain = {name: trimtab.attach(model, trimtab.LoRA(rank=2, targets="inner"), name=name) for name in LORA}
    with torch.no_grad():
        for adapter in plain.values():
            for parameter in adapter.parameters():
                parameter.normal_()
    with trimtab.route(model, ROWS):
        found = model(hidden)
    for index, row in enumerate(ROWS):
        for name, adapter in plain.items():
            adapter.active = name == row
        torch.testing.assert_close(found[index], model(hidden[index : index + 1])[0])


def test_rows_that_cannot_be_told_apart_stop() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    trimtab.attach(model, trimtab.LoRA(rank=2, targets="0"), name="first")
    with (
        trimtab.route(model, ["first", None]),
        pytest.raises(trimtab.AttachError, match="a routed batch of 2 rows reached a module with 5 entries"),
    ):
        model(torch.randn(5, 4))


def test_rows_of_one_adapter_are_that_adapter() -> None:
    entry = without_labels("llama")
    adapters = attached(entry, LORA)
    for name in (None, *LORA):
        rows = [name] * 3
        with trimtab.route(entry.model, rows):
            found = entry.output()
        torch.testing.assert_close(found, row_by_row(entry, adapters, rows), rtol=1e-6, atol=1e-7)


def test_a_route_ends_with_its_block_and_an_inner_one_gives_way() -> None:
    entry = without_labels("bert")
    adapters = attached(entry, LORA)
    plain = entry.output()
    with trimtab.route(entry.model, ROWS):
        outer = entry.output()
        with trimtab.route(entry.model, ["first"] * 3):
            inner = entry.output()
        assert torch.equal(entry.output(), outer)
    torch.testing.assert_close(inner, row_by_row(entry, adapters, ["first"] * 3), rtol=1e-6, atol=1e-7)
    assert torch.equal(entry.output(), plain)
    with pytest.raises(RuntimeError, match="stop here"), trimtab.route(entry.model, ROWS):
        raise RuntimeError("stop here")
    assert torch.equal(entry.output(), plain)


# ---- activation checkpointing ----


def checkpointed(entry: ZooModel, reentrant: bool) -> None:
    entry.model.train()
    entry.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        entry.model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "mixtral"])
@pytest.mark.parametrize("methods", [LORA, MIXED], ids=["lora", "mixed"])
def test_checkpointing_gives_the_same_gradients(name: str, methods: dict[str, trimtab.Method], reentrant: bool) -> None:
    entry = without_labels(name)
    adapters = attached(entry, methods if name != "gpt2" else LORA)
    with trimtab.route(entry.model, ROWS):
        scalar(entry.output()).backward()
    expected = gradients(adapters)
    checkpointed(entry, reentrant)
    for _ in range(2):  # nothing of the first run stays behind
        with trimtab.route(entry.model, ROWS):
            scalar(entry.output()).backward()
        assert_same(gradients(adapters), expected)


def test_accumulation_inside_one_block() -> None:
    entry = without_labels("bert")
    adapters = attached(entry, LORA)
    checkpointed(entry, reentrant=True)
    with trimtab.route(entry.model, ROWS):
        scalar(entry.output()).backward()
    once = gradients(adapters)
    with trimtab.route(entry.model, ROWS):
        for _ in range(2):
            scalar(entry.output()).backward()
    assert_same([None if g is None else g / 2 for g in gradients(adapters)], once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_after_the_block_stops(reentrant: bool) -> None:
    entry = without_labels("bert")
    attached(entry, LORA)
    checkpointed(entry, reentrant)
    with trimtab.route(entry.model, ROWS):
        loss = scalar(entry.output())
    with pytest.raises(trimtab.AttachError, match=r"has ended: the gradients would be those of other adapters"):
        loss.backward()


def test_backward_after_the_block_is_fine_without_checkpointing() -> None:
    entry = without_labels("bert")
    adapters = attached(entry, LORA)
    with trimtab.route(entry.model, ROWS):
        loss = scalar(entry.output())
    loss.backward()
    found = gradients(adapters)
    scalar(row_by_row(entry, adapters, ROWS)).backward()
    assert_same(found, gradients(adapters))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "other", [["first", "second", None], ["second", None, "first"]], ids=["other rows", "same rows"]
)
def test_crossed_routes_stop(reentrant: bool, other: list[str | None]) -> None:
    """The first block's backward runs inside the second: its recomputation would go through the second's adapters."""
    entry = without_labels("bert")
    attached(entry, LORA)
    checkpointed(entry, reentrant)
    with trimtab.route(entry.model, ROWS):
        first = scalar(entry.output())
    with trimtab.route(entry.model, other):
        second = scalar(entry.output())
        with pytest.raises(trimtab.AttachError, match=r"did not run in this `with trimtab\.route\(\.\.\.\)` block"):
            (first + second).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_routed_forward_without_backward_leaves_nothing_behind(reentrant: bool) -> None:
    entry = without_labels("bert")
    adapters = attached(entry, LORA)
    with trimtab.route(entry.model, ROWS):
        scalar(entry.output()).backward()
    expected = gradients(adapters)
    checkpointed(entry, reentrant)
    with trimtab.route(entry.model, ["first", "second", None]):
        entry.output()
    with trimtab.route(entry.model, ROWS):
        scalar(entry.output()).backward()
    assert_same(gradients(adapters), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_late_backward_stops_also_after_an_unrouted_forward(reentrant: bool) -> None:
    entry = without_labels("bert")
    attached(entry, LORA)
    checkpointed(entry, reentrant)
    with trimtab.route(entry.model, ROWS):
        loss = scalar(entry.output())
    entry.output()
    with pytest.raises(trimtab.AttachError, match=r"has ended: the gradients would be those of other adapters"):
        loss.backward()


def test_an_unrouted_forward_after_a_routed_one_is_its_own() -> None:
    """A plain training step after routed inference recomputes without complaint."""
    entry = without_labels("bert")
    adapters = attached(entry, LORA)
    with trimtab.route(entry.model, ROWS), torch.no_grad():
        entry.output()
    scalar(entry.output()).backward()
    expected = gradients(adapters)
    checkpointed(entry, reentrant=False)
    with trimtab.route(entry.model, ROWS), torch.no_grad():
        entry.output()
    scalar(entry.output()).backward()
    assert_same(gradients(adapters), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_unrouted_backward_inside_a_block_stops(reentrant: bool) -> None:
    """The forward ran without a route; its recomputation inside one would not."""
    entry = without_labels("bert")
    attached(entry, LORA)
    checkpointed(entry, reentrant)
    loss = scalar(entry.output())
    with trimtab.route(entry.model, ROWS), pytest.raises(trimtab.AttachError, match=r"did not run in this `with"):
        loss.backward()


def test_a_part_that_the_user_checkpoints() -> None:
    """`torch.utils.checkpoint` called by hand around one module."""

    class Checkpointing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, hidden: Tensor) -> Tensor:
            inner: Any = checkpoint(self.inner, hidden, use_reentrant=False)
            return self.outer(inner)

    torch.manual_seed(0)
    model, hidden = Checkpointing(), torch.randn(3, 6)
    for name in LORA:
        adapter = trimtab.attach(model, trimtab.LoRA(rank=2, targets="inner"), name=name)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.normal_()
    with trimtab.route(model, ROWS):
        model(hidden).sum().backward()
        late = model(hidden).sum()
    assert all(p.grad is not None for a in trimtab.adapters(model).values() for p in a.parameters())
    with pytest.raises(trimtab.AttachError, match="has ended"):
        late.backward()


# ---- refusals ----


def test_prompts_are_not_routed() -> None:
    entry = without_labels("llama")
    trimtab.attach(entry.model, trimtab.PromptTuning(length=2), name="first")
    with (
        trimtab.route(entry.model, ["first", None, "first"]),
        pytest.raises(trimtab.AttachError, match=r"PromptTuning \(adapter 'first'\) cannot be routed by rows\."),
    ):
        entry.output()


@pytest.mark.parametrize("method", [trimtab.PrefixTuning(length=2), trimtab.PfeifferAdapter(bottleneck=4)])
def test_a_cache_of_all_rows_is_refused_by_adapters_around_its_reader(method: trimtab.Method) -> None:
    entry = without_labels("llama")
    trimtab.attach(entry.model, method, name="first")
    text = r"around a Llama\w+ that is given a cache \(DynamicCache\).*run the model with use_cache=False"
    with trimtab.route(entry.model, ["first", None, "first"]):
        with pytest.raises(trimtab.AttachError, match=text):
            entry.model(**entry.inputs, use_cache=True)
        entry.model(**entry.inputs, use_cache=False)


def test_a_batch_that_is_not_the_first_axis_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    trimtab.attach(model, trimtab.LoRA(rank=2, targets="=0"), name="first")
    with (
        pytest.raises(trimtab.AttachError, match=r"through '1', whose first axis is positions.*batch_first=True"),
        trimtab.route(model, ["first", None, "first"]),
    ):
        pass


def test_adapters_inside_a_recurrent_network_are_not_routed() -> None:
    entry = ZOO["gru"](0, 0.0)
    trimtab.attach(entry.model, trimtab.LoRA(rank=2, targets="recurrent:weight_ih_l0"), name="first")
    with (
        trimtab.route(entry.model, ["first", None, "first"]),
        pytest.raises(trimtab.AttachError, match="through adapters inside GRU, which returns states"),
    ):
        entry.output()


def test_an_inactive_or_disabled_adapter_takes_no_part_in_a_route() -> None:
    entry = without_labels("bert")
    base = entry.output()
    adapters = attached(entry, LORA)
    with trimtab.route(entry.model, ["first", None, "first"]), adapters["first"].disabled():
        assert torch.equal(entry.output(), base)
    text = r"route: adapter 'first' is inactive or disabled; set its `active` to True first\."
    with (
        adapters["first"].disabled(),
        pytest.raises(trimtab.AttachError, match=text),
        trimtab.route(entry.model, ROWS),
    ):
        pass


def test_a_batch_of_other_rows_than_the_route_s_stops() -> None:
    entry = without_labels("llama")
    attached(entry, LORA)
    text = r"route was given 3 rows, but the model returned 6: name one adapter .*, or route\(…, repeats=n\)"
    twice = {name: value.repeat_interleave(2, dim=0) for name, value in entry.inputs.items()}
    with trimtab.route(entry.model, ROWS):
        expected = entry.output()
        with pytest.raises(trimtab.AttachError, match=text):
            entry.output(inputs=twice)
    with trimtab.route(entry.model, ROWS, repeats=2):
        torch.testing.assert_close(entry.output(inputs=twice), expected.repeat_interleave(2, dim=0))


def test_beams_of_one_row_are_its_adapter_s() -> None:
    entry = without_labels("gpt2")
    adapters = attached(entry, LORA)
    model: Any = entry.model
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    expected = []
    for index, row in enumerate(ROWS):
        for name, adapter in adapters.items():
            adapter.active = name == row
        expected.append(model.generate(**entry.rows(index), **settings)[0])
    for adapter in adapters.values():
        adapter.active = True
    with trimtab.route(model, ROWS, repeats=2):
        found = model.generate(**entry.inputs, **settings)
    assert found.tolist() == [tokens.tolist() for tokens in expected]


@pytest.mark.parametrize("rows", [[], "ab", None, {"a": 1}])
def test_rows_that_are_no_list_are_refused(rows: Any) -> None:
    entry = without_labels("bert")
    attached(entry, LORA)
    text = "route: rows is a list with an adapter's name or None for each row, found"
    with pytest.raises(trimtab.AttachError, match=text):
        trimtab.route(entry.model, rows)
    with pytest.raises(trimtab.AttachError, match="route: repeats must be a whole number from 1, found 0"):
        trimtab.route(entry.model, ROWS, repeats=0)


def test_unknown_names_and_unattached_models_are_refused() -> None:
    entry = without_labels("bert")
    with pytest.raises(trimtab.AttachError, match="route: no adapter is attached to this model"):
        trimtab.route(entry.model, ROWS)
    attached(entry, LORA)
    with (
        pytest.raises(trimtab.AttachError, match=r"route: there is no adapter 'frist'\. Did you mean 'first'"),
        trimtab.route(entry.model, ["frist", None, None]),
    ):
        pass
