"""LoRA against peft (huggingface/peft, run live): the same tensors give the same outputs, gradients and training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from golden.peft_models import (
    LABELS,
    TOKENS,
    Pair,
    assert_same_training,
    leaf_at,
    randomise,
    reshaped,
    trainable_count,
    twins,
)
from zoo import mixtral

peft = pytest.importorskip("peft")
loraplus = pytest.importorskip("peft.optimizers.loraplus")

PLACES = ("embedding", "linear", "transposed", "plain")


def lora_pairs(adapter: trimtab.Adapter, wrapped: Any, places: tuple[str, ...]) -> list[Pair]:
    """Pair A and B at each place."""
    pairs = []
    for place in places:
        layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
        if place == "embedding":
            theirs = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            theirs = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        pairs += [reshaped(leaf.A, theirs[0]), reshaped(leaf.B, theirs[1])]
    return pairs


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cls", [trimtab.LoRA, trimtab.RsLoRA, trimtab.LoRAPlus])
def test_lora_trains_as_in_peft(place: str, cls: Callable[..., trimtab.Method]) -> None:
    model, adapter, bare = twins(cls(rank=4, alpha=6, targets=place))
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=cls is trimtab.RsLoRA, target_modules=[place])
    wrapped = peft.get_peft_model(bare, config)
    pairs = lora_pairs(adapter, wrapped, (place,))
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped)
    assert_same_training(model, wrapped, pairs, tolerance=1e-12)


def test_all_layers_at_once_train_as_in_peft() -> None:
    model, adapter, bare = twins(trimtab.LoRA(rank=2, targets=" | ".join(PLACES)))
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(PLACES)))
    pairs = lora_pairs(adapter, wrapped, PLACES)
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped)
    assert_same_training(model, wrapped, pairs, tolerance=1e-12)


@pytest.mark.parametrize("place", ["embedding", "linear", "transposed", "plain"])
def test_the_merged_weight_is_that_of_peft(place: str) -> None:
    model, adapter, bare = twins(trimtab.LoRA(rank=4, alpha=3, targets=place))
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(r=4, lora_alpha=3, target_modules=[place]))
    pairs = lora_pairs(adapter, wrapped, (place,))
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    wrapped.merge_adapter()
    adapter.merge()
    theirs = wrapped.base_model.model.get_submodule(place).get_base_layer().weight
    # ours is computed in float32 and rounded once, also for a float64 base
    torch.testing.assert_close(model.get_submodule(place).weight, theirs, rtol=0, atol=1e-6)


def test_a_grouped_convolution_is_peft_s_with_a_down_map_that_keeps_to_the_groups() -> None:
    """peft's down map reads all groups, so that its update is no grouped kernel and cannot be merged; ours can."""
    model, adapter, bare = twins(trimtab.LoRA(rank=4, alpha=6, targets="grouped"))
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["grouped"]))
    layer, leaf = wrapped.base_model.model.grouped, leaf_at(adapter, "grouped")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (r, in, k, k), (out, r/groups, 1, 1)
    inside = torch.zeros(2, 2, 2, 3, 3, 3, dtype=torch.bool)  # (groups, r/groups, groups, in/groups, k, k)
    inside[0, :, 0] = inside[1, :, 1] = True
    pair_of_a = Pair(leaf.A, A, lambda tensor: tensor.flatten()[inside.flatten()].view(leaf.A.shape))
    pairs = [pair_of_a, reshaped(leaf.B, B)]
    randomise(pair.theirs for pair in pairs)
    with torch.no_grad():
        A.mul_(inside.view(A.shape))
    for pair in pairs:
        pair.copy()
    outputs = model(TOKENS), wrapped(TOKENS)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for output in outputs:
        torch.nn.functional.cross_entropy(output, LABELS).backward()
    for pair in pairs:
        torch.testing.assert_close(pair.ours.grad, pair.view(pair.theirs.grad), rtol=0, atol=1e-12)
        assert pair.ours.grad.abs().max() > 0
    adapter.merge()
    torch.testing.assert_close(model(TOKENS), outputs[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("initial", ["kaiming", "gaussian"])
def test_the_start_is_drawn_as_in_peft(initial: str) -> None:
    """Not the same numbers, but the same distribution: bounds and deviations of A, and zero B."""
    width, rank = 4096, 16
    layer = nn.Sequential(nn.Linear(width, 8))
    bare = copy.deepcopy(layer)
    adapter = trimtab.attach(layer, trimtab.LoRA(rank=8, initial=initial, targets="0"))
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights=True if initial == "kaiming" else "gaussian")
    theirs = peft.get_peft_model(bare, config).base_model.model[0].lora_A["default"].weight
    ours = leaf_at(adapter, "0").A
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=4 / math.sqrt(rank * width))
    if initial == "kaiming":
        assert ours.abs().max().item() == pytest.approx(1 / math.sqrt(width), rel=1e-3)
        assert theirs.abs().max().item() == pytest.approx(1 / math.sqrt(width), rel=1e-3)
    assert not leaf_at(adapter, "0").B.any()


def expert_pairs(adapter: trimtab.Adapter, wrapped: Any) -> list[Pair]:
    """Pair the factors of stacked experts; peft keeps them side by side in one linear map, B with the expert last."""
    (part,) = adapter.parts
    pairs = []
    for site, leaf in zip(part.sites, part.leaves, strict=True):
        layer = wrapped.base_model.model.get_submodule(site.path)
        while layer.parameter_name != site.parameter:
            layer = layer.base_layer
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        experts, rank = leaf.A.shape[:2]

        def view_up(tensor: Tensor, experts: int = experts, rank: int = rank) -> Tensor:
            return tensor.reshape(-1, rank, experts).permute(2, 0, 1)

        pairs += [reshaped(leaf.A, A), Pair(leaf.B, B, view_up)]
    return pairs


def test_stacked_experts_train_as_in_peft() -> None:
    zoo = mixtral()
    bare = copy.deepcopy(zoo.model)
    adapter = trimtab.attach(zoo.model, trimtab.LoRA(rank=3, alpha=6, targets="experts"))
    names = sorted({site.parameter for part in adapter.parts for site in part.sites})
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=[f"experts.{n}" for n in names])
    wrapped = peft.get_peft_model(bare, config)
    pairs = expert_pairs(adapter, wrapped)
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped) > 0
    losses = [zoo.loss(), zoo.loss(wrapped)]
    torch.testing.assert_close(
        losses[0], losses[1], rtol=0, atol=1e-5
    )  # float32: torch's grouped products know no more
    for loss in losses:
        loss.backward()
    for pair in pairs:
        torch.testing.assert_close(pair.ours.grad, pair.view(pair.theirs.grad), rtol=1e-4, atol=1e-5)
        assert pair.ours.grad.abs().max() > 1e-2


@pytest.mark.parametrize("method", [trimtab.LoRA(rank=2, b_lr_ratio=16.0), trimtab.LoRAPlus(rank=2)])
def test_loraplus_groups_are_those_of_peft(method: Any) -> None:
    places = ("linear", "transposed", "plain")
    _, adapter, bare = twins(replace(method, targets=" | ".join(places)))
    wrapped = peft.get_peft_model(bare, peft.LoraConfig(r=2, target_modules=list(places)))
    optimizer = loraplus.create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    pairs = lora_pairs(adapter, wrapped, places)
    theirs = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    groups = adapter.parameter_groups(lr=1e-3, weight_decay=0.1)
    ours = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(ours) == len(pairs) == 6
    for pair in pairs:
        assert ours[id(pair.ours)] == pytest.approx(theirs[id(pair.theirs)])
    assert {lr for lr, _ in ours.values()} == {1e-3, 16e-3}


def test_dropout_acts_on_the_input_of_the_update() -> None:
    """The update is linear in its input, so the mean over many draws is the output without dropout."""
    model, adapter, _ = twins(trimtab.LoRA(rank=2, dropout=0.5, targets="head"))
    randomise([leaf_at(adapter, "head").B])
    model.eval()
    expected = model(TOKENS)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model(TOKENS) for _ in range(2000)])
    assert draws.std(0).max() > 0
    error = (draws.mean(0) - expected).abs()
    assert (error < 5 * draws.std(0) / math.sqrt(2000) + 1e-12).all()
