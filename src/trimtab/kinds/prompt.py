"""Prompts: trained vectors in front of the input tokens of a whole model, with masks, labels and generation.

The prompt takes places of its own: placeholder ids in front of the given ids, whose embeddings it replaces. The model
itself thus counts positions, finds padding, pools and generates as it does for tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf, base_class
from trimtab.kinds.sites import Companion, ModuleSite, other_holders
from trimtab.method import Method, Targets
from trimtab.structure import Structure
from trimtab.targets import resolve

IGNORED_LABEL = -100
_TOKEN_WISE = {"logits": 3, "last_hidden_state": 3, "hidden_states": 3, "start_logits": 2, "end_logits": 2}  # by axes


@dataclass(frozen=True)
class PromptSite(ModuleSite):
    """The root of a model that takes token ids, and the embedding table it looks them up in.

    `placeholder` is an id without a meaning of its own; `encoder_decoder` says that the prompt stands in the encoder.
    """

    embedding: str
    features: int
    vocabulary: int
    placeholder: int
    encoder_decoder: bool

    def __str__(self) -> str:
        return f"{self.embedding}:prompt"

    @property
    def leaf_class(self) -> type[Leaf]:
        return PromptLeaf


class PromptLeaf(Leaf):
    """The prompt of one adapter; acts on the arguments of the model's forward by their names.

    `awaited` is set while the embedding is to put the prompt in: the number of positions from the prompt to the end.
    """

    site: PromptSite
    method: PromptMethod
    generates = True
    generating = False
    awaited: int | None = None

    def companions(self, structure: Structure, previous: Leaf | None) -> Iterator[tuple[str, str, Leaf]]:
        table = structure.modules[self.site.embedding]
        yield self.site.embedding, "_places", PlacesLeaf(self, table)
        for path, other, _ in other_holders(structure, table, "weight"):
            if isinstance(other, nn.Embedding):
                yield path, "_places", PlacesLeaf(self, other)

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        inputs = named_arguments(self.root, args, kwargs)
        past = _length(inputs.get("past_key_values"))
        if self.generating:
            return call(**inputs) if past or self.site.encoder_decoder else self._embedded(call, inputs)
        if past:
            return call(**self._continued(inputs, past))
        if inputs.get("encoder_outputs") is not None:
            raise AttachError(
                f"adapter {self.adapter.name!r} puts a prompt in front of the encoder's tokens; whether the given "
                f"encoder_outputs hold it cannot be told. Pass input_ids, or call generate."
            )
        extended = self.extended(inputs)
        by_ids = extended.get("inputs_embeds") is None
        output = self._embedded(call, extended) if by_ids else call(**extended)
        return output if self.site.encoder_decoder else _without_prompt(output, self.length, self._count(extended))

    def _embedded(self, call: Call, inputs: dict[str, Any]) -> Any:
        """Call while the embedding puts the prompt into its places."""
        self.awaited = int(inputs["input_ids"].shape[1])
        if self.awaited < self.length:
            raise AttachError(f"{self.awaited} tokens at a time cannot hold the {self.length} places of the prompt.")
        try:
            output = call(**inputs)
            self._check_embedded()
        finally:
            self.awaited = None
        return output

    def _check_embedded(self) -> None:
        if self.awaited is not None:
            raise AttachError(
                f"the embedding {self.site.embedding!r} was never called with the input tokens, so the prompt had no "
                f"effect. Name the table of the input tokens: {type(self.method).__name__}(targets=…)."
            )

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return self.method.prompt_length

    def extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return forward's named inputs with places for the prompt (for given embeddings: with the prompt itself)."""
        changed, ids, embeddings = dict(inputs), inputs.get("input_ids"), inputs.get("inputs_embeds")
        if embeddings is not None:
            changed["inputs_embeds"] = torch.cat([self(embeddings), embeddings], dim=1)
        elif ids is not None:
            changed["input_ids"] = F.pad(ids, (self.length, 0), value=self.site.placeholder)
        else:
            raise AttachError("a prompt needs input_ids or inputs_embeds, by name or as the first argument.")
        count = self._count(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise AttachError(f"a prompt needs an attention_mask of shape (batch, tokens), found {tuple(mask.shape)}.")
        changed.update(self._padded(inputs, "attention_mask", 1, count))
        changed.update(self._padded(inputs, "token_type_ids", 0, count))
        if not self.site.encoder_decoder:
            changed.update(self._padded(inputs, "labels", IGNORED_LABEL, count))
        for name in ("start_positions", "end_positions"):
            if inputs.get(name) is not None:
                changed[name] = inputs[name] + self.length
        if inputs.get("position_ids") is not None:
            changed["position_ids"] = self._positions(inputs["position_ids"])
        return changed

    def _count(self, inputs: dict[str, Any]) -> int:
        given: Tensor = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        return int(given.shape[1])

    def _padded(self, inputs: dict[str, Any], name: str, value: int, count: int) -> dict[str, Tensor]:
        """Return the named input with `value` at the prompt's places, where it has one whole number for each token."""
        given = inputs.get(name)
        token_wise = isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == count
        if not isinstance(given, Tensor) or not token_wise or (name == "labels" and given.is_floating_point()):
            return {}
        return {name: F.pad(given, (self.length, 0), value=value)}

    def _positions(self, positions: Tensor) -> Tensor:
        front = torch.arange(self.length, device=positions.device).expand(*positions.shape[:-1], -1)
        return torch.cat([front, positions + self.length], dim=-1)

    def _continued(self, inputs: dict[str, Any], past: int) -> dict[str, Any]:
        """Return the inputs of a step whose cache holds the prompt: masks and positions that do not count it, grow."""
        changed, mask = dict(inputs), inputs.get("attention_mask")
        if mask is not None and mask.shape[-1] + self.length == past + self._count(inputs):
            changed["attention_mask"] = F.pad(mask, (self.length, 0), value=1)
        if inputs.get("position_ids") is not None:
            changed["position_ids"] = inputs["position_ids"] + self.length
        return changed

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the prompt for each row, (B, l, d), in the embeddings' dtype."""
        prompt = self.method.prompt(self)
        return prompt.to(embeddings.dtype).unsqueeze(0).expand(embeddings.shape[0], -1, -1)

    def generate(self, generate: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own generate with places for the prompt; returns ids as without it."""
        inputs = {**({"input_ids": args[0]} if args else {}), **kwargs}
        given = inputs.pop("inputs", None)
        inputs["input_ids"] = given if inputs.get("input_ids") is None else inputs["input_ids"]
        if inputs["input_ids"] is None or len(args) > 1:
            raise AttachError("generate with a prompt adapter needs input_ids, and keyword arguments for all else.")
        extended = self.extended(inputs)
        if not self.site.encoder_decoder:
            longer = ("max_length", "min_length")  # both count the ids that are passed in
            extended |= {name: inputs[name] + self.length for name in longer if inputs.get(name) is not None}
        self.generating = True
        self.awaited = int(extended["input_ids"].shape[1]) if self.site.encoder_decoder else None
        try:
            produced = generate(**extended)
            self._check_embedded()
        finally:
            self.generating, self.awaited = False, None
        return produced if self.site.encoder_decoder else _without_places(produced, self.length)


class PlacesLeaf(Companion):
    """Puts the prompt of another leaf into its places among the embeddings; holds no tensors."""

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Tensor:
        embeddings: Tensor = call(*args, **kwargs)
        partner: PromptLeaf = self.partner
        awaited = partner.awaited
        if awaited is None or embeddings.dim() != 3 or embeddings.shape[1] < awaited:
            return embeddings
        partner.awaited = None
        start = embeddings.shape[1] - awaited
        return torch.cat([embeddings[:, :start], partner(embeddings), embeddings[:, start + partner.length :]], dim=1)


def signature_of(module: nn.Module) -> inspect.Signature:
    """Return the signature of the user's own forward."""
    return inspect.signature(base_class(module).forward)


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the module's own forward by their names."""
    if not args:
        return dict(kwargs)
    bound = signature_of(module).bind_partial(module, *args, **kwargs)
    _, *names = bound.arguments
    variable = {p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD}
    named = {name: bound.arguments[name] for name in names if name not in variable}
    return named | {key: value for name in variable for key, value in bound.arguments.get(name, {}).items()}


def _length(cache: Any) -> int:
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if not isinstance(cache, tuple | list) else int(cache[0][0].shape[-2])


def _without_places(produced: Any, length: int) -> Any:
    if isinstance(produced, Tensor):
        return produced[:, length:]
    produced["sequences"] = produced["sequences"][:, length:]
    return produced


def _without_prompt(output: Any, length: int, total: int) -> Any:
    """Drop the prompt's positions from token-wise outputs, so that logits stay aligned with the given tokens."""

    def trimmed(value: Any, axes: int) -> Any:
        if isinstance(value, Tensor):
            return value[:, length:] if value.dim() == axes and value.shape[1] == total else value
        return tuple(trimmed(item, axes) for item in value) if type(value) is tuple else value

    if not isinstance(output, dict):
        return trimmed(output, 3)
    for name, axes in _TOKEN_WISE.items():
        if output.get(name) is not None:
            output[name] = trimmed(output[name], axes)
    return output


def _special_ids(config: Any) -> set[int]:
    """Return the ids that a model's configuration, or one nested in it, gives a meaning to."""
    found: set[int] = set()
    for name, value in getattr(config, "__dict__", {}).items():
        if name.endswith(("_token_id", "_token_index")):
            found |= set(value) if isinstance(value, list | tuple) else {value}
        elif name.endswith("_config"):
            found |= _special_ids(value)
    return found


@dataclass(frozen=True)
class PromptMethod(Method):
    """A method that puts trained vectors in front of the input. Give `prompt_length` and `prompt`."""

    @property
    def prompt_length(self) -> int:
        """Number of virtual tokens."""
        raise NotImplementedError

    def prompt(self, leaf: PromptLeaf) -> Tensor:
        """Return the prompt (l, d)."""
        raise NotImplementedError

    def sites(self, structure: Structure, targets: Targets) -> list[PromptSite]:
        names = signature_of(structure.model).parameters
        missing = [name for name in ("input_ids", "attention_mask") if name not in names]
        if missing:
            raise TargetError(
                f"{type(self).__name__} needs a model whose forward takes input_ids and attention_mask; "
                f"{type(structure.model).__name__}.forward has no {missing[0]!r}."
            )
        tables = [i.path for i in resolve(structure, targets) if isinstance(structure.modules[i.path], nn.Embedding)]
        if not tables:
            raise TargetError(f"targets {targets!r} name no embedding; use 'embedding'.")
        table = max(tables, key=lambda path: structure.modules[path].get_parameter("weight").shape[0])
        module = structure.modules[table]
        assert isinstance(module, nn.Embedding)
        special = _special_ids(getattr(structure.model, "config", None))
        placeholder = next(i for i in range(len(special) + 1) if i not in special)
        encoder_decoder = "decoder_input_ids" in names
        return [PromptSite("", table, module.embedding_dim, module.num_embeddings, placeholder, encoder_decoder)]
