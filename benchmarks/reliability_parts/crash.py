"""Saving while the process is killed or the disk fails.

An adapter of 2 MiB is saved over an existing one. A process is forked from a warm parent and killed (`kill -9`) at a
random moment of its save, and, in a second run, at every system call of it. Afterwards the file must be the old
version or the new one: it is read with its checksum, loaded onto the model, and each of its numbers and its header must
name the same version. Then every system call of a save fails once for each of several causes: the error must name file
and cause, the old file must be the same bytes, and nothing else may lie in the folder.

What a killed save leaves behind is a hidden file such as `.adapter.safetensors.….part`. Nothing reads it; a later save
of the same adapter removes those that are older than an hour (a younger one may belong to a save that goes on now).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import os
import random
import resource
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import trimtab as tt
from reliability_parts import Row
from trimtab.adapter_file import read_adapter_file

PIECE = 2**18  # bytes that one call writes where every call is to be hit
CAUSES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
FILE_NAME = "versions.safetensors"
CALLS = ("open", "fsync", "chmod", "replace", "close")
"""Functions of `os` that a save calls, beside writing; the temporary file is made by the first call of `open`."""


class WrittenInPieces(io.FileIO):
    """A file that calls `act("write", n)` before the n-th write, and of each writes a piece at most."""

    def __init__(self, handle: int, act: Callable[[str, int], object], piece: int) -> None:
        super().__init__(handle, "wb")
        self.act, self.piece, self.number = act, piece, 0

    def write(self, data: Any) -> int:
        self.number += 1
        self.act("write", self.number)
        return super().write(memoryview(data)[: self.piece])


class Versions:
    """An adapter in a folder, whose every number, and an entry of its header, is the number of its version."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16))
        self.other_model = copy.deepcopy(self.model)
        self.adapter = tt.attach(self.model, tt.LoRA(rank=256))
        self.folder, self.file = folder, folder / FILE_NAME

    def save(self, version: int) -> None:
        with torch.no_grad():
            for _, tensor, _ in self.adapter.named_tensors():
                tensor.fill_(float(version))
        self.adapter.lineage = (str(version),)
        self.adapter.save(self.file)

    def read(self) -> int:
        """Return the version that the file holds, having loaded it; raises where it is unreadable or a mixture."""
        header, tensors = read_adapter_file(self.file)
        version = int(header["lineage"][0])
        if any(bool((tensor != version).any()) for tensor in tensors.values()):
            raise ValueError(f"the header says version {version}, the tensors hold others")
        loaded = tt.load(self.other_model, self.file)
        if any(bool((tensor != version).any()) for _, tensor, _ in loaded.named_tensors()):
            raise ValueError(f"loaded tensors are not of version {version}")
        loaded.detach()
        return version

    def parts(self) -> list[Path]:
        return list(self.folder.glob(".*.part"))


@dataclass
class Tally:
    """What was found after each kill."""

    old: int = 0
    new: int = 0
    midway: int = 0
    finished: int = 0
    broken: int = 0

    @property
    def kills(self) -> int:
        return self.old + self.new + self.broken


def forked(action: Callable[[], object], started: Callable[[int], object]) -> int:
    """Run `action` in a forked process, call `started(pid)` when it begins, and return how the process ended."""
    ready, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            os.write(begin, b"x")
            action()
            status = 0
        os._exit(status)
    os.close(begin)
    os.read(ready, 1)
    os.close(ready)
    started(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count(tally: Tally, versions: Versions, before: int, ended: int) -> int:
    """Add to the tally what a save of the version after `before` left; returns the version that is there now."""
    parts = versions.parts()
    tally.midway += bool(parts)
    tally.finished += ended == 0
    for part in parts:
        part.unlink()
    try:
        found = versions.read()
    except (tt.AdapterFileError, ValueError):
        found = -1
    if found not in (before, before + 1) or ended not in (0, -signal.SIGKILL):
        tally.broken += 1
        versions.save(before)
        return before
    tally.old += found == before
    tally.new += found == before + 1
    return found


def kills_at_random_moments(folder: Path, kills: int, seed: int = 0) -> Tally:
    """Kill a save that many times, each at a moment drawn evenly from 1.1 times the length of a whole save."""
    versions, version, tally, draw = Versions(folder), 0, Tally(), random.Random(seed)
    versions.save(version)
    starts, ends = [], []
    for _ in range(5):
        forked(lambda: versions.save(version), lambda pid: starts.append(time.perf_counter()))
        ends.append(time.perf_counter())
    length = 1.1 * statistics.median(end - start for start, end in zip(starts, ends, strict=True))
    for _ in range(kills):

        def kill(pid: int) -> None:
            time.sleep(draw.uniform(0, length))
            os.kill(pid, signal.SIGKILL)

        ended = forked(partial(versions.save, version + 1), kill)
        version = count(tally, versions, version, ended)
    return tally


@contextlib.contextmanager
def intercepted(act: Callable[[str, int], object], piece: int = PIECE) -> Iterator[None]:
    """Call `act(name, n)` before the n-th write and the n-th call of each function in CALLS, in the saves inside."""
    numbers = dict.fromkeys(CALLS, 0)

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            numbers[name] += 1
            act(name, numbers[name])
            return original(*arguments, **options)

        return call

    def opened(handle: int, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(WrittenInPieces(handle, act, piece))

    with contextlib.ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(patch.object(os, name, wrapped(name, getattr(os, name))))
        stack.enter_context(patch.object(os, "fdopen", opened))
        yield


def calls_of_a_save(versions: Versions, version: int) -> list[tuple[str, int]]:
    """Return (name, n) of every call of a save, in order."""
    made: list[tuple[str, int]] = []
    with intercepted(lambda name, n: made.append((name, n))):
        versions.save(version)
    return made


def kills_at_every_call(folder: Path) -> Tally:
    """Kill a save before each of its system calls in turn."""
    versions, version, tally = Versions(folder), 0, Tally()
    versions.save(version)
    for call in calls_of_a_save(versions, version):

        def act(name: str, n: int, call: tuple[str, int] = call) -> None:
            if (name, n) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        def save(act: Callable[[str, int], object] = act, new: int = version + 1) -> None:
            with intercepted(act):
                versions.save(new)

        version = count(tally, versions, version, forked(save, lambda pid: None))
    return tally


def faults(folder: Path, causes: tuple[int, ...] = CAUSES) -> tuple[int, list[str]]:
    """Let each call of a save fail once for each cause; returns how many were tried, and what did not hold."""
    versions = Versions(folder)
    versions.save(0)
    calls = calls_of_a_save(versions, 0)
    before, wrong = versions.file.read_bytes(), []
    for call in calls:
        for cause in causes:
            if problem := fault(
                versions, call, cause, before, flushed=call in calls[calls.index(("replace", 1)) + 1 :]
            ):
                wrong.append(f"{call} {errno.errorcode[cause]}: {problem}")
            if versions.file.read_bytes() != before:
                versions.save(0)
    return len(calls) * len(causes), wrong


def fault(versions: Versions, call: tuple[str, int], cause: int, before: bytes, flushed: bool) -> str:
    """Return what does not hold when that call of a save of version 1 fails, or nothing.

    `flushed`: the call comes after the rename, when only the folder is still flushed: the new file is there then, and
    the error says that.
    """

    def act(name: str, n: int) -> None:
        if (name, n) == call:
            raise OSError(cause, os.strerror(cause))

    try:
        with intercepted(act):
            versions.save(1)
    except tt.AdapterFileError as error:
        text = str(error)
    else:
        return "no error"
    if os.strerror(cause) not in text or str(versions.file) not in text:
        return f"the error does not name file and cause: {text}"
    if [path.name for path in versions.folder.iterdir()] != [FILE_NAME]:
        return f"litter: {sorted(path.name for path in versions.folder.iterdir())}"
    if flushed:
        return "" if "is written, but" in text and versions.read() == 1 else f"after the rename: {text}"
    return "" if versions.file.read_bytes() == before else "the old file has changed"


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel writes up to that offset of a file, then refuses: a short write and an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """Mount a disk of that size at the folder, and yield whether that was possible (it takes the right to mount)."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def tally_row(what: str, tally: Tally) -> Row:
    measured = (
        f"{tally.kills:,} killed: {tally.old:,} old, {tally.new:,} new, {tally.broken} unreadable or mixed; "
        f"{tally.midway:,} were midway (a temporary file was left)"
    )
    return Row(what, "always the old file or the new one, whole", measured, tally.broken == 0 and tally.midway > 0)


def real_failures(folder: Path) -> Iterator[Row]:
    """Failures that the system itself makes."""
    versions = Versions(folder)
    versions.save(0)
    before = versions.file.read_bytes()

    def row(what: str, cause: int) -> Row:
        try:
            versions.save(1)
            text = "no error"
        except tt.AdapterFileError as error:
            text = str(error)
        kept = versions.file.read_bytes() == before and not versions.parts()
        holds = kept and os.strerror(cause) in text and str(versions.file) in text
        measured = "old file the same bytes, nothing left, " if kept else "old file or folder has changed, "
        cause_text = f"error names file and {os.strerror(cause)!r}" if holds else f"error: {text}"
        return Row(what, "old file intact, one clear error", measured + cause_text, holds)

    with file_size_limit(2**20):
        yield row("file size limit of the kernel after 1 MiB", errno.EFBIG)
    with small_disk(folder / "disk", len(before) * 3 // 2) as mounted:
        if mounted:
            versions.file = folder / "disk" / FILE_NAME
            versions.folder = folder / "disk"
            versions.save(0)
            yield row("full disk (tmpfs)", errno.ENOSPC)
            subprocess.run(["mount", "-o", "remount,ro", str(versions.folder)], check=True)
            yield row("disk that has become read-only (tmpfs)", errno.EROFS)


def rows(full: bool) -> list[Row]:
    """Measure: 1,000 kills where `full`, else 100."""
    torch.set_num_threads(1)
    found = []
    for what, run in (
        (
            "`kill -9` at random moments of a save",
            lambda folder: kills_at_random_moments(folder, 1000 if full else 100),
        ),
        ("`kill -9` at every system call of a save", kills_at_every_call),
    ):
        with tempfile.TemporaryDirectory() as folder:
            found.append(tally_row(what, run(Path(folder))))
    with tempfile.TemporaryDirectory() as folder:
        tried, wrong = faults(Path(folder))
        measured = f"{tried} injected, {len(wrong)} fell short" + (f" ({wrong[0]})" if wrong else "")
        names = ", ".join(errno.errorcode[cause] for cause in CAUSES)
        what = f"each system call of a save fails once with each of {names}"
        found.append(Row(what, "old file intact, one clear error, nothing left behind", measured, not wrong))
    with tempfile.TemporaryDirectory() as folder:
        found += real_failures(Path(folder))
    return found
