"""The fingerprint of a base model: the same base in another precision is known, a different base is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.hooks import PREFIX
from trimtab.quantized import dense_weight, is_packed, linear_features
from trimtab.structure import Structure

SAMPLED_TENSORS = 48
SAMPLES = 8


def _base_parameters(model: nn.Module, replaced: set[str]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    seen: set[int] = set()
    for path, module in Structure(model).modules.items():
        for name, parameter in module._parameters.items():
            full = f"{path}:{name}" if path else name
            if parameter is None or id(parameter) in seen or name.startswith(PREFIX) or full in replaced:
                continue
            seen.add(id(parameter))
            yield full, module, name, parameter


def _shape(module: nn.Module, name: str, parameter: Tensor) -> list[int]:
    features = linear_features(module)
    if is_packed(module, name) and features is not None:
        return [features[1], features[0]]
    return list(parameter.shape)


def fingerprint(model: nn.Module, replaced: set[str]) -> dict[str, Any]:
    """Describe the base: names, shapes and dtypes of its parameters, and sampled values.

    `replaced` are the parameters ("path:name") that the adapter itself replaces whole, such as a new head.
    """
    entries = list(_base_parameters(model, replaced))
    shapes = {full: _shape(module, name, parameter) for full, module, name, parameter in entries}
    digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()
    step = max(1, len(entries) // SAMPLED_TENSORS)
    samples = {full: _sample(module, name) for full, module, name, _ in entries[::step][:SAMPLED_TENSORS]}
    precision = {full: _precision(module, name) for full, module, name, _ in entries if full in samples}
    return {"shapes": shapes, "digest": digest, "samples": samples, "precision": precision}


def _precision(module: nn.Module, name: str) -> str:
    parameter = module._parameters[name]
    assert parameter is not None
    return "quantised" if is_packed(module, name) else str(parameter.dtype).removeprefix("torch.")


def _sample(module: nn.Module, name: str) -> list[float]:
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.is_meta:
        return []
    flat = dense_weight(module, name).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return [float(value) for value in flat[places.to(flat.device)].double()]


_TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "quantised": 0.15}


def difference(stored: dict[str, Any], model: nn.Module, replaced: set[str]) -> tuple[str | None, bool]:
    """Compare a stored fingerprint with a model; returns (what differs or None, whether the precision differs)."""
    found = fingerprint(model, replaced)
    if stored["digest"] != found["digest"]:
        return _shape_difference(stored["shapes"], found["shapes"]), False
    other_precision = False
    for name, expected in stored["samples"].items():
        values = found["samples"].get(name, [])
        if stored["precision"].get(name) == found["precision"].get(name):
            if values != expected:
                return f"the weights of {name!r} are other ones", False
            continue
        other_precision = True
        tolerance = max(_TOLERANCE.get(p, 1e-2) for p in (stored["precision"][name], found["precision"][name]))
        if not _near(expected, values, tolerance):
            return f"the weights of {name!r} differ by more than the precision explains", True
    return None, other_precision


def _near(expected: list[float], found: list[float], tolerance: float) -> bool:
    size = max((abs(value) for value in expected), default=0.0)
    return len(expected) == len(found) and all(
        abs(a - b) <= tolerance * max(size, 1e-12) for a, b in zip(expected, found, strict=True)
    )


def _shape_difference(stored: dict[str, Any], found: dict[str, Any]) -> str:
    missing = [name for name in stored if name not in found]
    extra = [name for name in found if name not in stored]
    other = [name for name in stored if name in found and stored[name] != found[name]]
    if other:
        return f"{other[0]!r} has shape {found[other[0]]}, the adapter's base has {stored[other[0]]}"
    if missing:
        return f"this model has no {missing[0]!r} ({len(missing)} parameters of the adapter's base are missing)"
    return f"this model has {extra[0]!r}, which the adapter's base has not ({len(extra)} such parameters)"
