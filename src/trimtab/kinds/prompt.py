"""Prompts: trained vectors in front of the input embeddings of a whole model, with masks, labels and generation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.errors import AttachError, TargetError
from trimtab.hooks import Call, Leaf, signature_of
from trimtab.kinds.edits import Edit
from trimtab.method import Method, Targets
from trimtab.structure import Structure
from trimtab.targets import resolve

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PromptSite:
    """The root of a model that takes embeddings, and the embedding table its tokens come from."""

    path: str
    embedding: str
    features: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.embedding}:prompt"

    @property
    def owner(self) -> str:
        """The prompt acts at the root's forward."""
        return ""

    @property
    def key(self) -> str:
        """Distinguishes this site's leaf on its target."""
        return ""


class PromptLeaf(Leaf):
    """The prompt of one adapter; acts on the arguments of the model's forward by their names."""

    site: PromptSite
    method: PromptMethod
    generates = True

    def around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        inputs = inspect.signature(call).bind_partial(*args, **kwargs).arguments if args else dict(kwargs)
        inputs.update(inputs.pop("kwargs", {}))
        if inputs.get("past_key_values") is not None and _length(inputs["past_key_values"]) > 0:
            return call(**inputs)  # decoding: the prompt is in the cache already
        if inputs.get("encoder_outputs") is not None:
            return call(**inputs)  # the encoder has seen the prompt already
        output = call(**self.extended(inputs))
        return _without_prompt(output, self.length)

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return self.method.prompt_length

    def extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return forward's named inputs with the prompt in front of embeddings, mask, labels and positions."""
        changed = dict(inputs)
        embeddings = changed.get("inputs_embeds")
        ids = changed.pop("input_ids", None)
        if embeddings is None:
            embeddings = self.root.get_submodule(self.site.embedding)(ids)
        prompt = self(embeddings)  # (B, l, d)
        changed["inputs_embeds"] = torch.cat([prompt, embeddings], dim=1)
        mask = changed.get("attention_mask")
        if mask is None:
            mask = embeddings.new_ones(embeddings.shape[:2], dtype=torch.long)
        changed["attention_mask"] = F.pad(mask, (self.length, 0), value=1)
        for name, value in (("labels", IGNORED_LABEL), ("token_type_ids", 0)):
            given = changed.get(name)
            if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == embeddings.shape[1]:
                changed[name] = F.pad(given, (self.length, 0), value=value)
        if changed.get("position_ids") is not None:
            changed["position_ids"] = self._positions(changed["position_ids"])
        return changed

    def _positions(self, positions: Tensor) -> Tensor:
        front = torch.arange(self.length, device=positions.device).expand(positions.shape[0], -1)
        return torch.cat([front, positions + self.length], dim=1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the prompt for each row, (B, l, d), in the embeddings' dtype."""
        prompt = self.method.prompt(self)
        return prompt.to(embeddings.dtype).unsqueeze(0).expand(embeddings.shape[0], -1, -1)

    def generate(self, generate: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own generate on embeddings with the prompt in front; returns ids as without the prompt."""
        inputs = {**({"input_ids": args[0]} if args else {}), **kwargs}
        ids = inputs.get("input_ids", inputs.pop("inputs", None))
        if ids is None or len(args) > 1:
            raise AttachError("generate with a prompt adapter needs input_ids, and keyword arguments for all else.")
        inputs["input_ids"] = ids
        rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        extended = self.extended({"input_ids": ids, "attention_mask": inputs.get("attention_mask")})
        was, self.state.active = self.state.active, False
        try:
            produced = generate(**extended, **rest)
        finally:
            self.state.active = was
        if bool(getattr(getattr(self.root, "config", None), "is_encoder_decoder", False)):
            return produced
        return torch.cat([ids, produced], dim=1) if isinstance(produced, Tensor) else produced

    def edits(self) -> list[Edit]:
        """Added tokens have no weight to be folded into."""
        raise AttachError(f"{type(self.method).__name__} cannot be merged: {self.method.capabilities.merge_reason}.")


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if not isinstance(cache, tuple | list) else int(cache[0][0].shape[-2])


def _without_prompt(output: Any, length: int) -> Any:
    """Drop the prompt's positions from token-wise outputs, so that logits stay aligned with the given tokens."""
    if not isinstance(output, dict):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name)
        token_wise = isinstance(value, Tensor) and value.dim() == 3 and "encoder_last_hidden_state" not in output
        if isinstance(value, Tensor) and token_wise:
            output[name] = value[:, length:]
    return output


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
        missing = [name for name in ("input_ids", "inputs_embeds", "attention_mask") if name not in names]
        if missing:
            raise TargetError(
                f"{type(self).__name__} needs a model whose forward takes input_ids, inputs_embeds and attention_mask; "
                f"{type(structure.model).__name__}.forward has no {missing[0]!r}."
            )
        tables = [i.path for i in resolve(structure, targets) if isinstance(structure.modules[i.path], nn.Embedding)]
        if not tables:
            raise TargetError(f"targets {targets!r} name no embedding; use 'embedding'.")
        table = max(tables, key=lambda path: int(structure.modules[path].num_embeddings))  # type: ignore[arg-type]
        module = structure.modules[table]
        assert isinstance(module, nn.Embedding)
        return [PromptSite("", table, module.embedding_dim, module.num_embeddings)]
