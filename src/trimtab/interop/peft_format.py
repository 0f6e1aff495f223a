"""The folder format of huggingface/peft's LoRA: names of files and tensors, and how names select modules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.kinds.layouts import ConvolutionLayout, EmbeddingLayout
from trimtab.kinds.weight import ParameterSite

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CLASSIFIERS = ("classifier", "score")  # the heads of sequence classifiers, as peft knows them
_TENSOR = re.compile(r"^(?P<path>.+)\.lora_(?:(?:embedding_)?(?P<factor>[AB])|magnitude_vector)(?:\.weight)?$")


def parse_tensor_name(name: str) -> tuple[str, str] | None:
    """Return (module path, "A", "B" or "magnitude") of a LoRA tensor's name without prefix, else None."""
    found = _TENSOR.match(name)
    return None if found is None else (found["path"], found["factor"] or "magnitude")


def named_factors(site: ParameterSite, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return down (*lead, r, in) and up (*lead, out, r) by the file's names and in its shapes.

    A convolution's factors are kernels; with groups, its A reads all channels and gets zeros for those of other groups.
    An embedding's factors are parameters of their own, not weights of modules.
    """
    start = f"{PREFIX}{site.path}.lora_"
    if isinstance(site.layout, EmbeddingLayout):
        return {f"{start}embedding_A": down.contiguous(), f"{start}embedding_B": up.contiguous()}
    if isinstance(site.layout, ConvolutionLayout):
        kernel = site.shape[2:]
        down = _diagonal(_matrices(down)).reshape(-1, math.prod(site.layout.lead) * site.shape[1], *kernel)
        up = up.reshape(-1, up.shape[-1], *[1] * len(kernel))
    return {f"{start}A.weight": down.contiguous(), f"{start}B.weight": up.contiguous()}


def own_down(stored: Tensor, like: Tensor) -> Tensor | None:
    """Return a file's A in the shape of `like` (*lead, r, in); None where a group of a convolution reads another's."""
    if len(_matrices(like)) == 1 or stored.numel() != len(_matrices(like)) * like.numel():
        return stored
    rank, columns = like.shape[-2:]
    flat = stored.reshape(len(_matrices(like)) * rank, -1)
    blocks = [flat[i * rank : (i + 1) * rank, i * columns : (i + 1) * columns] for i in range(len(_matrices(like)))]
    return torch.stack(blocks) if torch.equal(_diagonal(blocks), flat) else None


def _diagonal(blocks: Iterable[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)  # type: ignore[no-any-return,no-untyped-call]


def _matrices(factor: Tensor) -> Tensor:
    return factor.reshape(-1, *factor.shape[-2:])


def selects(entries: str | Iterable[str], path: str) -> bool:
    """Say whether `target_modules` selects a module: a regular expression, or names and endings of dotted paths."""
    if isinstance(entries, str):
        return re.fullmatch(entries, path) is not None
    return any(path == entry or path.endswith(f".{entry}") for entry in entries)


def saves_whole(entries: Iterable[str], path: str) -> bool:
    """Say whether `modules_to_save` covers a module, by itself or by one that holds it."""
    return any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", path) for entry in entries)


def in_layers(config: Mapping[str, Any], path: str) -> bool:
    """Say whether a module lies in the layers that `layers_to_transform` names (all, where it is empty)."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    named = config.get("layers_pattern") or []
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([named] if isinstance(named, str) else named)]
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
        found = re.match(pattern, path)
        if found is not None:
            return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return a module's own value in `rank_pattern` or `alpha_pattern`: that of the first pattern to fit its end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
