"""The verbs that change a model: plan (which changes nothing), attach, detach."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import torch
from torch import nn

from trimtab.adapter import Adapter, Part
from trimtab.attachment import Attached, attached_to, begin, refuse_sharded
from trimtab.errors import AttachError, SettingError
from trimtab.hooks import PREFIX, Leaf, State, add_leaf, remove_leaf
from trimtab.method import Method, Spec, check_settings
from trimtab.report import Coverage, Plan, Row, size_text
from trimtab.structure import Structure, is_norm
from trimtab.targets import ROLES, Item, resolve

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")


def attach(
    model: nn.Module,
    method: Method,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    base_mode: Literal["follow", "eval"] | None = None,
) -> Adapter:
    """Attach a method to a model, in place; the model stays the user's object, its base is frozen.

    `seed` alone decides the adapter's start. `dtype` is that of the adapter's numbers, whatever the base's.
    `base_mode="eval"` keeps the base in evaluation mode (no dropout, fixed statistics) also while training; "follow"
    lets it follow `model.train()`; None takes what the method asks for, and "eval" where one part of it does.
    Raises SettingError, TargetError, AttachError; the model is unchanged then.
    """
    _check_arguments(model, method, name, seed, dtype)
    structure = Structure(model)
    parts = [_resolved(structure, part, index) for index, part in enumerate(_checked_parts(method))]
    if base_mode is None:
        base_mode = "eval" if any(p.method.capabilities.base_mode == "eval" for p in parts) else "follow"
    return build(model, method, parts, name, seed, dtype, base_mode)


def _check_arguments(model: nn.Module, method: Method, name: str, seed: int, dtype: torch.dtype) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach needs a torch.nn.Module, found {type(model).__name__}.")
    if not isinstance(method, Method):
        raise SettingError(f"attach needs a method such as LoRA(rank=8), found {method!r}.")
    if not _NAME.match(name):
        raise AttachError(f"adapter name {name!r}: use letters, digits, '_' and '-' only.")
    existing = attached_to(model)
    if existing is not None and name in existing.adapters:
        raise AttachError(f"an adapter named {name!r} is attached already; choose another name, or detach it first.")
    if existing is not None:
        merged = [other for other, adapter in existing.adapters.items() if adapter.merged]
        if merged:
            raise AttachError(f"adapter {merged[0]!r} is merged into this model; unmerge it before attaching another.")
    if not dtype.is_floating_point:
        raise SettingError(f"dtype {dtype} is not a floating-point type.")
    if seed < 0:
        raise SettingError(f"seed must be a whole number from 0, found {seed!r}.")


def _checked_parts(method: Method) -> tuple[Method, ...]:
    check_settings(method)
    parts = method.parts()
    for part in parts:
        if part is not method:
            check_settings(part)
    return parts


def _resolved(structure: Structure, method: Method, index: int) -> Part:
    items = resolve(structure, vars(method)["targets"])
    return resolved_part(structure, method, index, items)


def resolved_part(structure: Structure, method: Method, index: int, items: list[Item]) -> Part:
    """Return an unattached part for given items; used by `attach` and by loading, which knows the items."""
    sites = method.sites(structure, tuple(f"={item}" for item in items))
    part = Part(method, index, items, sites, State(""), structure.model)
    part.specs = {str(site): method.tensors(site) for site in sites}
    part.shared_specs = method.shared(sites)
    if not any(spec.trainable for specs in (*part.specs.values(), part.shared_specs) for spec in specs.values()):
        raise SettingError(f"{type(method).__name__} would train nothing with these settings.")
    return part


def build(
    model: nn.Module,
    method: Method,
    parts: list[Part],
    name: str,
    seed: int,
    dtype: torch.dtype,
    base_mode: Literal["follow", "eval"],
) -> Adapter:
    """Create the leaves of resolved parts, initialise them, and register the adapter; undone on any error."""
    fresh = attached_to(model) is None
    attached = begin(model)
    adapter = Adapter(name, model, method, parts, seed, base_mode)
    try:
        for part in parts:
            _refuse_conflicts(attached, part)
            part.state.name = name
            _place(attached, part, name, dtype)
            _initialise(part, seed)
    except BaseException:
        _remove_leaves(attached, adapter)
        if fresh:
            attached.release()
        raise
    attached.adapters[name] = adapter
    attached.keep_modes()
    return adapter


def _place(attached: Attached, part: Part, name: str, dtype: torch.dtype) -> None:
    root = attached.root
    key = f"{PREFIX}{name}" + (f"_{part.index}" if part.index else "")
    anchor = next(root.parameters(), None)
    device = anchor.device if anchor is not None else torch.device("cpu")
    for tensor_name, spec in part.shared_specs.items():
        attribute = f"{key}_{tensor_name}"
        _register(root, attribute, spec, dtype, device)
        part.state.shared[tensor_name] = attribute
    for site in part.sites:
        owner = root.get_submodule(site.owner)
        leaf = site.leaf_class(part.method, site, part.state, root, owner)
        leaf.train(owner.training)
        place = next((p.device for p in owner.parameters() if not p.is_meta), device)
        for tensor_name, spec in part.specs[str(site)].items():
            _register(leaf, tensor_name, spec, dtype, place)
        part.leaves.append(leaf)
        _connect(attached, leaf, key + site.key, site.owner)
    structure = Structure(root)
    for previous, leaf in zip([None, *part.leaves], part.leaves, strict=False):
        for path, companion_key, companion in leaf.companions(structure, previous):
            part.companions.append(companion)
            _connect(attached, companion, key + companion_key, path)


def _connect(attached: Attached, leaf: Leaf, key: str, path: str) -> None:
    attached.hook(leaf.target, path)
    for module, inner, parameters in leaf.read_through():
        attached.hook(module, inner, parameters)
    attached.cover(path)
    add_leaf(leaf.target, key, leaf, path, attached)
    leaf.__dict__["registered_as"] = key


def _register(module: nn.Module, name: str, spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
    chosen = spec.dtype or dtype
    data = torch.zeros(spec.shape, dtype=chosen, device=device)
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


def _refuse_conflicts(attached: Attached, part: Part) -> None:
    """Additive methods add up at one site; a second one that is not additive is undefined there."""
    own = type(part.method).__name__
    for other in (p for adapter in attached.adapters.values() for p in adapter.parts):
        if part.method.capabilities.additive and other.method.capabilities.additive:
            continue
        overlap = {str(site) for site in part.sites} & {str(site) for site in other.sites}
        if overlap:
            raise AttachError(
                f"{own} and {type(other.method).__name__} (adapter {other.state.name!r}) both act on "
                f"{sorted(overlap)[0]!r}, and one of them is not additive. Detach the other adapter first, or choose "
                f"other targets."
            )


def _remove_leaves(attached: Attached, adapter: Adapter) -> None:
    for leaf in adapter.leaves():
        key = leaf.__dict__.get("registered_as")
        if key is not None and leaf.target._modules.get(key) is leaf:
            remove_leaf(leaf.target, key)
    for part in adapter.parts:
        for attribute in part.state.shared.values():
            attached.root._parameters.pop(attribute, None)
            attached.root._buffers.pop(attribute, None)


def detach(adapter: Adapter, keep_merged: bool = False) -> None:
    """Remove an adapter from its model; without `keep_merged` the base is restored bit for bit. Raises AttachError."""
    attached = adapter.attached
    refuse_sharded(adapter.model, "detach an adapter from", "Save the adapter and load it on an unwrapped model.")
    if keep_merged and not adapter.merged:
        raise AttachError(f"adapter {adapter.name!r} is not merged; call merge() before detach(keep_merged=True).")
    if not keep_merged:
        adapter.unmerge()
    if adapter.binding is not None:
        adapter.binding.release()
    _remove_leaves(attached, adapter)
    del attached.adapters[adapter.name]
    if not attached.adapters:
        attached.release()
        return
    attached.drop_unused()


def plan(model: nn.Module, method: Method) -> Plan:
    """Dry run: sites, trainable count, memory, and what is not covered; changes nothing, works on the meta device."""
    structure = Structure(model)
    parts = [_resolved(structure, part, index) for index, part in enumerate(_checked_parts(method))]
    rows, trainable, stored = [], 0, 0
    for part in parts:
        groups = ({"(shared)": part.shared_specs} if part.shared_specs else {}) | part.specs
        for site, specs in groups.items():
            learned = [spec for spec in specs.values() if spec.trainable]
            count = sum(torch.Size(spec.shape).numel() for spec in learned)
            rows.append(Row(site, type(part.method).__name__, size_text(s.shape for s in learned), count))
            trainable += count
            stored += sum(torch.Size(spec.shape).numel() for spec in specs.values())
    base = sum(parameter.numel() for module in structure.modules.values() for parameter in _own(module))
    name = type(method).__name__
    return Plan(
        name, tuple(rows), trainable, base, 4 * stored, 4 * stored + 12 * trainable, _coverage(structure, parts)
    )


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [p for key, p in module._parameters.items() if p is not None and not key.startswith(PREFIX)]


def _coverage(structure: Structure, parts: list[Part]) -> tuple[Coverage, ...]:
    """Share of the weights of each group that lies at a targeted place."""
    reached_paths = {item.path for part in parts for item in part.items}
    attention = {i.path for i in ROLES["attention"](structure)}
    mlp = {i.path for i in ROLES["mlp"](structure)}
    experts = {path for path, _ in structure.expert_parameters}
    counts: dict[str, list[int]] = {}
    seen: set[int] = set()
    for path, module in structure.modules.items():
        numbers = sum(p.numel() for p in _own(module) if id(p) not in seen)
        seen |= {id(p) for p in _own(module)}
        if not numbers:
            continue
        kind = "attention" if path in attention else "mlp" if path in mlp else "experts" if path in experts else None
        kind = kind or ("head" if path == structure.head else "embedding" if isinstance(module, nn.Embedding) else None)
        kind = kind or ("norm" if is_norm(module) else "other")
        entry = counts.setdefault(kind, [0, 0])
        entry[0] += numbers
        entry[1] += numbers if _under(path, reached_paths) else 0
    return tuple(Coverage(kind, total, reached) for kind, (total, reached) in counts.items())


def _under(path: str, reached: set[str]) -> bool:
    return any(path == target or path.startswith(target + ".") for target in reached)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters attached to a model by name; after deepcopy or unpickling these are the copy's own."""
    attached = attached_to(model)
    return {} if attached is None else dict(attached.adapters)
