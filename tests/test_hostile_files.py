"""Damaged and forged adapter files; the same code measures the long run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from reliability_parts import hostile
from torch import nn

import trimtab as tt
from trimtab import adapter_file
from trimtab.adapter_file import read_adapter_file
from zoo import ZOO


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> list[hostile.Original]:
    return hostile.originals(tmp_path_factory.mktemp("originals"))


def expect_nothing(findings: hostile.Findings) -> None:
    assert findings.wrong == []
    assert findings.slow == []
    assert findings.large == []
    assert min(findings.refused, findings.loaded) > 0


def test_mutated_files_are_refused_or_load_as_what_they_say() -> None:
    expect_nothing(hostile.mutants(300, seed=1, bombs=0.01))


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_refused_or_load_as_what_they_say() -> None:
    expect_nothing(hostile.mutants(10_000, seed=2))


def test_loading_imports_executes_writes_and_connects_to_nothing() -> None:
    events = hostile.watched_elsewhere(150)
    assert events.keys() <= hostile.HARMLESS
    assert events["the file opened for reading"] == 150
    assert min(events["files loaded"], events["files refused"]) > 10


def test_memory_stays_below_twice_the_file() -> None:
    growth = hostile.growth_of_memory(layers=6)
    assert growth.reading <= 2
    assert growth.loading - 1 <= 2  # beside the adapter itself
    assert max(growth.refusing.values()) <= 2


@pytest.mark.parametrize(("place", "number"), [("shape", float), ("data_offsets", float), ("data_offsets", bool)])
def test_sizes_are_whole_numbers(known: list[hostile.Original], tmp_path: Path, place: str, number: type) -> None:
    payload = known[0].payload
    start = 8 + int.from_bytes(payload[:8], "little")
    table = json.loads(payload[8:start])
    entry = next(entry for name, entry in table.items() if name != "__metadata__")
    entry[place] = [number(n) if n in (0, 1) or number is float else n for n in entry[place]]
    header = hostile.dumped(table).encode()
    header += b" " * (-len(header) % 8)
    file = tmp_path / "sizes.safetensors"
    file.write_bytes(hostile.sealed(len(header).to_bytes(8, "little") + header + payload[start:]))
    with pytest.raises(tt.AdapterFileError, match=r"sizes\.safetensors: cannot be read: "):
        read_adapter_file(file)


def test_every_single_bit_of_a_file_counts(known: list[hostile.Original], tmp_path: Path) -> None:
    own = known[0]
    file = tmp_path / "flipped.safetensors"
    for place in range(0, len(own.payload), 7):
        changed = bytearray(own.payload)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(tt.AdapterFileError, match=r"flipped.safetensors: cannot be read: "):
            read_adapter_file(file)


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("seed", [[]] * 1_000_000, "too many entries"),
        ("lineage", [{"a": 1}] * 100_000, "too many entries"),
        (
            "method",
            {"name": "Compose", "settings": {"methods": [{"name": "LoRA", "settings": {}}] * 20_000}},
            "too many",
        ),
        ("items", [["0"] * 190_000], "names a place twice"),
        ("items", [[str(i) for i in range(190_000)]], "places are missing"),
        ("name", "😀" + "a" * 3_000_000, "too many entries or characters"),
        ("name", "😀" + "a" * 500_000, "adapter name"),
        ("name", "a" * 6_000_000, "has a huge header"),
    ],
    ids=range(8),
)
def test_headers_as_full_as_they_can_be_cost_little_time_and_memory(
    known: list[hostile.Original], tmp_path: Path, key: str, value: object, cause: str
) -> None:
    findings = hostile.Findings()
    payload = changed_header(known[0], key, value)
    hostile.examine(findings, key, known[0], tmp_path / "full.safetensors", payload, forged=True)
    assert (findings.refused, findings.wrong, findings.slow, findings.large) == (1, [], [], [])
    with pytest.raises(tt.AdapterFileError, match=cause):
        tt.load(known[0].model, tmp_path / "full.safetensors")


def changed_header(own: hostile.Original, key: str, value: object) -> bytes:
    text, table, data = own.texts
    return hostile.assembled(hostile.dumped(json.loads(text) | {key: value}), table, data)


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("format", 2, "it has format 2, this version reads 1; upgrade trimtab"),
        ("dtype", "onnx", "header entry 'dtype' is unknown, missing or of a wrong kind"),  # torch would import it
        ("extra", 1, "header entry 'extra' is unknown"),
        ("seed", True, "header entry 'seed'"),
        (
            "items",
            [["../../etc/passwd", "0"]],
            r"this model has no '\.\./\.\./etc/passwd' \(1 of 2 places are missing\)",
        ),
        ("items", [["0", "0"]], "names a place twice"),
        ("name", "../up", "adapter name '../up': use letters"),
        ("method", {"name": "os.system", "settings": {}}, "there is no method 'os.system'"),
        (
            "method",
            {"name": "LoRA", "settings": {"rank": 8}},
            r"'0/0:weight/A' has shape .*, this model needs \(8, 16\)",
        ),
        ("method", {"name": "LoRA", "settings": {"rank": 2**40}}, "rank 1099511627776 is larger than the layer"),
        ("method", {"name": "PrefixTuning", "settings": {"length": 2**40}}, "does not fit this model"),
        ("method", {"name": "LoRA", "settings": {"alpha": 10**400}}, "must be a finite number"),
        ("seeded", {"0/0/A": "0"}, "what its seed stands for cannot be rebuilt"),
    ],
)
def test_forged_headers_are_refused_by_name(
    known: list[hostile.Original], tmp_path: Path, key: str, value: object, cause: str
) -> None:
    file = tmp_path / "forged.safetensors"
    file.write_bytes(changed_header(known[0], key, value))
    with pytest.raises(tt.AdapterFileError, match=f"{file}: .*{cause}"):
        tt.load(known[0].model, file)
    assert tt.adapters(known[0].model) == {}


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ({"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}, "is not where its type and shape put it"),
        ({"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}, "is not where its type and shape put it"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "is not where its type and shape put it"),
        ({"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}, "KeyError: 'C64'"),
    ],
)
def test_tables_that_overlap_leave_holes_or_claim_more_than_there_is_are_refused(
    known: list[hostile.Original], tmp_path: Path, entry: dict[str, object], cause: str
) -> None:
    text, table, data = known[0].texts
    file = tmp_path / "forged.safetensors"
    file.write_bytes(hostile.assembled(text, {"first": entry, **table}, data))
    with pytest.raises(tt.AdapterFileError, match=cause):
        read_adapter_file(file)


def test_a_later_checksum_is_compared_with_what_is_there(
    known: list[hostile.Original], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search sees what it looks for: without the comparison, damaged files are loaded silently."""
    monkeypatch.setattr(adapter_file, "hashlib", _AgreeingHashes)
    findings = hostile.Findings()
    own = known[0]
    for place in range(len(own.payload) - 64, len(own.payload) - 56):
        changed = bytearray(own.payload)
        changed[place] ^= 1
        hostile.examine(findings, "flip", own, tmp_path / "x.safetensors", bytes(changed), forged=False)
    assert any("loaded silently" in text for text in findings.wrong)


class _AgreeingHashes:
    """Stands in for hashlib: whatever is compared with a hash is equal to it."""

    @staticmethod
    def sha256(data: bytes = b"") -> _AgreeingHashes:
        return _AgreeingHashes()

    def update(self, data: bytes) -> None:
        pass

    def hexdigest(self) -> object:
        return _Equal()


class _Equal:
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def test_the_search_compares_settings_places_and_numbers(known: list[hostile.Original], tmp_path: Path) -> None:
    own = known[1]  # alpha=8.0
    file = tmp_path / "own.safetensors"
    file.write_bytes(own.payload)
    adapter = tt.load(own.model, file)
    text, table, data = own.texts
    assert hostile.difference(adapter, own.payload) == ""
    assert "alpha is 8.0" in hostile.difference(adapter, hostile.assembled(text.replace("8.0", "9.0", 1), table, data))
    assert "items" in hostile.difference(adapter, changed_header(own, "items", [["0"]]))
    assert "is not what the file holds" in hostile.difference(adapter, hostile.assembled(text, table, bytes(len(data))))
    adapter.detach()


@pytest.mark.parametrize("kind", ["pipe", "missing", "loop", "folder", "empty", "zero"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x\0.safetensors" if kind == "zero" else tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        (path / "adapter.safetensors").mkdir(parents=True)
    elif kind == "empty":
        path.touch()
    with pytest.raises(tt.AdapterFileError, match=r"x.*: cannot be read: "):
        read_adapter_file(path)


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(model.state_dict())
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="="))
    file = adapter.save(tmp_path / "a.safetensors")
    own = hostile.Original("", other, file.read_bytes())
    file.write_bytes(changed_header(own, "dtype", "bfloat16"))
    with pytest.raises(tt.AdapterFileError, match="do not fit into the tensors"):
        tt.load(other, file)


def test_a_base_with_infinite_numbers_can_be_saved_and_known_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.view(-1)[0] = float("-inf")
        model[0].bias[0] = float("nan")
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other.load_state_dict(model.state_dict())
    file = tt.attach(model, tt.LoRA(rank=2, targets="1")).save(tmp_path)
    tt.load(other, file).detach()
    with torch.no_grad():
        other[0].weight.view(-1)[0] = 0.0
    with pytest.raises(tt.AdapterFileError, match="the weights of '0:weight' are other ones"):
        tt.load(other, file)


def test_a_merged_model_is_not_loaded_upon(tmp_path: Path) -> None:
    zoo = ZOO["mlp"]()
    adapter = tt.attach(zoo.model, tt.LoRA(rank=2), "one")
    file = adapter.save(tmp_path)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(0.1)
    adapter.merge()
    with pytest.raises(tt.AdapterFileError, match="adapter 'one' is merged into this model"):
        tt.load(zoo.model, file, name="two")
