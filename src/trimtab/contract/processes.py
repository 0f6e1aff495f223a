"""Invariants across processes, each one batch for many methods and models: loading, DDP, FSDP2.

Methods and cases are sent to the other processes: a method's class must be importable there.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trimtab.adapter import Adapter
from trimtab.adapter_file import file_bytes
from trimtab.attach import adapters
from trimtab.contract.case import (
    Case,
    expect_near,
    expect_near_gradients,
    expect_same,
    gradients,
    objective,
    trained,
)
from trimtab.contract.report import Outcome, outcome_of
from trimtab.method import Method
from trimtab.storage import load
from trimtab.structure import Structure

Job = tuple[Method, Case]
WORLD = 2


def loads_in_a_new_process(jobs: Sequence[Job]) -> list[Outcome]:
    """Load adapters saved here in one new process: tensors and outputs must have the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        ready: list[tuple[Job, Path]] = []
        outcomes: list[Outcome] = []
        for number, (method, case) in enumerate(jobs):
            place = Path(folder) / str(number)
            outcome = outcome_of(partial(_save, place), method, case, "loads_in_a_new_process")
            if outcome.result == "held":
                ready.append(((method, case), place))
            else:
                outcomes.append(outcome)
        return outcomes + _run(_load_all, Path(folder), ready, 1)


def _save(place: Path, method: Method, case: Case) -> None:
    adapter = trained(case, method)
    adapter.save(place)
    expected = file_bytes({"output": case.output(adapter.model).contiguous()})
    (place / "expected.safetensors").write_bytes(expected)


def _load_all(rank: int, folder: Path, work: list[tuple[Job, Path]]) -> None:
    torch.set_num_threads(1)
    outcomes = [
        outcome_of(partial(_loads, place), method, case, "loads_in_a_new_process") for (method, case), place in work
    ]
    _write(folder, outcomes)


def _loads(place: Path, method: Method, case: Case) -> None:
    expected = safetensors.torch.load_file(place / "expected.safetensors")["output"]
    expect_same("the output in a new process", case.output(load(case.build(), place).model), expected)


def trains_distributed(jobs: Sequence[Job]) -> list[Outcome]:
    """Train in two processes with DistributedDataParallel and with fully_shard: same losses and gradients as in one."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(_distribute_all, Path(folder), [(job, Path(folder)) for job in jobs], WORLD)


def _run(worker: Callable[..., None], folder: Path, work: list[tuple[Job, Path]], world: int) -> list[Outcome]:
    if not work:
        return []
    _spawn(worker, folder, work, world)
    return [Outcome(*fields) for fields in json.loads((folder / "outcomes.json").read_text(encoding="utf-8"))]


def _spawn(worker: Callable[..., None], folder: Path, work: list[tuple[Job, Path]], world: int) -> None:
    """Run the processes, whose notices (of torch and torchao, while they start and train) are shown if one fails."""
    said = folder / "stderr.txt"
    with _stderr_to(said):  # which they inherit as they start
        started = multiprocessing.spawn(worker, args=(folder, work), nprocs=world, join=False)  # type: ignore[no-untyped-call,attr-defined]
    try:
        while not started.join():
            pass
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:  # type: ignore[attr-defined]
        text = said.read_text(encoding="utf-8", errors="replace").strip()
        raise RuntimeError(f"{str(error).strip()}\n\nWhat the processes wrote before:\n{text}") from error


@contextlib.contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """Let the processes that are started meanwhile write their standard error to a file."""
    if os.name == "posix":
        resource_tracker.ensure_running()  # it outlives the others, and would go on writing to the file
    kept = os.dup(2)
    try:
        with file.open("ab") as stream:
            os.dup2(stream.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    rows = [(o.invariant, o.method, o.case, o.result, o.detail) for o in outcomes]
    (folder / "outcomes.json").write_text(json.dumps(rows), encoding="utf-8")


def _distribute_all(rank: int, folder: Path, work: list[tuple[Job, Path]]) -> None:
    with process_group(rank, folder):
        outcomes = [
            outcome_of(check, method, case, name)
            for (method, case), _ in work
            for name, check in (("trains_with_ddp", _trains_with_ddp), ("trains_with_fsdp2", _trains_with_fsdp2))
        ]
    if rank == 0:
        _write(folder, outcomes)


@contextlib.contextmanager
def process_group(rank: int, folder: str | Path) -> Iterator[None]:
    """Join WORLD processes that meet in `folder`; they leave together, since one that leaves early aborts the rest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    yield
    gc.collect()  # what wraps a model holds threads of the group
    dist.barrier()
    dist.destroy_process_group()


def _row(case: Case, row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in case.inputs.items()}


def _trains_with_ddp(method: Method, case: Case) -> None:
    """Each process trains on its own row; the gradients are the mean of both rows'."""
    adapter = trained(case, method)
    rows = [gradients(adapter, objective(case.forward(adapter.model, _row(case, row)))) for row in range(WORLD)]
    expected = {name: (rows[0][name] + rows[1][name]) / WORLD for name in rows[0]}
    parallel = nn.parallel.DistributedDataParallel(adapter.model, find_unused_parameters=True)
    objective(case.forward(parallel, _row(case, dist.get_rank()))).backward()  # type: ignore[no-untyped-call]
    expect_near_gradients("with DistributedDataParallel", _stored_gradients(adapter), expected, case.derived)


def _trains_with_fsdp2(method: Method, case: Case) -> None:
    """Attached and then sharded, output and gradients are those of the whole model."""
    adapter = trained(case, method)
    twin = copy.deepcopy(adapter.model)
    plain = case.forward(adapter.model)
    expected = gradients(adapter, objective(plain))
    shard(twin)
    output = case.forward(twin)
    expect_near("the output when sharded", output.detach(), plain.detach(), case.rounding)
    objective(output).backward()  # type: ignore[no-untyped-call]
    found = _stored_gradients(adapters(twin)[adapter.name])
    expect_near_gradients("with fully_shard", found, expected, case.derived)


def shard(model: nn.Module) -> None:
    """Shard every block, and the model, over the processes of the default group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    structure = Structure(model)
    for path in structure.blocks:
        fully_shard(structure.modules[path], mesh=mesh)
    fully_shard(model, mesh=mesh)


def _stored_gradients(adapter: Adapter) -> dict[str, Tensor]:
    """The whole gradient of every parameter, zero where none has arrived."""
    found: dict[str, Tensor] = {}
    for name, parameter in adapter.named_parameters():
        gradient: Any = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found
