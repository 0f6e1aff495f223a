"""Gallery of pains, 24 to 28: speed, memory and compilation.

Each test does what the users of the thread in its name did; `tests/gallery.py` makes docs/pains.md from these tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import leaks
import trimtab as tt
from adapting import moved
from test_selection_methods import Saved
from trimtab.storage import refill
from zoo import ZOO

NEAR = {"rtol": 1e-4, "atol": 1e-5}
LORA = tt.LoRA(rank=2)


def wide_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Wide enough for a rank of 8 to be small beside it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=344,
        use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(64, (2, 32))
    return transformers.LlamaForCausalLM(config).train(), {"input_ids": tokens, "labels": tokens}


def saved_bytes(method: tt.Method | None) -> int:
    """What one forward keeps for the backward pass: full tuning without a method, else with the method attached."""
    model, inputs = wide_llama()
    if method is not None:
        tt.attach(model, method)
    with Saved(model) as saved:
        model(**inputs)
    return saved.bytes


def test_peft_960_adapters_keep_less_for_backward_than_full_fine_tuning() -> None:
    """24. LoRA is slower than full fine-tuning, and with dropout it even needs more memory.

    Base and update are one function that keeps its input once; dropout adds one bit for each number. Step times stand
    in docs/performance.md.
    Threads: peft#960, peft#925, peft#245
    """
    full = saved_bytes(None)
    plain, dropped = saved_bytes(tt.LoRA(rank=8)), saved_bytes(tt.LoRA(rank=8, dropout=0.1))
    assert plain < full
    assert dropped < full
    assert plain < dropped < 1.15 * plain


def test_peft_1474_dora_keeps_no_dense_weight_for_backward() -> None:
    """25. DoRA is 1.5 to 2 times slower than LoRA, and keeps dense intermediates.

    The norm is computed without keeping the weight: what is kept is that of LoRA and vectors. Step times stand in
    docs/performance.md.
    Threads: peft#1474, peft#2651, h2o-llmstudio#709
    """
    model, inputs = wide_llama()
    weights = {tuple(leaf.target.weight.shape) for leaf in tt.attach(model, tt.DoRA(rank=8)).leaves()}
    with Saved(model) as saved:
        model(**inputs)
    kept = {tuple(tensor.shape) for tensor in saved.tensors.values()}
    assert kept
    assert not kept & (weights | {shape[::-1] for shape in weights})
    assert saved.bytes < 1.6 * saved_bytes(tt.LoRA(rank=8))


def calls(action: Callable[[], object]) -> int:
    """How many Python functions the action calls: a cost that does not depend on the machine."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_peft_981_the_sixtieth_adapter_costs_what_the_first_does(tmp_path: Path) -> None:
    """26. Attaching and loading take longer with every adapter that is there already.

    An attach or load calls the functions that its own places need, whatever the model holds; docs/reliability.md has
    the times.
    Threads: peft#981, peft#3039, qlora#208, diffusers#8953, diffusers#5676
    """
    entry = ZOO["llama"](0, 0.0)
    file = moved(entry.model, LORA, "file").save(tmp_path / "a.safetensors")
    tt.adapters(entry.model)["file"].detach()
    costs = []
    for index in range(60):
        attached = calls(lambda index=index: tt.attach(entry.model, LORA, f"a{index}"))
        tt.adapters(entry.model)[f"a{index}"].detach()
        costs.append((attached, calls(lambda index=index: tt.load(entry.model, file, f"a{index}"))))
    assert len(tt.adapters(entry.model)) == 60
    assert costs[-1][0] <= 1.2 * costs[1][0]
    assert costs[-1][1] <= 1.2 * costs[1][1]


@pytest.mark.parametrize("action", ["attach_detach", "generate"])
def test_torchtune_904_memory_comes_back(action: str) -> None:
    """27. Memory stays after an adapter is gone, or grows with every forward; a cache holds the model.

    Attaching and detaching, forwards and generation leave no tensor, byte, hook, class or object behind.
    Threads: torchtune#904, peft#738, peft#2221, peft#3625
    """
    assert leaks.excess(leaks.growth(action, "LoRA", rounds=5, traced=False), rounds=5) == {}


@pytest.mark.parametrize(
    "method", [tt.LoRA(rank=2), tt.DoRA(rank=2), tt.IA3(targets="0 | 3")], ids=lambda m: type(m).__name__
)
def test_peft_1199_other_numbers_do_not_compile_again(method: tt.Method, tmp_path: Path) -> None:
    """28. torch.compile breaks the graph, or compiles again with every adapter.

    A forward has no branch on data: one graph, and the numbers of another adapter run in the same one.
    Threads: peft#1199, pytorch#141039, diffusers#9279, peft#2611
    """
    entry = ZOO["mlp"](0, 0.0)
    adapter = moved(entry.model, method)
    other = ZOO["mlp"](0, 0.0)
    file = moved(other.model, method, seed=1).save(tmp_path)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(entry.model, backend=counter, fullgraph=True)
    first = compiled(**entry.inputs)
    torch.testing.assert_close(first, entry.output(), **NEAR)
    refill(adapter, file)
    second = compiled(**entry.inputs)
    torch.testing.assert_close(second, other.output(), **NEAR)
    assert not torch.allclose(first, second, atol=1e-3)
    assert counter.frame_count == 1


def test_peft_3020_dropout_is_the_same_in_a_recomputed_forward() -> None:
    """28. Dropout with checkpointing: the recomputation draws other numbers, or breaks the graph.

    A recomputed forward has the dropout of the first one: the gradients are those without checkpointing.
    Threads: peft#3020
    """
    gradients = []
    for use in (False, True):
        entry = ZOO["mlp"](0, 0.0)
        adapter = moved(entry.model.train(), tt.LoRA(rank=2, dropout=0.5))
        x = entry.inputs["input"]
        torch.manual_seed(0)
        output = checkpoint(entry.model, x, use_reentrant=False) if use else entry.model(x)
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
