"""What lives in the process, counted before and after many rounds of one use: nothing may grow with the rounds."""

from __future__ import annotations

import gc
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trimtab as tt
from adapting import moved
from trimtab.adapter import Adapter
from zoo import ZOO, ZooModel

WARM_UP = 5  # rounds in which everything is made that is made once
BYTES_PER_ROUND = 48  # of Python's memory, whose own stores of free tuples and floats fill up slowly

METHODS: dict[str, tt.Method] = {
    "LoRA": tt.LoRA(rank=2, targets="all-linear | embedding"),
    "DoRA": tt.DoRA(rank=2),
    "AdaLoRA": tt.AdaLoRA(rank=2, warmup_steps=1, final_steps=1),
    "RandLoRA": tt.RandLoRA(rank=2),
    "PaCA": tt.PaCA(rank=2),
    "FullTuning": tt.FullTuning(targets="head | norm"),
    "ParallelAdapter": tt.ParallelAdapter(bottleneck=2),
    "IA3": tt.IA3(),
    "PrefixTuning": tt.PrefixTuning(length=2),
    "PromptTuning": tt.PromptTuning(length=2),
    "LadderSideTuning": tt.LadderSideTuning(reduction=4),
    "Compose": tt.Compose(tt.PrefixTuning(length=2), tt.LoRA(rank=2)),
}


@dataclass(frozen=True)
class Census:
    """What lives: tensors, bytes of their storages, hooks, classes, open files, objects and bytes of Python's own."""

    tensors: int
    tensor_bytes: int
    hooks: int
    classes: int
    files: int
    objects: int
    python_bytes: int

    def growth(self, later: Census) -> dict[str, int]:
        """Return by how much each count grew."""
        return {name: count - getattr(self, name) for name, count in asdict(later).items()}


def census(model: nn.Module) -> Census:
    """Count what lives in the process now; Python's bytes only while tracemalloc runs."""
    for _ in range(3):  # what one collection finalises, the next one frees
        gc.collect()
    python_bytes = tracemalloc.get_traced_memory()[0]
    found = gc.get_objects()
    tensors = [thing for thing in found if issubclass(type(thing), Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    classes = sum(issubclass(type(thing), type) for thing in found)
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    hooks = hook_count(model)
    return Census(len(tensors), sum(storages.values()), hooks, classes, files, len(found), python_bytes)


def hook_count(model: nn.Module) -> int:
    """Count the hooks on the modules and parameters of a model, and the global ones of all modules."""
    places = [vars(module) for module in model.modules()] + [vars(torch.nn.modules.module)]
    on_modules = sum(len(v) for facts in places for name, v in facts.items() if name.endswith("_hooks") and v)
    return on_modules + sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


@dataclass(frozen=True)
class Bench:
    """A model, a method that is attached to it in each round or beforehand, and a folder for files."""

    entry: ZooModel
    method: tt.Method
    folder: Path

    def adapter(self) -> Adapter:
        """The adapter that was attached beforehand."""
        return tt.adapters(self.entry.model)["kept"]


def train_step(bench: Bench, adapter: Adapter) -> None:
    """Bind the adapter to a fresh optimizer and make the first step of a run."""
    adapter.steps = 0
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-3))
    adapter.bind(optimizer, total_steps=8)
    bench.entry.loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def attach_detach(bench: Bench) -> None:
    adapter = tt.attach(bench.entry.model, bench.method, "passing")
    train_step(bench, adapter)
    adapter.detach()


def load_detach(bench: Bench) -> None:
    tt.load(bench.entry.model, bench.folder / "kept.safetensors", "passing").detach()


def save(bench: Bench) -> None:
    bench.adapter().save(bench.folder / "again")


def merge_unmerge(bench: Bench) -> None:
    bench.adapter().merge(untie=True)
    bench.adapter().unmerge()


def bind_release(bench: Bench) -> None:
    train_step(bench, bench.adapter())
    binding = bench.adapter().binding
    assert binding is not None
    binding.release()


def route(bench: Bench) -> None:
    config: Any = bench.entry.model.config
    config.use_cache = False  # rows of a batch share no cache
    with tt.route(bench.entry.model, ["kept", None, "kept"]):
        bench.entry.loss().backward()


def generate(bench: Bench) -> None:
    inputs = {name: bench.entry.inputs[name][:, :3] for name in ("input_ids", "attention_mask")}
    bench.entry.model.generate(**inputs, max_new_tokens=2, do_sample=False)  # type: ignore[operator]


ACTIONS: dict[str, Callable[[Bench], None]] = {
    action.__name__: action
    for action in (attach_detach, load_detach, save, merge_unmerge, bind_release, route, generate)
}
ALONE = ("attach_detach", "load_detach")  # actions that attach the method themselves


def applies(action: str, method: str) -> bool:
    """Whether the method takes part in the action at all."""
    promises = [part.promises() for part in METHODS[method].parts()]
    possible = {
        "merge_unmerge": all(promise.merge != "none" for promise in promises),
        "route": all(promise.routable for promise in promises),
        "generate": all(promise.cached_generation for promise in promises),
    }
    return possible.get(action, True)


def growth(action: str, method: str, rounds: int, traced: bool) -> dict[str, int]:
    """Return by how much each count of what lives grew in that many rounds.

    `traced` counts Python's bytes too, after as many rounds in which its stores of free objects fill up.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(ZOO["llama"](0, 0.0), METHODS[method], Path(folder))
        kept = moved(bench.entry.model, bench.method, "kept")
        if action in ALONE:
            kept.save(bench.folder / "kept.safetensors")
            kept.detach()
        del kept
        gc.collect()
        gc.freeze()  # libraries and model are left out of every count, which makes counting cheap
        if traced:
            tracemalloc.start()
        try:
            for _ in range(rounds if traced else WARM_UP):
                ACTIONS[action](bench)
            before = census(bench.entry.model)  # the first one makes dictionaries that modules had not needed
            before = census(bench.entry.model)
            for _ in range(rounds):
                ACTIONS[action](bench)
            return before.growth(census(bench.entry.model))
        finally:
            tracemalloc.stop()
            gc.unfreeze()


def excess(grown: dict[str, int], rounds: int) -> dict[str, int]:
    """Return the growths that a leak explains: any but those of Python's own memory by less than every second round."""
    allowed = {"python_bytes": BYTES_PER_ROUND * rounds, "objects": rounds // 2}
    return {name: amount for name, amount in grown.items() if amount > allowed.get(name, 0)}
