"""Invariants of adapter files: same bits after loading, size, refusals."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.adapter_file import read_adapter_file, write_adapter_file
from trimtab.attach import adapters
from trimtab.contract.case import Case, ContractViolation, NotApplicable, expect_same, trained
from trimtab.errors import AdapterFileError
from trimtab.guards import base_state_dict
from trimtab.hooks import is_hooked
from trimtab.method import Method
from trimtab.quantized import is_packed
from trimtab.storage import load, replaced_by

HEADER_BYTES = 4096
BYTES_PER_TENSOR = 256
BYTES_PER_BASE_PARAMETER = 512
"""The header names every tensor of the file and every parameter of the base (with up to eight sampled numbers)."""


@contextmanager
def saved(adapter: Adapter) -> Iterator[Path]:
    """Give the adapter's file inside the `with`."""
    with tempfile.TemporaryDirectory() as folder:
        yield adapter.save(Path(folder) / "adapter.safetensors")


def loads_the_same_bits(method: Method, case: Case) -> None:
    """Loaded into a new model, the tensors and the output have the same bits; saved again, the file has too."""
    adapter = trained(case, method)
    with saved(adapter) as file:
        loaded = load(case.build(), file)
        again = loaded.save(file.with_name("again.safetensors"))
        same_bytes = again.read_bytes() == file.read_bytes()
    kept = [(name, tensor) for name, tensor, spec in adapter.named_tensors() if spec.stored != "training"]
    found = {name: tensor for name, tensor, _ in loaded.named_tensors()}
    for name, tensor in kept:
        expect_same(f"{name!r} after loading", found[name], tensor)
    expect_same("the output after loading", case.output(loaded.model), case.output(adapter.model))
    if not same_bytes:
        raise ContractViolation("a loaded adapter saves another file than the one it came from")


def file_is_small(method: Method, case: Case) -> None:
    """The file is at most 1.1 times the trainable and declared frozen numbers, beside its header."""
    adapter = trained(case, method, steps=1)
    kept = [(t, s) for _, t, s in adapter.named_tensors() if s.trainable or s.stored == "always"]
    needed = sum(tensor.numel() * tensor.element_size() for tensor, _ in kept)
    parameters = sum(1 for _ in adapter.model.parameters())
    allowance = HEADER_BYTES + BYTES_PER_TENSOR * len(kept) + BYTES_PER_BASE_PARAMETER * parameters
    with saved(adapter) as file:
        size = file.stat().st_size
        _, tensors = read_adapter_file(file)
    if size > 1.1 * needed + allowance:
        raise ContractViolation(f"the file has {size} bytes; 1.1 × {needed} and {allowance} for the header are allowed")
    for name, tensor in tensors.items():
        if tensor.dtype is torch.int64 and tensor.numel() and int(tensor.abs().max()) <= torch.iinfo(torch.int32).max:
            raise ContractViolation(f"{name!r} is stored as int64, although its numbers fit into 32 bits or fewer")


def refuses_damaged_files(method: Method, case: Case) -> None:
    """A wrong shape, a missing and an unknown tensor are refused by name, and the model stays as it was."""
    adapter = trained(case, method, steps=1)
    with saved(adapter) as file:
        header, tensors = read_adapter_file(file)
        name, first = next(iter(tensors.items()))
        longer = torch.cat([first.reshape(-1), first.reshape(-1)[:1]])
        changes: list[tuple[str, dict[str, Tensor], str]] = [
            ("a wrong shape", {**tensors, name: longer}, "has shape"),
            ("a missing tensor", {key: t for key, t in tensors.items() if key != name}, "is missing"),
            ("an unknown tensor", {**tensors, "0/elsewhere/A": torch.zeros(1)}, "unknown tensor"),
        ]
        for what, changed, text in changes:
            damaged = file.with_name("damaged.safetensors")
            write_adapter_file(damaged, header, changed, card="")
            _expect_refusal(what, case.build(), damaged, text)


def refuses_another_base(method: Method, case: Case) -> None:
    """A base with other weights, and one with a further parameter, are refused."""
    adapter = trained(case, method, steps=1)
    replaced = replaced_by(adapter.parts)
    other, larger = case.build(), case.build()
    own = [
        parameter
        for path, module in other.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        and (f"{path}:{name}" if path else name) not in replaced
        and not is_packed(module, name)
    ]
    if not own:
        raise NotApplicable("the adapter replaces every parameter of the base")
    with torch.no_grad():
        for parameter in dict.fromkeys(own):
            parameter.mul_(1.5).add_(0.1)
    larger.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    with saved(adapter) as file:
        _expect_refusal("a base with other weights", other, file, "another base")
        _expect_refusal("a base with a further parameter", larger, file, "another base")


def _expect_refusal(what: str, model: nn.Module, file: Path, text: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [parameter.requires_grad for parameter in model.parameters()]
    try:
        load(model, file)
    except AdapterFileError as error:
        if text not in str(error) or str(file) not in str(error):
            raise ContractViolation(f"{what} is refused without saying so: {error}") from error
    else:
        raise ContractViolation(f"{what} was loaded")
    for name, tensor in base_state_dict(model).items():
        expect_same(f"{name!r} after refusing {what}", tensor, before[name])
    if adapters(model) or any(is_hooked(module) for module in model.modules()):
        raise ContractViolation(f"after refusing {what} something is still attached")
    if learning != [parameter.requires_grad for parameter in model.parameters()]:
        raise ContractViolation(f"after refusing {what} other parameters require gradients than before")
