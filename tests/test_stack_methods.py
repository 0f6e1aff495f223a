"""Ladder side tuning: counts, gates, masks, what is saved, and where it stops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import trimtab
from test_selection_methods import Saved, on_meta
from zoo import BATCH, HIDDEN, LENGTH, ZOO

METHOD = trimtab.LadderSideTuning(reduction=4)
WITH_ONE_LIST = ["bert", "llama", "gpt2", "vit", "mixtral"]
ONE_LIST_OF_TWO = {"t5": ("encoder.block.*", "decoder.block.*"), "clip": ("text_model.encoder.layers.*",)}


def closed_form(width: int, blocks: int, reduction: int, expansion: int = 4) -> int:
    side = width // reduction
    per_block = (4 + 2 * expansion) * side**2 + 4 * side + 1
    return (blocks + 2) * width * side + blocks * per_block + 2 * side


def test_counts_follow_the_closed_form() -> None:
    model = on_meta(lambda: transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False))
    assert trimtab.plan(model, trimtab.LadderSideTuning(reduction=8)).trainable == closed_form(768, 12, 8)
    for name in WITH_ONE_LIST:
        assert trimtab.plan(ZOO[name](0, 0.0).model, METHOD).trainable == closed_form(HIDDEN, 2, 4)


def test_the_gates_start_half_open_and_scale_with_the_temperature() -> None:
    entry = ZOO["bert"](0, 0.0)
    leaf = trimtab.attach(entry.model, METHOD).parts[0].leaves[0]
    entering, hidden = torch.randn(2, 1, 5, HIDDEN)
    for value, share in ((0.0, 0.5), (0.1, torch.sigmoid(torch.tensor(1.0)).item())):
        with torch.no_grad():
            leaf.gate.fill_(value)
            for weight in (leaf.outer, leaf.output):
                weight.zero_()  # the side block is the identity now
            state = leaf(entering, hidden, None, None)
        expected = share * entering @ leaf.enter.t() + (1 - share) * hidden @ leaf.down.t()
        torch.testing.assert_close(state, expected.detach())


def trained(name: str, method: trimtab.Method = METHOD) -> tuple[Any, trimtab.Adapter]:
    entry = ZOO[name](0, 0.0)
    adapter = trimtab.attach(entry.model, method)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=0.02, weight_decay=0.1))
    adapter.bind(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        entry.loss().backward()
        optimizer.step()
    return entry, adapter


@pytest.mark.parametrize("name", WITH_ONE_LIST)
def test_it_learns_and_the_base_stays(name: str) -> None:
    fresh = ZOO[name](0, 0.0)
    before = copy.deepcopy(fresh.model.state_dict())
    start = trimtab.attach(fresh.model, METHOD)
    first = fresh.loss().item()
    start.detach()
    base = fresh.output().detach()
    entry, adapter = trained(name)
    assert entry.loss().item() < first
    with adapter.disabled():
        assert torch.equal(entry.output(), base)
    adapter.detach()
    assert all(torch.equal(value, before[key]) for key, value in entry.model.state_dict().items())


@pytest.mark.parametrize(("name", "targets"), [(n, t) for n, lists in ONE_LIST_OF_TWO.items() for t in lists])
def test_one_list_of_blocks_of_several(name: str, targets: str) -> None:
    entry, adapter = trained(name, trimtab.LadderSideTuning(reduction=4, targets=targets))
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())
    assert adapter.trainable_count == closed_form(HIDDEN, 2, 4)
    with pytest.raises(trimtab.TargetError, match="runs along one list of blocks, the targets name 2"):
        trimtab.plan(entry.model, METHOD)


def kept_from_inside(entry: Any, saved: Saved) -> int:
    """How many tensors that arise inside the base's blocks autograd has kept in one forward."""
    blocks = entry.model.get_submodule(entry.block_lists[0])
    inside: list[Tensor] = []
    borders: list[Tensor] = []

    def note(into: list[Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output if isinstance(output, tuple) else (output,)
            into.extend(value for value in values if isinstance(value, Tensor))

        return hook

    handles = []
    for block in blocks:
        ladder = block._modules.get("trimtab_default")
        if ladder is not None:  # reads the block's input and output
            handles.append(ladder.register_forward_pre_hook(lambda module, args: borders.extend(args[:2])))
        parts = [m for name, m in block.named_modules() if name and "trimtab" not in name]
        handles += [part.register_forward_hook(note(inside)) for part in parts]
    with saved:
        entry.output()
    for handle in handles:
        handle.remove()
    outside = {tensor.untyped_storage().data_ptr() for tensor in borders}  # what D_i reads
    places = {tensor.untyped_storage().data_ptr() for tensor in inside} - outside
    return len(places & set(saved.tensors))


@pytest.mark.parametrize("name", WITH_ONE_LIST)
def test_nothing_inside_the_base_is_saved(name: str) -> None:
    entry = ZOO[name](0, 0.0)
    entry.inputs.pop("labels")
    lora = trimtab.attach(entry.model, trimtab.LoRA(rank=2))
    by_lora = Saved(entry.model)
    assert kept_from_inside(entry, by_lora) > 2
    lora.detach()
    trimtab.attach(entry.model, METHOD)
    by_ladder = Saved(entry.model)
    assert kept_from_inside(entry, by_ladder) == 0


def test_a_wide_base_saves_a_fraction_of_what_lora_needs() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    pixels = torch.randn(2, 3, 32, 32)
    kept = {}
    for method in (trimtab.LoRA(rank=2), trimtab.LadderSideTuning(reduction=8)):
        adapter = trimtab.attach(model, method)
        with Saved(model) as saved:
            model(pixel_values=pixels)
        kept[type(method).__name__] = saved.bytes
        adapter.detach()
    assert kept["LadderSideTuning"] < 0.5 * kept["LoRA"]


# ---- the side network sees what the block sees ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_causal_base_has_a_causal_side(name: str) -> None:
    entry, _ = trained(name)
    ids = entry.inputs["input_ids"][[0]]
    with torch.no_grad():
        whole = entry.model(input_ids=ids).logits
        start = entry.model(input_ids=ids[:, :4]).logits
    torch.testing.assert_close(whole[:, :4], start, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_padding_is_not_seen(name: str) -> None:
    entry, _ = trained(name)
    mask = entry.inputs["attention_mask"]
    changed = dict(entry.inputs)
    changed["input_ids"] = torch.where(mask == 1, changed["input_ids"], 9)
    kept = mask.bool() if entry.output().dim() == 3 else torch.ones(BATCH, dtype=torch.bool)
    torch.testing.assert_close(entry.output(inputs=changed)[kept], entry.output()[kept], rtol=1e-4, atol=1e-5)


def test_the_side_attends_at_all() -> None:
    """With the feed-forward alone, one position could not see another beyond what the base mixes in."""
    entry, adapter = trained("bert")
    leaf = adapter.parts[0].leaves[0]
    before = entry.output()
    with torch.no_grad():
        leaf.output.zero_()
    assert (entry.output() - before).abs().max() > 1e-3


class Mixer(nn.Module):
    """A block without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(hidden)))


class Stacked(nn.Module):
    """Blocks in a list between two linear maps."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.start, self.blocks, self.end = nn.Linear(8, 16), nn.ModuleList(blocks), nn.Linear(16, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.start(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.end(hidden)


@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8)])
def test_a_block_without_attention_has_a_side_without_it(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Stacked(Mixer(), Mixer())
    adapter = trimtab.attach(model, METHOD)
    attention = (16 // 4) ** 2 * 4 + 2 * (16 // 4)
    assert adapter.trainable_count == closed_form(16, 2, 4) - 2 * attention
    output = model(torch.randn(shape))
    assert output.shape == (*shape[:-1], 2)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


# ---- refusals ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_cached_generation_is_refused_and_uncached_works(name: str) -> None:
    entry, _ = trained(name)
    inputs = {key: entry.inputs[key] for key in ("input_ids", "attention_mask")}
    for cache in ("dynamic", "static"):
        with pytest.raises(
            trimtab.AttachError, match=r"keeps no cache of its side states.*Generate with use_cache=False"
        ):
            entry.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, cache_implementation=cache)
    found = entry.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, use_cache=False)
    assert found.shape == (BATCH, LENGTH + 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused(reentrant: bool) -> None:
    entry = ZOO["bert"](0, 0.0)
    trimtab.attach(entry.model, METHOD)
    entry.model.train()
    entry.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        entry.model.enable_input_require_grads()
    with pytest.raises(trimtab.AttachError, match=r"Switch checkpointing off\.|switch checkpointing off\."):
        entry.loss().backward()


def test_eager_attention_is_an_error() -> None:
    entry = ZOO["bert"](0, 0.0)
    entry.model.set_attn_implementation("eager")
    trimtab.attach(entry.model, METHOD)
    with pytest.raises(
        trimtab.AttachError, match=r"'bert\.encoder\.layer\.0' never called scaled_dot_product_attention"
    ):
        entry.output()


def test_what_cannot_have_a_ladder_is_refused() -> None:
    with pytest.raises(trimtab.TargetError, match="whose attention cannot be tapped"):
        trimtab.attach(ZOO["torch_encoder"](0, 0.0).model, METHOD)
    with pytest.raises(trimtab.TargetError, match="no part in the role 'block'"):
        trimtab.attach(ZOO["mlp"](0, 0.0).model, METHOD)
    with pytest.raises(trimtab.TargetError, match="name no block; use 'block'"):
        trimtab.attach(ZOO["bert"](0, 0.0).model, trimtab.LadderSideTuning(targets="query"))
    with pytest.raises(
        trimtab.SettingError, match=r"LadderSideTuning\(reduction=5\) does not divide the base's width 32"
    ):
        trimtab.attach(ZOO["bert"](0, 0.0).model, trimtab.LadderSideTuning(reduction=5))


def test_a_hidden_state_of_another_axis_is_an_error() -> None:
    class Transposed(Mixer):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden.transpose(-1, -2)).transpose(-1, -2)

    model = Stacked(Transposed(), Transposed())
    model.start, model.end = nn.Linear(8, 3), nn.Linear(3, 2)
    trimtab.attach(model, METHOD)
    with pytest.raises(trimtab.AttachError, match=r"'blocks\.0' returned \(5, 16, 3\); .* whose last axis is 16"):
        model(torch.randn(5, 16, 8))


def test_heads_that_the_base_biases_apart_need_a_side_of_as_many() -> None:
    entry = ZOO["t5"](0, 0.0)
    trimtab.attach(entry.model, trimtab.LadderSideTuning(reduction=16, targets="encoder.block.*"))
    with pytest.raises(trimtab.SettingError, match="the base biases each of its 4 heads"):
        entry.output()


def test_it_cannot_be_merged() -> None:
    _, adapter = trained("bert")
    with pytest.raises(trimtab.AttachError, match="a side network has no weight to be folded into"):
        adapter.merge()


def test_rows_are_routed_past_it() -> None:
    entry, adapter = trained("bert")
    beside = entry.output()
    with adapter.disabled():
        base = entry.output()
    with trimtab.route(entry.model, ["default", None, "default"]):
        routed = entry.output()
    torch.testing.assert_close(routed[[0, 2]], beside[[0, 2]])
    torch.testing.assert_close(routed[1], base[1])
    assert not torch.allclose(beside[1], base[1])
