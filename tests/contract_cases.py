"""The zoo's models as cases of the contract; importable in other processes."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from trimtab.check import Case
from trimtab.contract.case import ROUNDING
from zoo import STORED, ZOO, ZooModel

# Places that "all-linear" leaves out, each as a case of its own.
FURTHER_TARGETS = {
    "mixtral": "all-linear | experts",
    "cnn": "convolution",
    "tied_embedding": "all-linear | embedding",
    "llama": "all-linear | embedding | head",
    "cnn_1d": "all-linear | convolution",
    "cnn_3d": "all-linear | convolution",
    "gru": "all-linear | recurrent:weight_ih_l0 | recurrent:weight_hh_l1_reverse",
    "lstm": "all-linear | recurrent:weight_ih_l0 | recurrent:weight_hh_l1_reverse",
    "raw_parameters": "all-linear | :mixing | :channel",
}
# How far two ways to compute one output lie apart, as a share of the largest output: bfloat16 has three digits.
ROUNDING_OF = {"llama_bf16": 0.03}
NEW_TOKENS = 4


@cache
def pristine(name: str) -> ZooModel:
    """The entry of the zoo that every build copies; nobody else touches it."""
    return (ZOO | STORED)[name](0, 0.0)


def build(name: str) -> nn.Module:
    """A copy; it fills no cache unless it is asked to, since checkpointing would fill it twice."""
    model = copy.deepcopy(pristine(name).model)
    for module in model.modules() if pristine(name).generates else ():
        if isinstance(module, transformers.PreTrainedModel):
            module.config.use_cache = False
    return model


def primary(name: str, output: Any) -> Tensor:
    """The main output; CLIP's with the similarity of each pair, so that its temperature is used."""
    main = pristine(name).main_output(output)
    return torch.cat([main, output.logits_per_image.diagonal().unsqueeze(1)], dim=1) if name == "clip" else main


def generate(name: str, model: Any, cached: bool) -> Tensor:
    """Greedy decoding of a few tokens behind the examples."""
    inputs = {key: value for key, value in pristine(name).inputs.items() if key != "labels"}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=cached)


def zoo_case(name: str, targets: str | None = None) -> Case:
    entry = pristine(name)
    return Case(
        name if targets is None else f"{name}-further",
        partial(build, name),
        entry.inputs,
        partial(primary, name),
        targets=targets,
        tokens="input_ids" if entry.causal else None,
        generate=partial(generate, name) if entry.generates else None,
        rounding=ROUNDING_OF.get(name, ROUNDING),
    )


@cache
def zoo_cases() -> dict[str, Case]:
    cases = [zoo_case(name) for name in (*ZOO, *STORED)]
    cases += [zoo_case(name, targets) for name, targets in FURTHER_TARGETS.items()]
    return {case.name: case for case in cases}


CASE_NAMES = [*ZOO, *STORED, *(f"{name}-further" for name in FURTHER_TARGETS)]
