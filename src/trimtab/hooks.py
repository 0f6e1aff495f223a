"""Hooking: a target's class is swapped for a generated subclass that calls the adapters' leaves around its forward.

Nothing is wrapped: the module object, its class name, its parameters and its state-dict keys stay. A leaf is a child
module of its target and holds the tensors of one adapter there. Weights that a module reads without calling their
owner (`nn.MultiheadAttention`, raw parameters) are replaced by a property that is active only inside one forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import AttachError

if TYPE_CHECKING:
    from trimtab.merge import Edit
    from trimtab.method import Method
    from trimtab.structure import Structure

PREFIX = "trimtab_"
Call = Callable[..., Any]


@dataclass
class State:
    """What all leaves of one adapter share: the facts that can change after attaching."""

    name: str
    active: bool = True
    merged: bool = False
    shared: dict[str, str] = field(default_factory=dict)


class Leaf(nn.Module):
    """The tensors of one adapter at one site, registered as a child of its target.

    `beside` says that `forward(x, y)` acts on the target's input and output, so that the target runs once for all
    the rows of a routed batch; `generates` that it has a `generate` of its own.

    `around` wraps the target's call; `forward` is the part that reads the leaf's own tensors, always called
    positionally through the module call so that per-sample gradients, sharding and hooks see it.
    """

    method: Method
    site: Any
    state: State
    target: nn.Module
    root: nn.Module
    beside = False
    generates = False
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, method: Method, site: Any, state: State, root: nn.Module, target: nn.Module) -> None:
        super().__init__()
        self.method = method
        self.site = site
        self.state = state
        self.__dict__["target"] = target  # a reference, not a child: it would register the base a second time
        self.__dict__["root"] = root

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the target's call with this leaf's change applied."""
        raise NotImplementedError

    def edits(self) -> list[Edit]:
        """Return the base parameters and their values after merging; raises AttachError where that is impossible."""
        raise AttachError(f"{type(self.method).__name__} cannot be merged: {self.method.capabilities.merge_reason}.")

    def read_through(self) -> list[tuple[nn.Module, str, tuple[str, ...]]]:
        """Return the modules, with paths, whose parameters this leaf replaces during the target's forward."""
        return []

    def companions(self, structure: Structure, previous: Leaf | None) -> Iterator[tuple[str, str, Leaf]]:
        """Yield (path, key, leaf) of leaves elsewhere that hand something to this one, which follows `previous`."""
        return iter(())

    def shared(self, name: str) -> Tensor:
        """Return one of the tensors that all sites of this adapter part share."""
        return getattr(self.root, self.state.shared[name])  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{type(self.method).__name__}, adapter={self.state.name!r}"


def _call_through(module: Any, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    attached = module._trimtab_attached
    call: Call = functools.partial(forward, module)
    leaves = [module._modules[key] for key in module._trimtab_keys]
    if module is attached.root:
        attached.before_forward()
    if attached.router is not None and attached.router.engaged:
        return attached.router.run(module, call, leaves, args, kwargs)
    for leaf in leaves:
        if leaf.state.active and not leaf.state.merged:
            call = functools.partial(leaf.around, call)
    return call(*args, **kwargs)


def _rebuild(base: type[nn.Module], parameters: tuple[str, ...]) -> nn.Module:
    """Recreate an instance of a generated class; used by pickle and deepcopy."""
    cls = hooked_class(base, parameters)  # type: ignore[arg-type]
    return object.__new__(cls)


def _reader(name: str) -> property:
    def read(module: Any) -> Tensor | None:
        values = module._trimtab_values
        if name in values:
            return values[name]  # type: ignore[no-any-return]
        return module._parameters[name]  # type: ignore[no-any-return]

    return property(read)


@functools.cache
def hooked_class(base: type[nn.Module], parameters: tuple[str, ...] = ()) -> type[nn.Module]:
    """Return the subclass of `base` that calls through its leaves; `parameters` are read through a property."""

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
    }
    namespace.update({name: _reader(name) for name in parameters})
    namespace["train"] = _train_of(base)
    if issubclass(base, nn.Sequential):
        namespace.update(_sequential_methods())
    if "save_pretrained" in dir(base):
        namespace["save_pretrained"] = _refuse_save_pretrained
    if "generate" in dir(base):
        namespace["generate"] = _generate_of(base)
    generated: type[nn.Module] = type.__new__(type(base), base.__name__, (base,), namespace)
    return generated


def _train_of(base: type[nn.Module]) -> Call:
    def train(self: Any, mode: bool = True) -> Any:
        base.train(self, mode)
        if self is self._trimtab_attached.root:
            self._trimtab_attached.keep_modes()
        return self

    return train


def _generate_of(base: Any) -> Call:
    """Generation counts the tokens it is given; a leaf on the root that adds some takes part in that."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Call = functools.partial(base.generate, self)
        leaves = [leaf for key in self._trimtab_keys if (leaf := self._modules[key]).generates and leaf.state.active]
        if len(leaves) > 1:
            names = ", ".join(repr(leaf.state.name) for leaf in leaves)
            raise AttachError(f"generate cannot put several prompts in front of one input, found {names}; use one.")
        return leaves[0].generate(call, args, kwargs) if leaves else call(*args, **kwargs)

    return generate


def _sequential_methods() -> dict[str, Any]:
    def children(self: nn.Module) -> list[nn.Module]:
        return [child for child in self._modules.values() if child is not None and not isinstance(child, Leaf)]

    return {"__iter__": lambda self: iter(children(self)), "__len__": lambda self: len(children(self))}


def _refuse_save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
    """Saving the whole model would write keys that a plain reload drops in silence: the result would be the base."""
    adapters = self._trimtab_attached.adapters
    unsafe = [name for name, adapter in adapters.items() if not adapter.merged or adapter.created_bias]
    if not unsafe:
        base: Any = base_class(self)
        base.save_pretrained(self, *args, **{"state_dict": base_state_dict(self), **kwargs})
        return
    found = ", ".join(repr(name) for name in unsafe)
    raise AttachError(
        f"save_pretrained was asked for a model with the attached adapter {found}: a plain reload would silently be "
        f"the base model. Either save the adapter (adapter.save(path)), or merge it first (adapter.merge()); a merge "
        f"that creates biases the configuration cannot express cannot be saved this way at all."
    )


def is_hooked(module: nn.Module) -> bool:
    """Say whether the module's class is one of ours."""
    return hasattr(type(module), "_trimtab_base")


def base_class(module: nn.Module) -> type[nn.Module]:
    """Return the user's own class of the module, hooked or not."""
    return getattr(type(module), "_trimtab_base", type(module))


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict without the tensors of attached adapters: the base's own keys."""
    state = model.state_dict()
    return {name: t for name, t in state.items() if not any(step.startswith(PREFIX) for step in name.split("."))}


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
        module.__dict__["_trimtab_keys"] = ()
        module.__dict__["_trimtab_values"] = {}
        module.__dict__["_trimtab_attached"] = attached
    module.__class__ = hooked_class(base_class(module), wanted)  # type: ignore[arg-type]


def unhook(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = base_class(module)
    for name in ("_trimtab_keys", "_trimtab_values", "_trimtab_attached"):
        module.__dict__.pop(name, None)


def add_leaf(module: nn.Module, key: str, leaf: Leaf, path: str, attached: Any) -> None:
    """Register a leaf on its target and hook the target."""
    if key in module._modules or key in module.__dict__:
        raise AttachError(f"module {path!r} already holds {key!r}; choose another adapter name.")
    hook(module, path, attached)
    module._modules[key] = leaf
    module.__dict__["_trimtab_keys"] = (*module.__dict__["_trimtab_keys"], key)


def remove_leaf(module: nn.Module, key: str) -> None:
    """Remove one leaf."""
    module._modules.pop(key)
    module.__dict__["_trimtab_keys"] = tuple(name for name in module.__dict__["_trimtab_keys"] if name != key)


def in_backward() -> bool:
    """Say whether this call runs inside a backward pass, where only a recomputation calls modules."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
