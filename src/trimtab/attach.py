"""The verbs that change a model: attach, detach."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from trimtab.adapter import Adapter, Part
from trimtab.attachment import LINEAGE, Attached, attached_to, begin
from trimtab.errors import AttachError, SettingError, brief
from trimtab.method import Batches, Method, Spec, check_settings, fits
from trimtab.structure import Structure
from trimtab.targets import Item, resolve

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    base_mode: Literal["follow", "eval"] | None = None,
    calibration: Batches | None = None,
) -> Adapter:
    """Attach a method to a model, in place; the model stays the user's object, its base is frozen.

    `seed` alone decides the adapter's start. `dtype` is that of the adapter's numbers, whatever the base's.
    `base_mode="eval"` keeps the base in evaluation mode (no dropout, fixed statistics) also while training; "follow"
    lets it follow `model.train()`; None takes what the method asks for, and "eval" where one part of it does.
    `calibration` is the data of methods that start from data. Raises SettingError, TargetError, AttachError; the model
    is unchanged then.
    """
    check_arguments(model, method, name, seed, dtype, base_mode)
    parts = resolved_parts(Structure(model), method)
    if base_mode is None:
        base_mode = "eval" if any(p.method.promises().base_mode == "eval" for p in parts) else "follow"
    starting = next((p.method for p in parts if p.method.promises().requires_calibration), None)
    if (starting is None) != (calibration is None):
        asked = "no method here starts from data" if starting is None else f"{type(starting).__name__} starts from data"
        raise SettingError(f"{asked}: calibration=tt.Batches(data, loss) is given for such methods, and only for them.")
    return build(Adapter(name, model, method, parts, seed, base_mode), dtype, calibration)


def check_arguments(
    model: nn.Module, method: Method, name: str, seed: int, dtype: torch.dtype, base_mode: str | None
) -> None:
    """Check what `attach` and `load` are asked for; raises AttachError or SettingError."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach needs a torch.nn.Module, found {type(model).__name__}.")
    if not isinstance(method, Method):
        raise SettingError(f"attach needs a method such as LoRA(rank=8), found {brief(method)}.")
    if not fits(name, str) or not _NAME.fullmatch(name):
        raise AttachError(f"adapter name {brief(name)}: use letters, digits, '_' and '-' only.")
    existing = attached_to(model)
    if existing is not None:
        if name in existing.adapters:
            raise AttachError(f"an adapter named {name!r} is attached already; choose another, or detach it first.")
        existing.refuse_merged("attaching another")
    if dtype not in _DTYPES:
        raise SettingError(f"dtype={brief(dtype)}; adapters are trained in {', '.join(map(str, _DTYPES))}.")
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise SettingError(f"seed must be a whole number from 0 to 2**64 - 1, found {brief(seed)}.")
    if base_mode not in (None, "follow", "eval"):
        raise SettingError(f"base_mode={brief(base_mode)}; choose 'follow', 'eval' or None.")


def resolved_parts(structure: Structure, method: Method) -> list[Part]:
    """Return a method's unattached parts, after checking every setting."""
    check_settings(method)
    parts = []
    for index, part in enumerate(method.parts()):
        check_settings(part)
        parts.append(resolved_part(structure, part, index, resolve(structure, vars(part)["targets"])))
    return parts


def resolved_part(structure: Structure, method: Method, index: int, items: list[Item]) -> Part:
    """Return an unattached part for given items; used by `attach` and by loading, which knows the items."""
    sites = method.sites(structure, tuple(f"={item}" for item in items))
    specs = {str(site): method.tensors(site) for site in sites}
    part = Part(method, index, items, sites, specs, method.shared(sites))
    if not any(spec.trainable for _, spec in part.named_specs()):
        raise SettingError(f"{type(method).__name__} would train nothing with these settings.")
    return part


def build(adapter: Adapter, dtype: torch.dtype, calibration: Batches | None = None) -> Adapter:
    """Create the leaves of resolved parts, initialise them, and register the adapter; undone on any error."""
    refuse_conflicts(itertools.combinations(adapter.parts[::-1], 2))
    attached = begin(adapter.model)
    for other in attached.adapters.values():
        refuse_conflicts(itertools.product(adapter.parts, other.parts), f" (adapter {other.name!r})")
    adapter.lineage = adapter.model.__dict__.get(LINEAGE, ())
    try:
        for part in adapter.parts:
            _place(attached, part, dtype)
            _initialise(part, adapter.seed)
        if calibration is not None:
            _calibrate(adapter, calibration)
    except BaseException:
        attached.remove(adapter)
        raise
    attached.adapters[adapter.name] = adapter
    attached.keep_modes()
    return adapter


def _place(attached: Attached, part: Part, dtype: torch.dtype) -> None:
    root = attached.root
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    for name, spec in part.shared_specs.items():
        _register(root, f"{part.key}_{name}", spec, dtype, device)
        part.shared_names[name] = f"{part.key}_{name}"
    for site in part.sites:
        owner = root.get_submodule(site.owner)
        leaf = site.leaf_class(part, site, owner)
        leaf.train(owner.training)
        place = next((p.device for p in owner.parameters() if not p.is_meta), device)
        for name, spec in part.specs[str(site)].items():
            _register(leaf, name, spec, dtype, place)
        part.leaves.append(leaf)
        attached.connect(leaf, part.key + site.key, site.owner)
    structure = Structure(root)
    for previous, leaf in zip([None, *part.leaves], part.leaves, strict=False):
        for path, key, companion in leaf.companions(structure, previous):
            part.companions.append(companion)
            attached.connect(companion, part.key + key, path)


def _register(module: nn.Module, name: str, spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
    chosen = spec.dtype or dtype
    try:
        data = torch.zeros(spec.shape, dtype=chosen, device=device)
    except (RuntimeError, OverflowError, TypeError) as error:  # more than a size can say, or than there is memory
        shape = "×".join(map(str, spec.shape))
        raise AttachError(f"{name!r} of {shape} numbers cannot be allocated; choose smaller settings.") from error
    if chosen.is_floating_point:
        module.register_parameter(name, nn.Parameter(data, requires_grad=spec.trainable))
    else:
        module.register_buffer(name, data)


def generator_for(seed: int, place: str) -> torch.Generator:
    """Return a generator that depends on the seed and the place alone, not on the order of sites."""
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _initialise(part: Part, seed: int) -> None:
    with torch.no_grad():
        shared = {name: part.shared(name).data for name in part.shared_specs}
        part.method.initialise_shared(part.sites, shared, generator_for(seed, f"{part.index}/shared"))
        for site, leaf in zip(part.sites, part.leaves, strict=True):
            part.method.initialise(leaf, generator_for(seed, f"{part.index}/{site}"))


def _calibrate(adapter: Adapter, batches: Batches) -> None:
    adapter.active = False
    with torch.no_grad():
        for part in adapter.parts:
            if part.method.promises().requires_calibration:
                part.method.calibrate(part, batches)
    adapter.active = True


def refuse_conflicts(pairs: Iterable[tuple[Part, Part]], owner: str = "") -> None:
    """Additive methods add up at one site; a second one that is not additive is undefined there."""
    for part, other in pairs:
        if part.method.promises().additive and other.method.promises().additive:
            continue
        if overlap := {str(site) for site in part.sites} & {str(site) for site in other.sites}:
            raise AttachError(
                f"{type(part.method).__name__} and {type(other.method).__name__}{owner} both act on "
                f"{sorted(overlap)[0]!r}, and one of them is not additive: choose other targets"
                f"{', or detach the other adapter first' if owner else ''}."
            )


def detach(adapter: Adapter, keep_merged: bool = False) -> None:
    """Remove an adapter from its model; see `Adapter.detach`."""
    adapter.detach(keep_merged)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters attached to a model by name; after deepcopy or unpickling these are the copy's own."""
    attached = attached_to(model)
    return {} if attached is None else dict(attached.adapters)
