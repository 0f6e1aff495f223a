"""Which leaf carries a site, and which further leaves it needs elsewhere in the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trimtab.hooks import Leaf, State
from trimtab.kinds.activation import ActivationLeaf, ActivationSite, CaptureLeaf
from trimtab.kinds.prompt import PlacesLeaf, PromptLeaf, PromptSite
from trimtab.kinds.stack import BlockLeaf, BlockSite
from trimtab.kinds.tokens import AttentionLeaf, AttentionSite
from trimtab.kinds.weight import AliasLeaf, CallLeaf, ParameterSite, ReadLeaf
from trimtab.method import Method
from trimtab.structure import Structure

Site = ParameterSite | ActivationSite | AttentionSite | PromptSite | BlockSite


def leaf_for(method: Method, site: Site, state: State, root: nn.Module, owner: nn.Module) -> Leaf:
    """Return a new leaf for a site; its tensors are still to be registered."""
    kinds: dict[type, type[Leaf]] = {
        ActivationSite: ActivationLeaf,
        AttentionSite: AttentionLeaf,
        PromptSite: PromptLeaf,
        BlockSite: BlockLeaf,
    }
    kind = (CallLeaf if site.called else ReadLeaf) if isinstance(site, ParameterSite) else kinds[type(site)]
    return kind(method, site, state, root, owner)


def companions_of(leaves: list[Leaf], structure: Structure) -> Iterator[tuple[str, str, Leaf]]:
    """Yield (path, key, leaf) of the leaves that hand something to a site from elsewhere; links blocks in order."""
    previous: Leaf | None = None
    for leaf in leaves:
        if isinstance(leaf, BlockLeaf):
            leaf.__dict__["previous"] = previous
            previous = leaf
        elif isinstance(leaf, ActivationLeaf) and leaf.site.source is not None:
            yield leaf.site.source, f"{leaf.site.key}_source", CaptureLeaf(leaf, structure.modules[leaf.site.source])
        elif isinstance(leaf, PromptLeaf):
            for path, table in _tables(structure, leaf.site.embedding):
                yield path, "_places", PlacesLeaf(leaf, table)
        elif isinstance(leaf, ReadLeaf) and leaf.site.whole:
            for path, holder, name in _other_holders(structure, leaf.holder, leaf.site.parameter):
                alias = AliasLeaf(leaf, holder)
                alias.parameter = name
                yield path, f"_alias_{name}", alias


def _tables(structure: Structure, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The embedding at `path`, and those that share its table."""
    table = structure.modules[path]
    yield path, table
    yield from ((p, m) for p, m, _ in _other_holders(structure, table, "weight") if isinstance(m, nn.Embedding))


def _other_holders(structure: Structure, holder: nn.Module, parameter: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules that hold the same parameter under another name (tied weights)."""
    shared = holder._parameters[parameter]
    for path, module in structure.modules.items():
        for name, other in module._parameters.items():
            if other is shared and not (module is holder and name == parameter):
                yield path, module, name
