"""AdaLoRA against peft (huggingface/peft, run live): outputs and gradients, and the whole schedule step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from golden.peft_models import (
    Pair,
    assert_same_training,
    leaf_at,
    randomise,
    reshaped,
    trainable_count,
    twins,
)

peft = pytest.importorskip("peft")

TOTAL, WARMUP, FINAL = 40, 5, 10


class TwoLayers(nn.Module):
    """Two linear maps and a loss in the output, where peft adds its penalty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(10, 12)
        self.second = nn.Linear(12, 7)

    def forward(self, features: Tensor, labels: Tensor) -> Any:
        logits = self.second(torch.tanh(self.first(features)))
        return LossOutput(F.mse_loss(logits, labels))


class LossOutput:
    """What transformers models return, as far as peft looks at it."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


def adalora_pairs(adapter: trimtab.Adapter, wrapped: Any, places: tuple[str, ...]) -> list[Pair]:
    """Pair A, E and B at each place; peft keeps E as a column."""
    pairs = []
    for place in places:
        layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
        pairs += [
            reshaped(leaf.A, layer.lora_A["default"]),
            reshaped(leaf.E, layer.lora_E["default"]),
            reshaped(leaf.B, layer.lora_B["default"]),
        ]
    return pairs


@pytest.mark.parametrize("place", ["linear", "transposed", "plain"])
def test_the_update_trains_as_in_peft(place: str) -> None:
    model, adapter, bare = twins(trimtab.AdaLoRA(rank=2, initial_rank=4, alpha=6, targets=place))
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, target_modules=[place], total_step=10, fan_in_fan_out=place == "transposed"
    )
    wrapped = peft.get_peft_model(bare, config)
    wrapped.base_model.model.get_submodule(place).ranknum.requires_grad_(False)  # trainable on all but float32 bases
    pairs = adalora_pairs(adapter, wrapped, (place,))
    randomise(pair.theirs for pair in pairs)
    for pair in pairs:
        pair.copy()
    assert adapter.trainable_count == trainable_count(wrapped)
    adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.1), total_steps=10)  # never stepped: no schedule here
    assert_same_training(model, wrapped, pairs, tolerance=1e-11)


@pytest.mark.parametrize(
    ("interval", "rank", "initial_rank", "orthogonality"), [(2, 3, 6, 0.1), (1, 1, 4, 0.5), (3, 2, 6, 0.0)]
)
def test_the_whole_run_is_that_of_peft(interval: int, rank: int, initial_rank: int, orthogonality: float) -> None:
    """Forty steps of the same training: budget, mask and every tensor are equal after each."""
    places = ("first", "second")
    model = TwoLayers().double()
    bare = copy.deepcopy(model)
    method = trimtab.AdaLoRA(
        rank=rank, initial_rank=initial_rank, alpha=8, interval=interval, warmup_steps=WARMUP, final_steps=FINAL,
        orthogonality=orthogonality, targets="first | second",
    )  # fmt: skip
    adapter = trimtab.attach(model, method, dtype=torch.float64)
    config = peft.AdaLoraConfig(
        init_r=initial_rank, target_r=rank, lora_alpha=8, deltaT=interval, tinit=WARMUP, tfinal=FINAL, total_step=TOTAL,
        orth_reg_weight=orthogonality, target_modules=list(places), peft_type="ADALORA",
    )  # fmt: skip
    wrapped = peft.get_peft_model(bare, config)
    pairs = adalora_pairs(adapter, wrapped, places)
    for pair in pairs:
        pair.copy()
    ours = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.0)
    theirs = torch.optim.AdamW([pair.theirs for pair in pairs], lr=0.02, weight_decay=0.0)
    adapter.bind(ours, total_steps=TOTAL)
    generator = torch.Generator().manual_seed(3)
    kept = []
    for step in range(TOTAL):
        features = torch.randn(16, 10, generator=generator, dtype=torch.float64)
        labels = torch.randn(16, 7, generator=generator, dtype=torch.float64)
        ours.zero_grad()
        model(features, labels).loss.backward()
        ours.step()
        theirs.zero_grad()
        wrapped.base_model(features, labels).loss.backward()  # adds peft's penalty to the loss
        theirs.step()
        wrapped.base_model.update_and_allocate(step)
        for pair in pairs:
            torch.testing.assert_close(pair.ours, pair.view(pair.theirs), rtol=0, atol=1e-9)
        masks = [(leaf_at(adapter, place).E != 0).tolist() for place in places]
        layers = [wrapped.base_model.model.get_submodule(place) for place in places]
        assert masks == [(layer.lora_E["default"] != 0).view(-1).tolist() for layer in layers]
        kept.append(sum(map(sum, masks)))
    pattern = wrapped.peft_config["default"].rank_pattern
    assert [pattern[name] for name in sorted(pattern)] == masks
    assert kept[TOTAL - FINAL :] == [2 * rank] * FINAL
    if (interval, rank, initial_rank) == (2, 3, 6):
        assert [kept[step] for step in (5, 6, 8, 30)] == [12, 11, 10, 6]
        assert kept[7] == kept[9] == 12  # what was pruned grows back until the final phase
