"""What the golden tests of prefixes and prompts share: live peft beside ours on one base, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import trimtab
from zoo import BATCH, LENGTH, ZOO

VIRTUAL_TOKENS = 3
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
MOVED_POSITIONS = ("bert", "gpt2", "llama")  # T5 knows distances only


@dataclass
class Pair:
    """The same base twice: with peft's tuner, and with ours, whose tensors were copied from peft's table."""

    theirs: nn.Module
    table: nn.Parameter
    ours: nn.Module
    adapter: trimtab.Adapter
    inputs: dict[str, Tensor]


def right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The zoo's inputs with the padding of the second row moved to the right, where learned positions expect it."""
    changed = dict(inputs)
    mask = inputs["attention_mask"]
    for name in ("input_ids", "attention_mask", "labels"):
        if name in inputs and inputs[name].shape == mask.shape and mask[1, 0] == 0:
            changed[name] = inputs[name].clone()
            changed[name][1] = inputs[name][1].roll(-2)
    return changed


def positions_after(prompt: int) -> Tensor:
    """The positions peft gives to the real tokens."""
    return torch.arange(prompt, prompt + LENGTH).expand(BATCH, -1)


def make_pair(
    name: str,
    config: peft.PeftConfig,
    method: trimtab.Method,
    copy_table: Callable[[Tensor, trimtab.Adapter], None],
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> Pair:
    entry = ZOO[name](3, 0.0)
    prepare(entry.model)
    ours = copy.deepcopy(entry.model)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(entry.model, config).eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    for parameter in theirs.parameters():
        parameter.requires_grad_(parameter is table)
    adapter = trimtab.attach(ours, method)
    with torch.no_grad():
        table.mul_(0.5)  # N(0, 1) saturates attention at this width
        copy_table(table, adapter)
    return Pair(theirs, table, ours, adapter, right_padded(entry.inputs))


def token_mask(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Where logits are compared: real tokens; everything where there is one prediction for each row or target."""
    if logits.dim() == 3 and logits.shape[1] == LENGTH:
        return inputs["attention_mask"].bool()
    return torch.ones(logits.shape[:-1], dtype=torch.bool)


def largest_difference(ours: Any, theirs: Any, inputs: dict[str, Tensor]) -> float:
    """The largest difference of the logits at real tokens; peft's logits still hold the prompt in front."""
    excess = theirs.logits.shape[1] - ours.logits.shape[1] if theirs.logits.dim() == 3 else 0
    expected = theirs.logits[:, excess:] if excess else theirs.logits
    mask = token_mask(inputs, ours.logits)
    return (ours.logits[mask] - expected[mask]).abs().max().item()


def train(model: nn.Module, parameters: list[Tensor], inputs: dict[str, Tensor], steps: int = 5) -> list[float]:
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
