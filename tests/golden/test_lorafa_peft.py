"""LoRA-FA against peft's optimizer (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import trimtab
from golden.peft_models import (
    LABELS,
    TOKENS,
    assert_gradients_are_those_of_differences,
    leaf_at,
    randomise,
    trainable_count,
    twins,
)

peft = pytest.importorskip("peft")
lorafa = pytest.importorskip("peft.optimizers.lorafa")

PLACES = ("linear", "transposed")
RANK, ALPHA = 3, 5


def train_beside(
    rank_stabilized: bool, dtype: torch.dtype, steps: int = 5
) -> tuple[list[float], list[float], list[float]]:
    """Train both; return, for each step, the largest difference of outputs, of B, and the size of B's change."""
    method = trimtab.LoRAFA(rank=RANK, alpha=ALPHA, rank_stabilized=rank_stabilized, targets=" | ".join(PLACES))
    model, adapter, bare = twins(method, dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=rank_stabilized, target_modules=list(PLACES))
    wrapped = peft.get_peft_model(bare, config)
    theirs = lorafa.create_lorafa_optimizer(wrapped, r=RANK, lora_alpha=ALPHA, lr=1e-2)
    theirs.param_groups[0]["eps"] = 0.0  # adds eps before the bias correction, torch's Adam after it
    assert adapter.trainable_count == trainable_count(wrapped) == RANK * (12 + 6)
    pairs = []
    for place in PLACES:
        leaf, layer = leaf_at(adapter, place), wrapped.base_model.model.get_submodule(place)
        randomise([layer.lora_A["default"].weight, layer.lora_B["default"].weight])
        with torch.no_grad():
            leaf.A.copy_(layer.lora_A["default"].weight)
            leaf.B.copy_(layer.lora_B["default"].weight)
        pairs.append((leaf.B, layer.lora_B["default"].weight, leaf.B.detach().clone()))
    ours = torch.optim.Adam(adapter.parameters(), lr=1e-2, eps=0.0)
    adapter.bind(ours, total_steps=steps)
    outputs, tensors, changes = [], [], []
    for _ in range(steps):
        results = []
        for network, optimizer in ((model, ours), (wrapped, theirs)):
            optimizer.zero_grad()
            results.append(network(TOKENS))
            F.cross_entropy(results[-1], LABELS).backward()
            optimizer.step()
        outputs.append(float((results[0] - results[1]).detach().abs().max()))
        tensors.append(max(float((one - two).detach().abs().max()) for one, two, _ in pairs))
        changes.append(max(float((one - start).detach().abs().max()) for one, _, start in pairs))
    return outputs, tensors, changes


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lorafa_trains_as_with_peft_s_optimizer(rank_stabilized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    outputs, tensors, changes = train_beside(rank_stabilized, torch.float64)
    assert max(outputs) < 1e-12
    assert max(tensors) < 1e-12
    assert changes[-1] > 1e-2


def test_peft_rounds_the_corrected_gradient_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, by autocast; without that, the two agree to float32's precision."""
    differences = {}
    for rounded in (False, True):
        monkeypatch.setattr(lorafa, "is_bf16_available", lambda rounded=rounded: rounded)
        _, tensors, changes = train_beside(False, torch.float32)
        differences[rounded] = max(tensors) / changes[-1]
    assert differences[False] < 1e-4
    assert 10 * differences[False] < differences[True] < 0.2


def test_the_correction_makes_the_nearest_step_to_full_fine_tuning() -> None:
    """Of all changes of B, the corrected gradient's moves ΔW nearest to the full gradient (least squares)."""
    model, adapter, _ = twins(trimtab.LoRAFA(rank=RANK, alpha=ALPHA, targets="linear"))
    leaf = leaf_at(adapter, "linear")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    adapter.bind(optimizer, total_steps=1)
    model.linear.weight.requires_grad_(True)
    F.cross_entropy(model(TOKENS), LABELS).backward()
    full = model.linear.weight.grad
    before = leaf.B.detach().clone()
    optimizer.step()
    s = ALPHA / RANK
    best = torch.linalg.lstsq(s * leaf.A.mT, full.mT).solution.mT  # min over G of ‖s·G·A − full‖
    torch.testing.assert_close(before - leaf.B, best, rtol=1e-5, atol=1e-9)


def test_without_the_correction_no_binding_is_needed() -> None:
    model, adapter, _ = twins(trimtab.LoRAFA(rank=RANK, gradient_correction=False, targets="linear"))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    leaf: Any = leaf_at(adapter, "linear")
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS), LABELS).backward()
        before = leaf.B.detach().clone()
        optimizer.step()
        torch.testing.assert_close(leaf.B, before - 0.1 * leaf.B.grad)


def test_gradients_are_those_of_differences() -> None:
    assert_gradients_are_those_of_differences(trimtab.LoRAFA(rank=RANK, alpha=ALPHA, targets="linear"))
