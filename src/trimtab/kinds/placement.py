"""Where some methods act inside a block: at the residual's norm, at single heads, in named roles."""

from __future__ import annotations

from torch import nn

from trimtab.errors import TargetError
from trimtab.method import Method, Targets
from trimtab.quantized import linear_features
from trimtab.structure import Attention, FeedForward, Structure, is_norm
from trimtab.targets import ROLES, split_clauses

_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head", "dim_head")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


def norm_behind(structure: Structure, part: FeedForward) -> str | None:
    """Return the norm of the residual sum behind a feed-forward part; None where norms stand before the parts.

    Evidence: torch's own layers say it; a norm beside the output projection, in a module without the input
    projection, is BERT's layout; blocks that are followed by a final norm have theirs in front.
    """
    block, names = structure.modules[part.block], list(structure.modules)
    norms = [path for path, module in structure.within(part.block).items() if is_norm(module)]
    if not norms or not part.outputs:
        return None
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return None if block.norm_first else norms[-1]
    behind = names.index(norms[-1]) > names.index(part.outputs[-1])
    parent = part.outputs[-1].rsplit(".", 1)[0]
    beside = parent == norms[-1].rsplit(".", 1)[0] != part.block
    if beside and behind and not any(path.startswith(parent + ".") for path in part.inputs):
        return norms[-1]
    return norms[-1] if behind and not _has_final_norm(structure, part.block) else None


def _has_final_norm(structure: Structure, block: str) -> bool:
    """Say whether a module around the block's list holds a norm behind it (not one of its embeddings)."""
    steps = block.split(".")
    for depth in range(len(steps) - 1):
        children = list(structure.modules[".".join(steps[:depth])].named_children())
        place = [name for name, _ in children].index(steps[depth])
        if any(is_norm(child) and "emb" not in name.lower() for name, child in children[place + 1 :]):
            return True
    return False


def head_size(structure: Structure, part: Attention) -> int | None:
    """Return the width of one attention head as the attention module records it; None where it does not."""
    features = linear_features(structure.modules[part.output]) if part.output is not None else None
    facts = vars(structure.modules[part.path])
    sizes = [facts[name] for name in _HEAD_SIZES if isinstance(facts.get(name), int)]
    counts = [facts[name] for name in _HEAD_COUNTS if isinstance(facts.get(name), int)]
    if features is None or not (sizes or counts):
        return None
    size = sizes[0] if sizes else features[0] // counts[0]
    return int(size) if features[0] % size == 0 else None


def named_roles(targets: Targets) -> set[str]:
    """Return the roles that a target expression names; none for a function."""
    if callable(targets):
        return set()
    expressions = (targets,) if isinstance(targets, str) else targets
    names = (clause.split("[")[0] for expression in expressions for _, clause in split_clauses(expression))
    return {name for name in names if name in ROLES}


def refuse_part_of_fused(method: Method, structure: Structure, path: str) -> None:
    """Stop where a weight method's targets say "query" and mean a matrix that computes query, key and value in one."""
    roles, parts = named_roles(vars(method)["targets"]), {"query", "key", "value"}
    asked = roles & parts
    if not asked or asked == parts or roles & {"attention", "all-linear"}:
        return
    if any(path == attention.fused for attention in structure.attentions):
        raise TargetError(
            f"{path!r} computes query, key and value in one matrix, so {type(method).__name__} would adapt all "
            f"three, not only {' and '.join(sorted(asked))}. Name all three, or the module itself."
        )
