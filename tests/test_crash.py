"""Saving under a kill, a full disk and other failures; the same code measures the long run."""

from __future__ import annotations

import errno
import io
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from reliability_parts import crash
from torch import nn

import trimtab as tt
from trimtab import adapter_file
from trimtab.adapter_file import write_atomically


def small_adapter() -> tt.Adapter:
    torch.manual_seed(0)
    return tt.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), tt.LoRA(rank=2))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_kill_at_a_random_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    tally = crash.kills_at_random_moments(tmp_path, kills=5)
    assert (tally.kills, tally.broken) == (5, 0)


@pytest.mark.slow
def test_a_hundred_kills_leave_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    tally = crash.kills_at_random_moments(tmp_path, kills=100, seed=1)
    assert (tally.kills, tally.broken) == (100, 0)
    assert min(tally.old, tally.new, tally.midway) > 0  # the kills do fall before, behind and into the writing


def test_a_kill_at_any_system_call_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    tally = crash.kills_at_every_call(tmp_path)
    assert tally.broken == 0
    assert min(tally.old, tally.new, tally.midway) > 0


def test_the_tally_sees_a_writer_that_is_not_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_in_place(file: Path, payload: bytearray) -> None:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as stream:
            stream.write(payload)

    monkeypatch.setattr(adapter_file, "write_atomically", write_in_place)
    assert crash.kills_at_every_call(tmp_path).broken > 0


def test_each_failing_system_call_is_one_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    tried, wrong = crash.faults(tmp_path)
    assert wrong == []
    assert tried >= 60


def test_failures_of_the_system_are_one_error_and_leave_the_old_file(tmp_path: Path) -> None:
    rows = list(crash.real_failures(tmp_path))
    assert [row for row in rows if not row.holds] == []
    assert rows


def test_a_missing_folder_is_made_and_one_that_cannot_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = small_adapter()
    assert adapter.save(tmp_path / "new/er/folder").exists()

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        tt.AdapterFileError, match=r"other/adapter.safetensors: cannot be written \(Permission denied\)"
    ):
        adapter.save(tmp_path / "other")


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    adapter = small_adapter()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("a file")
    before = entries(tmp_path)
    places = {
        "folder.safetensors": "Is a directory",
        "file/adapter.safetensors": "(Not a directory|File exists)",
        "zero\0.safetensors": "null",
        "x" * 300 + ".safetensors": "File name too long",
    }
    for place, cause in places.items():
        with pytest.raises(
            tt.AdapterFileError, match=f"{place}: cannot be written .*{cause}.*older file there is untouched"
        ):
            adapter.save(tmp_path / place)
    assert entries(tmp_path) == before


def test_a_read_only_folder_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    adapter, folder = small_adapter(), tmp_path / "folder"
    file = adapter.save(folder)
    before, names = file.read_bytes(), entries(folder)
    folder.chmod(0o555)
    said, say = os.pipe()

    def save_without_rights() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # the superuser may write anywhere
        adapter.lineage = ("another",)
        try:
            adapter.save(folder)
        except tt.AdapterFileError as error:
            os.write(say, str(error).encode())

    tmp_path.chmod(0o755)
    try:
        crash.forked(save_without_rights, lambda pid: None)
    finally:
        folder.chmod(0o755)
    os.close(say)
    text = os.read(said, 4096).decode()
    os.close(said)
    assert "adapter.safetensors: cannot be written (Permission denied); an older file there is untouched" in text
    assert (file.read_bytes(), entries(folder)) == (before, names)


def test_short_writes_and_signals_do_no_harm(tmp_path: Path) -> None:
    payload, signals = os.urandom(2**22), 0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        with crash.intercepted(lambda name, n: None, piece=4099):
            write_atomically(tmp_path / "file", payload)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert signals > 0
    assert (tmp_path / "file").read_bytes() == payload


def test_a_disk_that_changes_what_it_is_given_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")

    class Forgetful(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(len(data)))

    monkeypatch.setattr(os, "fdopen", lambda handle, mode: Forgetful(handle, mode))
    with pytest.raises(tt.AdapterFileError, match=r"file: cannot be written \(it reads back differently\)"):
        write_atomically(file, b"new")
    assert (file.read_bytes(), entries(tmp_path)) == (b"old", ["file"])


def test_what_a_killed_save_left_goes_with_a_later_save_of_the_same_file(tmp_path: Path) -> None:
    names = (".adapter.safetensors.old.part", ".adapter.safetensors.young.part", ".other.safetensors.old.part")
    for name in names:
        (tmp_path / name).write_bytes(b"left")
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    small_adapter().save(tmp_path)
    assert entries(tmp_path) == [*names[1:], "README.md", "adapter.safetensors"]


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    adapter = small_adapter()
    file = adapter.save(tmp_path / "a.safetensors")
    before = file.read_bytes()
    tensor = next(iter(adapter.parameters()))
    with torch.no_grad():
        tensor.view(-1)[0] = float("nan")
    with pytest.raises(
        tt.AdapterFileError, match=r"a.safetensors: cannot be written: .* holds NaN or infinite numbers"
    ):
        adapter.save(file)
    assert (file.read_bytes(), entries(tmp_path)) == (before, ["a.safetensors"])
