"""What the speed benchmarks share: a random Llama, contenders, paired timing, and bytes held for the backward pass."""

from __future__ import annotations

import copy
import gc
import platform
import random
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import trimtab as tt
from trimtab.adapter_file import write_atomically

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HEADS, VOCABULARY, BATCH, LENGTH = 4, 8, 2048, 4, 128


@dataclass(frozen=True)
class Contender:
    """One way to train the same base on the same batch; `step` is forward, backward and optimizer step."""

    name: str
    model: nn.Module
    step: Callable[[], None]
    forward: Callable[[], Tensor]


def random_llama(width: int, layers: int = LAYERS, seed: int = 0) -> nn.Module:
    """Return a small random Llama in training mode; its feed-forward is 2.7 times as wide as the model, as Llama's."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def random_tokens(rows: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Return token ids (rows, length)."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def contender(name: str, model: nn.Module, tokens: Tensor) -> Contender:
    """Return a contender that trains whatever of the model requires a gradient, with AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def forward() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return Contender(name, model, step, forward)


def frozen_floor(base: nn.Module) -> nn.Module:
    """Return a copy of which only the first norm trains: gradient flows through all of it, no weight learns."""
    model = copy.deepcopy(base).requires_grad_(False)
    model.get_submodule("model.layers.0.input_layernorm").requires_grad_(True)
    return model


def with_method(base: nn.Module, method: tt.Method) -> nn.Module:
    """Return a copy of the base with a method attached."""
    model = copy.deepcopy(base)
    tt.attach(model, method)
    return model


def with_peft(base: nn.Module, dropout: float = 0.0, use_dora: bool = False, rank: int = 8) -> nn.Module:
    """Return a copy of the base with huggingface/peft's LoRA on all linear layers but the head."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=dropout, use_dora=use_dora, target_modules="all-linear"
    )
    return peft.get_peft_model(copy.deepcopy(base), config)


def paired_seconds(actions: Sequence[Callable[[], object]], rounds: int, seed: int = 0) -> list[list[float]]:
    """Return seconds of processor time by action and round; every round runs all actions in a new random order."""
    shuffled = random.Random(seed)
    seconds: list[list[float]] = [[] for _ in actions]
    for action in actions:  # warm up: allocator, generated classes, optimizer state
        action()
        action()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order = list(range(len(actions)))
            shuffled.shuffle(order)
            for index in order:
                start = time.process_time()
                actions[index]()
                seconds[index].append(time.process_time() - start)
    finally:
        gc.enable()
    return seconds


def median_ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over rounds of seconds / reference."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


def spread(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Return half the width of the middle half of the rounds' ratios: how far a single round lies from the median."""
    first, _, third = statistics.quantiles([a / b for a, b in zip(seconds, reference, strict=True)], n=4)
    return (third - first) / 2


@dataclass(eq=False)
class _Kept:
    """What autograd holds in place of a saved tensor; it lives as long as the graph's node does."""

    tensor: Tensor


def saved_bytes(contender: Contender) -> int:
    """Return the bytes of distinct storages that one forward keeps for the backward pass, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*contender.model.parameters(), *contender.model.buffers())}
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        holder = _Kept(tensor)
        kept.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = contender.forward()
    gc.collect()  # parts of the graph that nothing leads back to are gone now
    storages = {s.data_ptr(): s.nbytes() for s in (holder.tensor.untyped_storage() for holder in kept)}
    total = sum(size for address, size in storages.items() if address not in own)
    del loss
    return total


def write_section(name: str, text: str) -> None:
    """Put a benchmark's text between its two marks in docs/performance.md, in place of the earlier one."""
    file = ROOT / "docs" / "performance.md"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    page = file.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{file} lacks the marks {begin!r} and {end!r}, between which the figures belong.")
    write_atomically(file, f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}".encode())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions() -> str:
    """Return date, commit, versions and processor, for a table's caption."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    python = platform.python_version()
    return f"{date.today()}, commit {commit()}; Python {python}, {packages}; {processor()}, one thread used"


def commit() -> str:
    """Return the short name of the commit, and whether the sources differ from it."""
    changed = " with uncommitted changes" if _git("status", "--porcelain", "src") else ""
    return _git("rev-parse", "--short", "HEAD") + changed


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """Return the processor's name and number of cores."""
    facts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"
