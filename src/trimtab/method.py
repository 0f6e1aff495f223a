"""The contract a method fulfils: its settings, its declared capabilities, its tensors; and the catalogue."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import operator
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from trimtab.errors import SettingError, TrimtabError, brief, suggestion

if TYPE_CHECKING:
    from trimtab.adapter import Part
    from trimtab.structure import Structure

T = TypeVar("T")
_types_of = functools.cache(get_type_hints)  # evaluated once: loading a file evaluates nothing
Targets = str | tuple[str, ...] | Callable[[str, nn.Module], bool]
Stored = Literal["always", "seed", "derived", "training"]


@dataclass(frozen=True)
class Capabilities:
    """What a method promises; `check_method` proves each entry and fails on a wrong one.

    `base_mode` is no promise but a wish: the base's mode while this method trains, unless `attach` is told otherwise.
    """

    starts_at_base: Literal["exact", "approximate", "no"]
    merge: Literal["exact", "approximate", "none"]
    merge_reason: str = ""
    linear_in_parameters: bool = False
    additive: bool = True
    input_dependent: bool = False
    causal_safe: bool = True
    cached_generation: bool = True
    quantized_base: bool = True
    per_sample_gradients: bool = True
    creates_bias: bool = False
    routable: bool = True
    requires_binding: bool = False
    requires_calibration: bool = False
    keeps_base: bool = True
    checkpointing: bool = True
    base_mode: Literal["follow", "eval"] = "follow"


@dataclass(frozen=True)
class Batches:
    """Data that a method starts from: batches (the model's inputs by keyword or position) and `loss(model, batch)`."""

    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None


@dataclass(frozen=True)
class Spec:
    """One tensor of a site: its shape, and how it is trained and kept.

    `stored`: "always" in the adapter file, "seed" (rebuilt from the seed and checked by hash), "derived" (rebuilt
    from the base weights), or "training" (schedule state: only in training checkpoints).
    `lr_scale` multiplies the learning rate; `decay` false exempts the tensor from weight decay;
    `reached` false says that the method does not expect a gradient here by the second step.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    stored: Stored = "always"
    dtype: torch.dtype | None = None
    lr_scale: float = 1.0
    decay: bool = True
    reached: bool = True


def frozen(*shape: int, stored: Stored, dtype: torch.dtype | None = None) -> Spec:
    """Return the spec of a tensor that is never trained."""
    return Spec(shape, trainable=False, stored=stored, dtype=dtype)


def setting(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[T, ...] | None = None,
) -> T:
    """Declare one setting with its help text and range; `minimum`/`maximum` are inclusive, `above` is exclusive."""
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help, **bounds})


class _CheckedConstruction(type):
    """Turns an unknown setting into a SettingError that names the nearest right one."""

    if not TYPE_CHECKING:

        def __call__(cls, *args: object, **settings: object) -> object:
            signature = inspect.signature(cls.__init__)
            known = [name for name in signature.parameters if name in cls.__dataclass_fields__]
            for name in settings:
                if name not in known:
                    raise SettingError(f"{cls.__name__} has no setting {name!r}." + suggestion(name, known))
            try:
                signature.bind(None, *args, **settings)
            except TypeError as error:
                raise SettingError(f"{cls.__name__}: {error}; its settings are {', '.join(known)}.") from error
            return super().__call__(*args, **settings)


@dataclass(frozen=True)
class Method(metaclass=_CheckedConstruction):
    """Settings and mathematics of one method. Subclass one of the kinds in `trimtab.kinds`, not this class.

    The constructor stores its arguments and does nothing else; `attach` and `plan` validate them.
    """

    capabilities: ClassVar[Capabilities]

    def parts(self) -> tuple[Method, ...]:
        """Return the methods this one consists of: itself, unless it is a composition."""
        return (self,)

    def promises(self) -> Capabilities:
        """Return the capabilities under these settings: the class's own, unless a setting changes one."""
        return self.capabilities

    def validate(self) -> None:
        """Check what the types and ranges of single settings cannot express; raises SettingError."""

    def sites(self, structure: Structure, targets: Targets) -> list[Any]:
        """Resolve targets to sites of this method's kind; raises TargetError."""
        raise NotImplementedError

    def tensors(self, site: Any) -> dict[str, Spec]:
        """Return the tensors of one site; shapes only, so that it works on the meta device."""
        raise NotImplementedError

    def shared(self, sites: list[Any]) -> dict[str, Spec]:
        """Return the tensors that all sites share, owned once by the adapter."""
        return {}

    def initialise(self, leaf: Any, generator: torch.Generator) -> None:
        """Fill the leaf's tensors in place (they start at zero); called without gradient recording."""

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        """Fill the shared tensors in place; called before `initialise`."""

    def calibrate(self, part: Part, batches: Batches) -> None:
        """Start from data, where `requires_calibration` asks for it; called after `initialise`, without recording."""

    def check_schedule(self, total_steps: int) -> None:
        """Check at binding that a schedule fits a run of that many optimizer steps; raises TrainingError."""

    def exported(self) -> Method:
        """Return the method that an adapter file names: itself, unless it drops what only helped training."""
        return self

    def export(self, leaf: Any) -> dict[str, Tensor]:
        """Return a leaf's tensors as the exported method holds them; needed only where that is another method."""
        raise NotImplementedError

    def before_step(self, part: Part) -> None:
        """Event: gradients are complete (unscaled) and the optimizer is about to step."""

    def after_step(self, part: Part, step: int, total_steps: int) -> None:
        """Event: the optimizer has made step `step` (0-based); gradients are still there."""

    def before_merge(self, part: Part) -> None:
        """Event: the adapter is about to be merged."""

    def penalty(self, part: Part) -> Tensor | None:
        """Return a scalar to be added to the loss, or None."""
        return None


def settings_of(method: Method) -> dict[str, object]:
    """Return the settings that differ from their defaults, by name."""
    return {f.name: value for f in dataclasses.fields(method) if (value := getattr(method, f.name)) != f.default}


def check_settings(method: Method) -> None:
    """Check types and ranges of every setting, then the method's own rules; raises SettingError."""
    hints = _types_of(type(method))
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        where = f"{type(method).__name__}({f.name}={brief(value)})"
        if not fits(value, hints[f.name]):
            inside = ", ".join({type(item).__name__: 0 for item in value}) if isinstance(value, list | tuple) else ""
            found = type(value).__name__ + (f" of {inside}" if inside else "")
            meaning = f" ({f.name}: {f.metadata['help']})" if "help" in f.metadata else ""
            raise SettingError(f"{where}: expected {_readable(hints[f.name])}, found {found}{meaning}.")
        _check_range(where, value, f.metadata)
    method.validate()


_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (operator.ge, "at least"),
    "maximum": (operator.le, "at most"),
    "above": (operator.gt, "above"),
}


def _check_range(where: str, value: object, metadata: Any) -> None:
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        names = [str(choice) for choice in choices]
        raise SettingError(f"{where}: choose one of {', '.join(names)}." + suggestion(str(value), names))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    single = torch.finfo(torch.float32)
    most = single.max if isinstance(value, float) else torch.iinfo(torch.int64).max
    if value != 0 and not single.tiny <= abs(value) <= most:
        raise SettingError(f"{where}: must be a finite number, in size from {single.tiny:.3g} to {most:.3g} (or 0).")
    for bound, (holds, words) in _BOUNDS.items():
        limit = metadata.get(bound)
        if limit is not None and not holds(value, limit):
            raise SettingError(f"{where}: must be {words} {limit}.")


def fits(value: object, hint: Any) -> bool:
    """Say whether a value is of a type, as settings and headers of files name them; true and false are no numbers."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is Callable:
        return callable(value)
    if origin is tuple and isinstance(value, tuple):
        expected = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(expected) and all(map(fits, value, expected))
    if origin in (list, dict) and isinstance(value, list | dict):
        members = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(fits(member, inner[-1]) for member in members)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


def _readable(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("collections.abc.", "")


def _subclasses(base: type[Method]) -> Iterator[type[Method]]:
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)


@functools.cache
def _import_methods() -> None:
    package = importlib.import_module("trimtab.methods")
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(info.name)
    for entry in importlib.metadata.entry_points(group="trimtab.methods"):
        entry.load()


def methods() -> dict[str, type[Method]]:
    """Return every known method by name: built in, installed by entry point, or defined in this process."""
    _import_methods()
    found = {cls.__name__: cls for cls in _subclasses(Method) if "capabilities" in cls.__dict__}
    return dict(sorted(found.items()))


def find_method(name: str) -> type[Method]:
    """Return the method class of that name; raises TrimtabError with the nearest names."""
    catalogue = methods()
    by_lower = {known.lower(): cls for known, cls in catalogue.items()}
    if name.lower() not in by_lower:
        raise TrimtabError(f"there is no method {name!r}." + suggestion(name, catalogue))
    return by_lower[name.lower()]
