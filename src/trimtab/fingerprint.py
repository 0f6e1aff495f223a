"""The fingerprint of a base model: the same base in another precision is known, a different base is refused."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.quantized import dense_weight, is_packed, linear_features
from trimtab.structure import Structure

SAMPLED_TENSORS, SAMPLES, VALUES = 48, 8, 64


def _base_parameters(model: nn.Module, replaced: set[str]) -> dict[str, tuple[nn.Module, str, Tensor]]:
    structure = Structure(model)
    found = {}
    for path, name, parameter in structure.parameters():
        found[f"{path}:{name}" if path else name] = (structure.modules[path], name, parameter)
    return {full: place for full, place in found.items() if full not in replaced}


def _shape(module: nn.Module, name: str, parameter: Tensor) -> list[int]:
    features = linear_features(module) if is_packed(module, name) else None
    return list(parameter.shape) if features is None else [features[1], features[0]]


def fingerprint(model: nn.Module, replaced: set[str]) -> dict[str, Any]:
    """Describe the base: shapes, a checksum of every plain parameter, and numbers to know it in another precision.

    `replaced` are the parameters ("path:name") that the adapter itself replaces whole, such as a new head.
    """
    base = _base_parameters(model, replaced)
    shapes = {full: _shape(*place) for full, place in base.items()}
    sampled = set(sorted(shapes)[:: max(1, len(shapes) // SAMPLED_TENSORS)][:SAMPLED_TENSORS])
    samples, precision, checks = {}, {}, {}
    for full, (module, name, parameter) in base.items():
        packed = is_packed(module, name)
        kind = "quantised" if packed else str(parameter.dtype).removeprefix("torch.")
        values = _values(module, name) if not parameter.is_meta and (full in sampled or not packed) else []
        checks[full] = kind if packed else f"{kind} {hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"
        if full in sampled:
            samples[full], precision[full] = values[:: max(1, len(values) // SAMPLES)][:SAMPLES], kind
    return {"shapes": shapes, "checks": checks, "samples": samples, "precision": precision}


def _values(module: nn.Module, name: str) -> list[float | str]:
    """Return numbers of a weight, spread evenly over it."""
    flat = dense_weight(module, name).reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, min(VALUES, flat.numel()), dtype=torch.float64).long()
    values = flat[places.to(flat.device)].double().tolist()
    return [value if math.isfinite(value) else str(value) for value in values]  # JSON has finite numbers only


_TOLERANCE = {"float64": 1e-6, "float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2, "quantised": 0.15}


def difference(stored: dict[str, Any], model: nn.Module, replaced: set[str]) -> str | None:
    """Compare a stored fingerprint with a model; returns what differs by more than the precision explains, or None."""
    found = fingerprint(model, replaced)
    if stored["shapes"] != found["shapes"]:
        return _shape_difference(stored["shapes"], found["shapes"])
    for name, check in found["checks"].items():
        if check != stored["checks"][name] and check.split(" ")[0] == stored["checks"][name].split(" ")[0]:
            return f"the weights of {name!r} are other ones"
    for name, values in found["samples"].items():
        kinds, expected = {stored["precision"][name], found["precision"][name]}, stored["samples"][name]
        size = max((abs(float(value)) for value in expected), default=0.0)
        allowed = size * max(_TOLERANCE.get(kind, 1e-2) for kind in kinds) if len(kinds) > 1 else 0.0
        near = (abs(float(a) - float(b)) <= allowed for a, b in zip(values, expected, strict=True))
        if values != expected and not all(near):
            return f"the weights of {name!r} differ by more than the precision explains"
    return None


def _shape_difference(stored: dict[str, Any], found: dict[str, Any]) -> str:
    missing = [name for name in stored if name not in found]
    extra = [name for name in found if name not in stored]
    other = [name for name in stored if name in found and stored[name] != found[name]]
    if other:
        return f"{other[0]!r} has shape {found[other[0]]}, the adapter's base has {stored[other[0]]}"
    if missing:
        return f"this model has no {missing[0]!r} ({len(missing)} parameters of the adapter's base are missing)"
    return f"this model has {extra[0]!r}, which the adapter's base has not ({len(extra)} such parameters)"
