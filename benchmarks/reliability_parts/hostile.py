"""Adapter files that are damaged by accident or made on purpose, loaded onto real models.

Adapters of several methods are saved; their files are mutated at random and loaded with `load`. *Damaged* files have
flipped bits, cut or added or exchanged bytes, pieces of other files, edited text. *Forged* files are mutated in what
they say (settings, names, places, shapes, offsets, types, NaN, duplicated names, deep nesting, a future format,
thousands of entries) and then sealed again with a right checksum, so that everything behind the checksum is reached.

Either `load` raises AdapterFileError, which names file and cause, and the model is as before; or it loads exactly what
the file says. A damaged file may only be loaded if its bytes are those of the original after all. What a forged file
says is read by an independent reader (safetensors' own and plain JSON) and compared with the attached adapter: method,
every setting, places, seed, modes, lineage, and each tensor bit for bit. The checksum guards against accidents: someone
who forges a file on purpose can compute it too, and then gets what the file says, never more than numbers and settings.

Memory is the growth of the process's peak while one file is loaded, including the adapter that is attached; time is
processor time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import trimtab as tt
import zoo
from reliability_parts import Row
from trimtab.adapter_file import encode_method, file_bytes, read_adapter_file
from trimtab.method import check_settings

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MEBIBYTE = 2**20
SECONDS, MEMORY_FACTOR, MEMORY_ALLOWANCE = 1.0, 2, 16 * MEBIBYTE
HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**62, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e308, 1e-320),
    *(
        "",
        "x",
        "../../etc/passwd",
        "/dev/zero",
        "C:\\con",
        "a/b",
        "a.b",
        "*",
        "re:.*",
        "\x00",
        "\ud7ff",
        "é",
        "0" * 5000,
    ),
    *("os.system", "__import__('os')", "onnx", "_dynamo", "float8_e4m3fn", "complex64", "trainable", "LoRA", "Compose"),
    *([], {}, [[]], [None], {"": {}}, {"name": "LoRA", "settings": {}}, {"name": "Compose", "settings": {}}),
]


POINTERS = ("onnx", "_dynamo", "_inductor", "_export", "this", "turtle", "idlelib.idle", "os.system", "builtins.exec",
            "trimtab.methods", "torch.hub:load", "/etc/passwd", "../../etc/passwd", "http://127.0.0.1:9/a")  # fmt: skip


@dataclass
class Original:
    """A saved adapter and the model that its mutants are loaded onto."""

    label: str
    model: nn.Module
    payload: bytes

    @property
    def texts(self) -> tuple[str, dict[str, Any], bytes]:
        """The trimtab header as text, the table of tensors, the bytes of the tensors."""
        size = int.from_bytes(self.payload[:8], "little")
        table = json.loads(self.payload[8 : 8 + size])
        return table.pop("__metadata__")["trimtab"], table, self.payload[8 + size :]


def originals(folder: Path) -> list[Original]:
    """Save one adapter per kind of content: names and numbers, integers, seeded bases, compositions, prompts."""
    cases = (
        ("mlp", tt.LoRA(rank=2)),
        ("mlp", tt.LoRA(rank=4, alpha=8.0, dropout=0.1)),
        ("mlp", tt.PaCA(rank=2)),
        ("bert", tt.BitFit()),
        ("llama", tt.RandLoRA(rank=4, targets="query")),
        ("llama", tt.Compose(tt.LoRA(rank=2, targets="attention"), tt.IA3())),
        ("llama", tt.PrefixTuning(length=3)),
    )
    found = []
    for model, method in cases:
        adapter = tt.attach(zoo.ZOO[model]().model, method, seed=3)
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
        adapter.lineage = ("first", "second")
        file = adapter.save(folder / "original.safetensors")
        label = f"{type(method).__name__} on {model}"
        found.append(Original(label, zoo.ZOO[model]().model, file.read_bytes()))
        tt.load(found[-1].model, file).detach()
    return found


def assembled(text: str, table: dict[str, Any] | str, data: bytes) -> bytes:
    """Return a file of these parts, sealed with a right checksum; a table may be given as text."""
    names = table if isinstance(table, str) else json.dumps(table, separators=(",", ":"), ensure_ascii=False)[1:-1]
    header = (
        '{"__metadata__":{"trimtab":' + json.dumps(text, ensure_ascii=False) + "}" + "," * bool(names) + names + "}"
    )
    raw = header.encode(errors="surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return sealed(struct.pack("<Q", len(raw)) + raw + data)


def sealed(payload: bytes) -> bytes:
    """Return the payload with a right checksum in the place of the one that it has."""
    place = payload.find(b'\\"sha256\\":\\"') + 13
    if place < 13 or len(payload) < place + 64:
        return payload
    zeros = payload[:place] + b"0" * 64 + payload[place + 64 :]
    return zeros[:place] + hashlib.sha256(zeros).hexdigest().encode() + zeros[place + 64 :]


def dumped(header: Any) -> str:
    """Return a header as Trimtab writes it, where JSON can say it."""
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False)


# Damage: any bytes, and no new checksum.


def flip_bits(draw: random.Random, own: bytes, other: bytes) -> bytes:
    changed = bytearray(own)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        changed[draw.randrange(len(own))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_in_header(draw: random.Random, own: bytes, other: bytes) -> bytes:
    changed, size = bytearray(own), int.from_bytes(own[:8], "little")
    changed[draw.randrange(8 + size)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def set_bytes(draw: random.Random, own: bytes, other: bytes) -> bytes:
    start = draw.randrange(len(own))
    length = draw.choice((1, 2, 8, 64))
    return own[:start] + draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length))) + own[start + length :]


def truncate(draw: random.Random, own: bytes, other: bytes) -> bytes:
    return own[: draw.choice((draw.randrange(len(own)), draw.randrange(16), len(own) - draw.randrange(1, 9)))]


def extend(draw: random.Random, own: bytes, other: bytes) -> bytes:
    length = draw.choice((1, 4, 8, 4096))
    return own + draw.choice((bytes(length), draw.randbytes(length), own))


def splice(draw: random.Random, own: bytes, other: bytes) -> bytes:
    place = draw.randrange(min(len(own), len(other)))
    return draw.choice((own[:place] + other[place:], other[:place] + own[place:]))


def move_block(draw: random.Random, own: bytes, other: bytes) -> bytes:
    first, second, third = sorted(draw.randrange(len(own)) for _ in range(3))
    blocks = own[:first], own[first:second], own[second:third], own[third:]
    return b"".join(blocks[i] for i in draw.choice(((0, 2, 1, 3), (0, 1, 1, 2, 3), (0, 2, 3), (1, 2, 3))))


def edit_digit(draw: random.Random, own: bytes, other: bytes) -> bytes:
    size = int.from_bytes(own[:8], "little")
    place = draw.choice([i for i in range(8, 8 + size) if own[i : i + 1].isdigit()])
    return own[:place] + str(draw.randrange(10)).encode() + own[place + 1 :]


def wrong_length(draw: random.Random, own: bytes, other: bytes) -> bytes:
    size = int.from_bytes(own[:8], "little")
    new = draw.choice(
        (0, 1, 2, size - 1, size + 1, size + 8, len(own), 2**31, 2**63 - 1, 2**64 - 1, draw.randrange(2**64))
    )
    return struct.pack("<Q", new) + own[8:]


def unsealed_entry(draw: random.Random, own: bytes, other: bytes) -> bytes:
    """Change an entry without a new checksum."""
    forged = entry(draw, Original("", nn.Identity(), own))
    place = forged.find(b'\\"sha256\\":\\"') + 13
    return (
        forged[:place] + own[own.find(b'\\"sha256\\":\\"') + 13 :][:64] + forged[place + 64 :]
        if place >= 13
        else forged
    )


DAMAGE: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    *(flip_bits, flip_in_header, flip_in_header, set_bytes, truncate, extend, splice, move_block, edit_digit),
    *(wrong_length, unsealed_entry),
)


# Forgery: what the file says, with a right checksum.


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def change(draw: random.Random, value: Any) -> None:
    """Change one thing inside a JSON object, in place; entries near the top are as likely as those far below."""
    paths = list(places(value))
    shallow = [path for path in paths if len(path) <= 2]
    *above, key = draw.choice(shallow if draw.random() < 0.5 else paths)
    for step in above:
        value = value[step]
    old = value[key]
    kind = draw.randrange(6)
    if kind == 0:
        del value[key]
    elif kind == 1 and isinstance(value, dict):
        value[draw.choice(("extra", key + "_", "", "name", "../" + key))] = value.pop(key)
    elif kind == 2 and isinstance(old, int | float):
        value[key] = draw.choice((old + 1, old - 1, -old, old * 2, float(old), str(old), [old], bool(old), old * 10**6))
    elif kind == 2 and isinstance(old, str) and old:
        place = draw.randrange(len(old))
        value[key] = old[:place] + draw.choice(("", "x", "/", ".", ":", "*", "|", "\n", "é")) + old[place + 1 :]
    elif kind == 2 and isinstance(old, list) and old:
        value[key] = draw.choice((old[::-1], old + old, old[:-1], [old], [*old, copy.deepcopy(old[0])]))
    elif kind == 3 and isinstance(value, dict):
        value[draw.choice(("rank", "alpha", "extra", "name", "settings", "targets", "dropout"))] = draw.choice(HOSTILE)
    else:
        value[key] = copy.deepcopy(draw.choice(HOSTILE))


def entry(draw: random.Random, own: Original) -> bytes:
    text, table, data = own.texts
    header = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change(draw, header)
    return assembled(dumped(header), table, data)


def setting(draw: random.Random, own: Original) -> bytes:
    """Give the method another setting, or another method the settings."""
    text, table, data = own.texts
    header = json.loads(text)
    method = header["method"]
    if draw.random() < 0.2:
        method["name"] = draw.choice(list(tt.methods()))
    else:
        known = [*tt.methods()[method["name"]].__dataclass_fields__, "unknown"]
        value = draw.choice((*HOSTILE, 3, 8, 9.0, 0.25, "all-linear", "attention", "eva", "pissa", [8, 4]))
        method["settings"][draw.choice(known)] = value
    return assembled(dumped(header), table, data)


def place_name(draw: random.Random, own: Original) -> bytes:
    text, table, data = own.texts
    header = json.loads(text)
    items = draw.choice([part for part in header["items"] if part])
    index = draw.randrange(len(items))
    items[index] = draw.choice(
        (items[index - 1], items[index] + ":weight", "*", "", ":", "re:.*", "all-linear", "../x", "0")
    )
    return assembled(dumped(header), table, data)


def tensor_entry(draw: random.Random, own: Original) -> bytes:
    text, table, data = own.texts
    table = json.loads(json.dumps(table))
    name = draw.choice(list(table))
    kind = draw.randrange(6)
    if kind == 0:
        table[name]["shape"] = draw.choice(
            ([2**62], [2**31, 2**31], [0, 2**62], [-1], [1] * 5000, [], [2**64], [1.0], [True])
        )
    elif kind == 1:
        begin, end = table[name]["data_offsets"]
        offsets = (
            (begin + 4, end + 4),
            (begin, end + 4),
            (0, 4),
            (end, begin),
            (begin, 2**63),
            (-4, end),
            (begin, end, end),
        )
        table[name]["data_offsets"] = list(draw.choice(offsets))
    elif kind == 2:
        table[name]["dtype"] = draw.choice(
            ("F16", "F64", "I32", "BF16", "U8", "BOOL", "C64", "F8_E4M3", "x", 5, None, [])
        )
    elif kind == 3:
        table = {
            draw.choice(("../../x", "/etc/passwd", "", "0", "\x00")) if n == name else n: e for n, e in table.items()
        }
    elif kind == 4:
        del table[name]
    else:
        change(draw, table)
    return assembled(text, table, data)


def other_dtype(draw: random.Random, own: Original) -> bytes:
    """Store the tensors in another type, rightly described."""
    text, _, _ = own.texts
    chosen = draw.choice((torch.float16, torch.bfloat16, torch.float64, torch.int32))
    tensors = {n: t.to(chosen) for n, t in safetensors.torch.load(own.payload).items()}
    return sealed(file_bytes(tensors, {"trimtab": text}))


def other_numbers(draw: random.Random, own: Original) -> bytes:
    """Put NaN, infinity or other numbers into the tensors, or drop, add or rename one."""
    text, _, _ = own.texts
    tensors = safetensors.torch.load(own.payload)
    name = draw.choice(list(tensors))
    kind = draw.randrange(4)
    if kind == 0:
        numbers = (float("nan"), float("inf"), -1.0, 3.0e38) if tensors[name].is_floating_point() else (100, 0)
        tensors[name].view(-1)[0] = draw.choice(numbers)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[name + "x"] = tensors[name].clone()
    else:
        tensors[name] = (
            tensors[name].repeat(2, *[1] * (tensors[name].dim() - 1)) if tensors[name].dim() else tensors[name]
        )
    return sealed(file_bytes(tensors, {"trimtab": text}))


def odd_text(draw: random.Random, own: Original) -> bytes:
    """JSON that a lenient reader accepts: doubled names, infinite numbers, other spellings; deep nesting."""
    text, table, data = own.texts
    seed = '"seed":3'
    deep = draw.choice((50, 300, 900, 5000, 200_000))
    nested = '{"name":"Compose","settings":{"methods":[' * deep + "]}}" * deep
    spelled = draw.choice(
        (
            text.replace(seed, f'{seed},"seed":4'),
            text.replace(seed, '"seed":NaN'),
            text.replace(seed, '"seed":1e999'),
            text.replace(seed, '"seed":-Infinity'),
            text.replace(seed, '"seed":3.0'),
            text.replace(seed, '"seed":03'),
            text.replace(seed, '"seed":' + "9" * draw.choice((30, 4000, 5000, 100_000))),
            text.replace('"seed"', '"\\u0073eed"'),
            text.replace(seed, '"seed" : 3'),
            text.replace(seed, '"seed":' + "[" * deep + "]" * deep),
            text.replace(seed, '"seed":' + '{"a":' * deep + "1" + "}" * deep),
            text[: text.index('"method":') + 9] + nested + text[text.index(',"items"') :],
            text + " ",
            text + "{}",
            "[" + text + "]",
            "null",
        )
    )
    if draw.random() < 0.2:
        names = dumped(table)[1:-1]
        return assembled(text, draw.choice((names + "," + names, names + ',"__metadata__":{}', " " + names)), data)
    return assembled(spelled, table, data)


def other_format(draw: random.Random, own: Original) -> bytes:
    text, table, data = own.texts
    header = json.loads(text)
    header["format"] = draw.choice((2, 3, 10**9, 0, -1, "1", 1.5, None, True, [1]))
    if draw.random() < 0.5:
        header["an_entry_of_that_format"] = {}
    return assembled(dumped(header), table, data)


def pointing(draw: random.Random, own: Original) -> bytes:
    """Name a module, a function, a file or an address where a name belongs."""
    text, table, data = own.texts
    header = json.loads(text)
    named = draw.choice(POINTERS)
    kind = draw.randrange(6)
    if kind == 0:
        header["method"]["name"] = named
    elif kind == 1:
        header["method"]["settings"]["targets"] = named
    elif kind == 2:
        header["items"][0][0] = named
    elif kind == 3:
        table = {named if name == next(iter(table)) else name: entry for name, entry in table.items()}
    else:
        header[draw.choice(("dtype", "base_mode", "name"))] = named
    return assembled(dumped(header), table, data)


def bomb(draw: random.Random, own: Original) -> bytes:
    """Headers that are as large or as full as they can be."""
    text, table, data = own.texts
    header = json.loads(text)
    many = draw.choice((30_000, 60_000, 190_000, 1_000_000))
    kind = draw.randrange(7)
    if kind == 0:
        header["lineage"] = [{"a": 1}] * (many // 3)
    elif kind == 1:
        header["fingerprint"]["samples"] = {str(i): [] for i in range(many // 3)}
    elif kind == 2:
        header["items"] = [header["items"][0] * (many // max(len(header["items"][0]), 1))]
    elif kind == 3:
        table = {**{str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(many // 11)}, **table}
    elif kind == 4:
        header["name"] = "é€😀"[draw.randrange(3)] + "a" * (3 * many)
    elif kind == 5:
        return assembled(dumped(header).replace('"seed":3', '"seed":[' + "[]," * many + "0]"), table, data)
    else:
        return assembled(dumped(header).replace('"', "\\u0022", 2) + "," * many, table, data)
    return assembled(dumped(header), table, data)


FORGERY: tuple[Callable[[random.Random, Original], bytes], ...] = (
    *(entry, entry, entry, setting, setting, place_name, tensor_entry, tensor_entry, other_dtype, other_numbers),
    *(odd_text, other_format, pointing),
)


@dataclass
class Findings:
    """What became of the files."""

    files: int = 0
    refused: int = 0
    loaded: int = 0
    wrong: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    large: list[str] = field(default_factory=list)
    slowest: float = 0.0
    memory: float = 0.0
    causes: Counter[str] = field(default_factory=Counter)


class TooLong(BaseException):
    """A file took so long that waiting for it was given up."""


def _give_up(signal_number: int, frame: object) -> None:
    raise TooLong


def peak_memory() -> Callable[[], int]:
    """Start to watch the process's memory; the function returned says by how many bytes its peak has grown."""
    Path("/proc/self/clear_refs").write_text("5")

    def status(entry: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(entry + ":")[2].split()[0]) * 1024

    before = status("VmRSS")
    return lambda: status("VmHWM") - before


def examine(findings: Findings, what: str, own: Original, file: Path, payload: bytes, forged: bool) -> None:
    """Load one file and add to the findings what became of it."""
    file.write_bytes(payload)
    findings.files += 1
    grown, start = peak_memory(), time.process_time()
    adapter: tt.Adapter | None = None
    problem = ""
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        adapter = tt.load(own.model, file)
    except tt.AdapterFileError as error:
        findings.refused += 1
        cause = str(error).removeprefix(f"{file}: ")
        findings.causes[cause.partition(":")[2][:40]] += 1
        if str(file) not in str(error) or len(cause) < 15 or len(cause) > 1500:
            problem = f"an error without file or cause: {error}"
    except TooLong:
        problem = "given up after 20 s"
    except BaseException as error:  # noqa: BLE001 - a raw error of any class is what is looked for
        problem = f"{type(error).__name__} instead of AdapterFileError: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, memory = time.process_time() - start, grown()
    if adapter is not None:
        findings.loaded += 1
        problem = difference(adapter, payload) if forged else "" if payload == own.payload else "loaded silently"
        adapter.detach()
    if tt.adapters(own.model):
        problem = "the model is not as before"
    if problem:
        findings.wrong.append(f"{what} of {own.label}: {problem}")
    findings.slowest = max(findings.slowest, seconds)
    findings.memory = max(findings.memory, memory - MEMORY_FACTOR * len(payload))
    if seconds > SECONDS:
        findings.slow.append(f"{what} of {own.label}: {seconds:.1f} s")
    if memory > MEMORY_FACTOR * len(payload) + MEMORY_ALLOWANCE:
        findings.large.append(
            f"{what} of {own.label}: {memory / MEBIBYTE:.0f} MiB for {len(payload) / MEBIBYTE:.2f} MiB"
        )


def difference(adapter: tt.Adapter, payload: bytes) -> str:
    """Return in what an adapter differs from what its file says to an independent reader, or nothing."""
    tensors = safetensors.torch.load(payload)
    size = int.from_bytes(payload[:8], "little")
    said = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["trimtab"])
    held = {
        "name": adapter.name,
        "items": [[str(item) for item in part.items] for part in adapter.parts],
        "seed": adapter.seed,
        "base_mode": adapter.base_mode,
        "lineage": list(adapter.lineage),
        "dtype": str(next(adapter.parameters()).dtype).removeprefix("torch."),
        "steps": adapter.steps,
    }
    for key, value in held.items():
        if json.dumps(said[key]) != json.dumps(value):
            return f"{key} is {value!r}, the file says {said[key]!r:.200}"
    if problem := method_difference(encode_method(adapter.method), adapter.method, said["method"]):
        return problem
    own = {name: tensor for name, tensor, spec in adapter.named_tensors() if spec.stored in ("always", "training")}
    for name, tensor in tensors.items():
        if name not in own or not same_numbers(own.pop(name), tensor):
            return f"the tensor {name!r} is not what the file holds"
    return "".join(
        f"the tensor {n!r} is in no file" for n, _, s in adapter.named_tensors() if n in own and s.stored == "always"
    )


def same_numbers(own: Tensor, stored: Tensor) -> bool:
    return own.shape == stored.shape and torch.equal(own.detach().to(torch.float64), stored.to(torch.float64))


def method_difference(encoded: dict[str, Any], method: tt.Method, said: dict[str, Any]) -> str:
    """Return in what a method differs from its description, or nothing; settings that are not named have defaults."""
    if encoded["name"].lower() != said["name"].lower() or encoded["settings"].keys() - said["settings"].keys():
        return f"the method is {encoded}, the file says {said}"
    for key, value in said["settings"].items():
        held = getattr(method, key)
        if key == "methods":
            pairs = zip(held, value, strict=True)
            found = [method_difference(encode_method(part), part, inner) for part, inner in pairs]
            if any(found):
                return next(filter(None, found))
        elif (list(held) if isinstance(held, tuple) else held) != value or isinstance(held, bool) != isinstance(
            value, bool
        ):
            return f"{key} is {held!r}, the file says {value!r}"
    return ""


def mutants(count: int, seed: int = 0, bombs: float = 0.003) -> Findings:
    """Load that many mutants: about half of them damaged, half forged, and a few as large as they can be."""
    draw, findings = random.Random(seed), Findings()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    previous = signal.signal(signal.SIGALRM, _give_up)
    try:
        with tempfile.TemporaryDirectory() as name:
            file = Path(name) / "mutant.safetensors"
            known = originals(Path(name))
            before = [copy.deepcopy(own.model.state_dict()) for own in known]
            for _ in range(count):
                own, other = draw.choice(known), draw.choice(known)
                share = draw.random()
                if share < bombs:
                    examine(findings, "bomb", own, file, bomb(draw, own), forged=True)
                elif share < 0.55:
                    damage = draw.choice(DAMAGE)
                    examine(
                        findings, damage.__name__, own, file, damage(draw, own.payload, other.payload), forged=False
                    )
                else:
                    forgery = draw.choice(FORGERY)
                    examine(findings, forgery.__name__, own, file, forgery(draw, own), forged=True)
            for own, state in zip(known, before, strict=True):
                now = own.model.state_dict()
                if now.keys() != state.keys() or not all(torch.equal(now[key], state[key]) for key in state):
                    findings.wrong.append(f"the model of {own.label} has changed")
    finally:
        signal.signal(signal.SIGALRM, previous)
        torch.set_num_threads(threads)
    return findings


def watched(count: int, seed: int = 1) -> dict[str, int]:
    """Load that many files, mutated and whole, and count what the interpreter reports that it does meanwhile.

    Only for a process of its own: an audit hook cannot be taken away again. Before, each model has loaded its unmutated
    file, and the types of all settings have been looked up: Trimtab's own modules and annotations, once in a process.
    """
    draw, seen, loading = random.Random(seed), Counter[str](), ""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not loading:
            return
        if event == "open" and arguments[0] == loading and not arguments[2] & WRITING:
            event = "the file opened for reading"
        seen[event if event != "open" else f"open {arguments}"] += 1

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "mutant.safetensors"
        known = originals(Path(name))
        for method in tt.methods().values():
            with contextlib.suppress(tt.TrimtabError):
                check_settings(method())
        # Classes that hooking generates live as long as a model uses them; making one looks up its annotations.
        in_use = [copy.deepcopy(own.model) for own in known]
        for own, model in zip(known, in_use, strict=True):
            file.write_bytes(own.payload)
            tt.load(model, file)
        sys.addaudithook(hook)
        for index in range(count):
            own, other = draw.choice(known), draw.choice(known)
            damaged = draw.choice(DAMAGE)(draw, own.payload, other.payload)
            forged = draw.choice(FORGERY)(draw, own)
            file.write_bytes((own.payload, damaged, forged, pointing(draw, own), pointing(draw, own))[index % 5])
            loading = str(file)
            try:
                adapter = tt.load(own.model, file)
            except tt.AdapterFileError:
                loading = ""
                seen["files refused"] += 1
            else:
                loading = ""
                seen["files loaded"] += 1
                adapter.detach()
    return dict(seen)


HARMLESS = {"files loaded", "files refused", "the file opened for reading", "builtins.id", "object.__getattr__",
            "object.__setattr__"}  # fmt: skip
"""What the interpreter may report while a file is loaded; the last three are its own bookkeeping."""


def watched_elsewhere(count: int) -> dict[str, int]:
    """Call `watched` in a process of its own."""
    code = f"import json; from reliability_parts.hostile import watched; print(json.dumps(watched({count})))"
    paths = [str(Path(module.__file__).parent) for module in (sys.modules["reliability_parts"], zoo)]
    paths[0] = str(Path(paths[0]).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(Path(tt.__file__).parents[1])])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Growth:
    """By how many times the size of a large file the memory of the process grew while it was read and loaded."""

    size: int
    reading: float
    loading: float
    refusing: dict[str, float]


def growth_of_memory(layers: int = 16) -> Growth:
    """Read and load an adapter of 4 MiB for each layer, and files of that size that are damaged or forged."""
    base = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers + 1)))
    other = copy.deepcopy(base)

    def factor(action: Callable[[], object], size: int) -> float:
        grown = peak_memory()
        with contextlib.suppress(tt.AdapterFileError):
            action()
        return grown() / size

    with tempfile.TemporaryDirectory() as name:
        adapter = tt.attach(base, tt.LoRA(rank=512, targets=tuple(str(i) for i in range(layers))))
        file = adapter.save(Path(name) / "large.safetensors")
        adapter.detach()
        own = Original("", other, file.read_bytes())
        size = len(own.payload)
        reading = factor(lambda: read_adapter_file(file), size)
        loading = factor(lambda: tt.load(other, file), size)
        refusing = {}
        for what, payload in large_and_wrong(own):
            bad = Path(name) / "bad.safetensors"
            bad.write_bytes(payload)
            del payload
            refusing[what] = factor(lambda bad=bad: tt.load(other, bad, name="another"), size)
        return Growth(size, reading, loading, refusing)


def large_and_wrong(own: Original) -> Iterator[tuple[str, bytes]]:
    """Yield large files to be refused: what is wrong, and the bytes."""
    text, table, data = own.texts
    yield "cut short", own.payload[:-5]
    yield "one bit flipped", own.payload[:-9] + bytes([own.payload[-9] ^ 1]) + own.payload[-8:]
    first = next(iter(table))
    shaped = {**table, first: {**table[first], "shape": [2**20, 2**20]}}
    yield "a shape of 4 TiB", assembled(text, shaped, data)
    yield "all of it header", struct.pack("<Q", len(data)) + b'{"a":' + b"[" * (len(data) - 5)
    forged = json.loads(text)
    forged["method"]["settings"]["rank"] = 2**20
    yield "a rank of a million", assembled(dumped(forged), table, data)
    yield "NaN at its end", assembled(text, table, data[:-4] + struct.pack("<f", float("nan")))


def rows(full: bool) -> list[Row]:
    """Measure: 100,000 mutants where `full`, else 10,000."""
    torch.set_num_threads(1)
    found = mutants(100_000 if full else 10_000)
    files = f"{found.files:,} files: {found.refused:,} refused, {found.loaded:,} loaded as they say"
    events = watched_elsewhere(10_000 if full else 1_000)
    watched_files, opened = events["files loaded"] + events["files refused"], events["the file opened for reading"]
    other = {event: count for event, count in events.items() if event not in HARMLESS}
    growth = growth_of_memory()
    worst = max(growth.refusing.values())
    beyond = f"at most {found.memory / MEBIBYTE:.1f} MiB above twice the file"
    return [
        Row(
            "mutated adapter files, loaded onto 7 models",
            "AdapterFileError with file and cause, or exactly what the file says",
            f"{files}, {len(found.wrong)} wrong" + "".join(f"; {text:.200}" for text in found.wrong[:3]),
            not found.wrong,
        ),
        Row(
            "time for one of them",
            "at most 1 s",
            f"slowest {found.slowest:.2f} s, {len(found.slow)} above" + "".join(f"; {text}" for text in found.slow[:3]),
            not found.slow,
        ),
        Row(
            "memory for one of them (small files with full headers among them)",
            f"twice the file and {MEMORY_ALLOWANCE // MEBIBYTE} MiB",
            f"{beyond}, {len(found.large)} above the limit" + "".join(f"; {text}" for text in found.large[:3]),
            not found.large,
        ),
        Row(
            f"memory to read a file of {growth.size / MEBIBYTE:.0f} MiB",
            "at most twice the file",
            f"{growth.reading:.2f} times the file",
            growth.reading <= MEMORY_FACTOR,
        ),
        Row(
            f"memory to load it, with the adapter of {growth.size / MEBIBYTE:.0f} MiB that is attached",
            "at most twice the file beside the adapter itself",
            f"{growth.loading:.2f} times the file, {growth.loading - 1:.2f} beside the adapter",
            growth.loading - 1 <= MEMORY_FACTOR,
        ),
        Row(
            "memory to refuse one of that size: " + ", ".join(growth.refusing),
            "at most twice the file",
            ", ".join(f"{factor:.2f}" for factor in growth.refusing.values()) + " times the file",
            worst <= MEMORY_FACTOR,
        ),
        Row(
            "what loading does, reported by the interpreter's audit hook",
            "no import, no execution, no writing, no connection, no other file",
            f"{watched_files:,} files: {opened:,} times the file opened for reading, else "
            + (", ".join(f"{count} {event}" for event, count in other.items()) or "nothing"),
            not other,
        ),
    ]
