"""Processes forked from one that has imported everything: a whole program runs in a second instead of ten.

The parent of them all uses one thread and no process group, so that forking it is safe; it ends with this process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

PRELOADED = ["kills", "test_cli", "trimtab.cli.main", "trimtab.interop.transformers", "torch.distributed.fsdp"]
SECONDS = 60.0
"""A group of processes that has not ended by then hangs."""


@cache
def context() -> Any:
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(PRELOADED)
    return chosen


def start(function: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Start a process that runs `function`, which other processes can import."""
    process = context().Process(target=_enter, args=(dict(environment or {}), function, arguments))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the parent of all of them imports torch
    try:
        process.start()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return process


def call(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """Return what `function` returns in a process of its own."""
    return together(function, *arguments, world=1, environment=environment)[0]


def together(
    function: Callable[..., Any], *arguments: Any, world: int = 2, environment: Mapping[str, str] | None = None,
    seconds: float = SECONDS,
) -> list[Any]:  # fmt: skip
    """Return what `function` returns in each of `world` processes that torchrun would have started.

    Raises AssertionError with the traceback where one fails or the group hangs; none of them is left running.
    """
    with tempfile.TemporaryDirectory() as folder:
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        shared |= {"ACCELERATE_USE_CPU": "true", **(environment or {})}
        processes = []
        for rank in range(world):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if world > 1 else dict(environment or {})
            place = Path(folder, str(rank))
            processes.append(start(_answer, place, function, arguments, environment=own))
        try:
            for process in processes:
                process.join(seconds)
            assert all(process.exitcode is not None for process in processes), f"hangs after {seconds} s"
        finally:
            for process in processes:
                with contextlib.suppress(ValueError):
                    process.kill()
        answers = [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]
    failures = [text for worked, text in answers if not worked]
    assert not failures, failures[0]
    return [answer for _, answer in answers]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _enter(environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*arguments)


def _answer(place: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch.distributed

    try:
        answer = (True, function(*arguments))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it is, the caller raises it
        answer = (False, traceback.format_exc())
    place.write_bytes(pickle.dumps(answer))
