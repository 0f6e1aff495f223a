"""Hooking: a target's class is swapped for a generated subclass that calls the adapters' leaves around its forward.

Nothing is wrapped: the module object, its class name, its parameters and its state-dict keys stay. A leaf is a child
module of its target and holds the tensors of one adapter there. Weights that a module reads without calling their
owner (`nn.MultiheadAttention`, raw parameters) are replaced by a property that is active only inside one forward.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.errors import AttachError

if TYPE_CHECKING:
    from trimtab.adapter import Adapter, Part
    from trimtab.merge import Edit
    from trimtab.method import Method
    from trimtab.structure import Structure

PREFIX = "trimtab_"
Call = Callable[..., Any]
# Methods of users' models that must know of adapters, by name, made for a class; registered by layers above the core.
GUARDS: dict[str, Callable[[Any], Call]] = {}


class Leaf(nn.Module):
    """The tensors of one adapter's part at one site, registered as a child of its target.

    `beside` says that `forward(x, y)` acts on the target's input and output, so that the target runs once for all
    the rows of a routed batch; `generates` that it has a `generate` of its own.

    `around` wraps the target's call; `forward` is the part that reads the leaf's own tensors, always called
    positionally through the module call so that per-sample gradients, sharding and hooks see it.
    """

    target: nn.Module
    beside = False
    generates = False
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, part: Part, site: Any, target: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.method: Method = part.method
        self.site: Any = site
        self.__dict__["target"] = target  # a reference, not a child: it would register the base a second time

    @property
    def adapter(self) -> Adapter:
        """The adapter that the leaf belongs to."""
        return self.part.adapter

    @property
    def acts(self) -> bool:
        """Whether the leaf takes part in the forward: its adapter is active, and not merged into the base."""
        return self.adapter.active and not self.adapter.merged

    @property
    def root(self) -> nn.Module:
        """The model that the adapter is attached to."""
        return self.part.adapter.model

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the target's call with this leaf's change applied."""
        raise NotImplementedError

    def edits(self) -> list[Edit]:
        """Return the base parameters and their values after merging; raises AttachError where that is impossible."""
        raise AttachError(f"{type(self.method).__name__} cannot be merged: {self.method.promises().merge_reason}.")

    def read_through(self) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
        """Return the modules, with paths, whose parameters this leaf replaces during the target's forward."""
        return []

    def companions(self, structure: Structure, previous: Leaf | None) -> Iterator[tuple[str, str, Leaf]]:
        """Yield (path, key, leaf) of leaves elsewhere that hand something to this one, which follows `previous`."""
        return iter(())

    def shared(self, name: str) -> Tensor:
        """Return one of the tensors that all sites of this adapter part share."""
        return self.part.shared(name)

    def extra_repr(self) -> str:
        return f"{type(self.method).__name__}, adapter={self.adapter.name!r}"


def base_children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, child) of the module's children, without leaves."""
    return [(k, child) for k, child in module._modules.items() if child is not None and not isinstance(child, Leaf)]


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) in order of registration, each module at its first path, without leaves."""
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            pending += [(f"{path}.{name}" if path else name, child) for name, child in reversed(base_children(module))]


def leaves_of(module: nn.Module) -> list[Leaf]:
    """Return the leaves on a module, first attached first."""
    return [child for child in module._modules.values() if isinstance(child, Leaf)]


def _call_through(module: Any, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    attached = module._trimtab_attached
    call: Call = functools.partial(forward, module)
    leaves = leaves_of(module)
    if module is attached.root:
        attached.before_forward()
    if attached.router is not None:
        return attached.router(module, call, leaves, args, kwargs)
    return through(leaves, call)(*args, **kwargs)


def through(leaves: list[Leaf], call: Call) -> Call:
    """Return the call with each leaf around it that takes part in the forward, the first attached innermost."""
    for leaf in leaves:
        if leaf.acts:
            call = functools.partial(leaf.around, call)
    return call


def _rebuild(base: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    """Recreate an instance of a generated class; used by pickle and deepcopy."""
    return object.__new__(hooked_class(base, parameters))


def _reader(name: str) -> property:
    return property(lambda module: module._trimtab_values.get(name, module._parameters[name]))


# Weakly, since a class holds its base: a class that a user made in a function must not live for ever.
_generated: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def hooked_class(base: type[nn.Module], parameters: tuple[str, ...] = ()) -> type[nn.Module]:
    """Return the subclass of `base` that calls through its leaves; `parameters` are read through a property."""
    if (known := _generated.get((base, parameters))) is not None:
        return known

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call_through(self, base.forward, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        rest: Any = object.__reduce_ex__(self, max(2, int(protocol)))[2:]
        return (_rebuild, (base, parameters), *rest)

    def new(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        return base(*args, **kwargs)  # type(model)(…) asks for another model: one without adapters

    namespace: dict[str, Any] = {
        "__new__": new,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "forward": forward,
        "_trimtab_base": base,
        "_trimtab_parameters": parameters,
        "train": _train_of(base),
        **{name: _reader(name) for name in parameters},
    }
    if issubclass(base, nn.Sequential):
        namespace["__iter__"] = lambda self: iter([child for _, child in base_children(self)])
        namespace["__len__"] = lambda self: len(base_children(self))
    namespace |= {name: make(base) for name, make in GUARDS.items() if name in dir(base)}
    generated: type[nn.Module] = type.__new__(type(base), base.__name__, (base,), namespace)
    return _generated.setdefault((base, parameters), generated)


def _train_of(base: type[nn.Module]) -> Call:
    def train(self: Any, mode: bool = True) -> Any:
        base.train(self, mode)
        if self is self._trimtab_attached.root:
            self._trimtab_attached.keep_modes()
        return self

    return train


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """After the `with`, every module is in the mode that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def is_hooked(module: nn.Module) -> bool:
    """Say whether the module's class is one of ours."""
    return hasattr(type(module), "_trimtab_base")


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the user's own class of the module, hooked or not."""
    return getattr(type(module), "_trimtab_base", type(module))


def is_adapters(name: str) -> bool:
    """Say whether a dotted name of a module or tensor is one of an adapter's."""
    return any(step.startswith(PREFIX) for step in name.split("."))


def hook(module: nn.Module, path: str, attached: Any, parameters: tuple[str, ...] = ()) -> None:
    """Swap the module's class so that its forward runs through its leaves; raises AttachError where that is dead."""
    if "forward" in module.__dict__ or "_old_forward" in module.__dict__:
        raise AttachError(
            f"module {path!r} has a forward of its own on the instance (accelerate's dispatch does this), which would "
            f"silently bypass the adapter. Attach first, then dispatch the model."
        )
    known: tuple[str, ...] = getattr(type(module), "_trimtab_parameters", ())
    wanted = tuple(sorted({*known, *parameters}))
    if not is_hooked(module):
        module.__dict__["_trimtab_values"] = {}
        module.__dict__["_trimtab_attached"] = attached
    module.__class__ = hooked_class(base_class(module), wanted)


def unhook(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = base_class(module)
    for name in ("_trimtab_values", "_trimtab_attached"):
        module.__dict__.pop(name, None)
