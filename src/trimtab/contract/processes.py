"""Invariants across processes, each one batch for many methods and models: loading, DDP, FSDP2.

Methods and cases are sent to the other processes: a method's class must be importable there.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from trimtab.adapter import Adapter
from trimtab.attach import attach
from trimtab.contract.case import (
    Case,
    attached,
    expect_near,
    expect_near_gradients,
    expect_same,
    gradients,
    objective,
    trained,
)
from trimtab.contract.report import Outcome, outcome_of
from trimtab.errors import AttachError
from trimtab.method import Method
from trimtab.storage import load
from trimtab.structure import Structure

Job = tuple[Method, Case]
Check = Callable[[Method, Case, Path], None]
WORLD = 2


def loads_in_a_new_process(jobs: Sequence[Job]) -> list[Outcome]:
    """Load adapters saved here in one new process: tensors and outputs must have the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        ready: list[tuple[Job, Path]] = []
        outcomes: list[Outcome] = []
        for number, (method, case) in enumerate(jobs):
            place = Path(folder) / str(number)
            outcome = outcome_of(lambda m, c, place=place: _save(m, c, place), method, case, "loads_in_a_new_process")
            if outcome.result == "held":
                ready.append(((method, case), place))
            else:
                outcomes.append(outcome)
        return outcomes + _run(_load_all, Path(folder), ready, 1)


def _save(method: Method, case: Case, place: Path) -> None:
    adapter = trained(case, method)
    adapter.save(place)
    safetensors.torch.save_file({"output": case.output(adapter.model).contiguous()}, place / "expected.safetensors")


def _load_all(rank: int, folder: Path, work: list[tuple[Job, Path]]) -> None:
    torch.set_num_threads(1)
    outcomes = [outcome_of(_loads(place), method, case, "loads_in_a_new_process") for (method, case), place in work]
    _write(folder, outcomes)


def _loads(place: Path) -> Callable[[Method, Case], None]:
    def check(method: Method, case: Case) -> None:
        expected = safetensors.torch.load_file(place / "expected.safetensors")["output"]
        expect_same("the output in a new process", case.output(load(case.build(), place).model), expected)

    return check


def trains_distributed(jobs: Sequence[Job]) -> list[Outcome]:
    """Train in two processes with DistributedDataParallel and with fully_shard: same losses and gradients as in one."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(_distribute_all, Path(folder), [(job, Path(folder)) for job in jobs], WORLD)


def _run(worker: Callable[..., None], folder: Path, work: list[tuple[Job, Path]], world: int) -> list[Outcome]:
    if not work:
        return []
    multiprocessing.spawn(worker, args=(folder, work), nprocs=world)  # type: ignore[no-untyped-call,attr-defined]
    return [Outcome(*fields) for fields in json.loads((folder / "outcomes.json").read_text(encoding="utf-8"))]


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    rows = [(o.invariant, o.method, o.case, o.result, o.detail) for o in outcomes]
    (folder / "outcomes.json").write_text(json.dumps(rows), encoding="utf-8")


def _distribute_all(rank: int, folder: Path, work: list[tuple[Job, Path]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    outcomes = [
        outcome_of(check, method, case, name)
        for (method, case), _ in work
        for name, check in (("trains_with_ddp", _trains_with_ddp), ("trains_with_fsdp2", _trains_with_fsdp2))
    ]
    if rank == 0:
        _write(folder, outcomes)
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
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in adapter.named_parameters()}
    expect_near_gradients("with DDP", found, expected, 1e-4)
    _expect_refused(parallel, method, case)


def _trains_with_fsdp2(method: Method, case: Case) -> None:
    """Attached and then sharded, loss and gradients are those of the whole model; sharded first, attaching stops."""
    from torch.distributed.fsdp import fully_shard

    adapter = trained(case, method)
    whole: Adapter = adapter
    twin = copy.deepcopy(adapter.model)
    plain = case.forward(whole.model)
    expected = gradients(whole, objective(plain))
    mesh = init_device_mesh("cpu", (WORLD,))
    _shard(twin, mesh, fully_shard)
    output = case.forward(twin)
    expect_near("the output when sharded", output.detach(), plain.detach())
    objective(output).backward()  # type: ignore[no-untyped-call]
    from trimtab.attach import adapters

    found = {
        name: torch.zeros(parameter.shape) if parameter.grad is None else _whole(parameter.grad)
        for name, parameter in adapters(twin)[adapter.name].named_parameters()
    }
    expect_near_gradients("with fully_shard", found, expected, 1e-4)
    base = case.build()
    _shard(base, mesh, fully_shard)
    _expect_refused(base, method, case)


def _shard(model: nn.Module, mesh: Any, fully_shard: Callable[..., Any]) -> None:
    structure = Structure(model)
    for path in structure.blocks:
        fully_shard(structure.modules[path], mesh=mesh)
    fully_shard(model, mesh=mesh)


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor()  # type: ignore[no-any-return]


def _expect_refused(model: nn.Module, method: Method, case: Case) -> None:
    try:
        attach(model, case.method(method), name="late")
    except AttachError as error:
        if "already distributed" in str(error):
            return
        raise
    raise AssertionError("attached to a model that is distributed already")
