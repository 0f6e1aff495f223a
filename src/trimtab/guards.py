"""Guards on transformers' own model methods: what would silently lose an adapter stops; generation counts prompts."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from trimtab.errors import AttachError
from trimtab.hooks import GUARDS, Call, base_class, is_adapters, leaves_of


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state dict without the tensors of attached adapters: the base's own keys."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_adapters(name)}


def _generate_of(base: Any) -> Call:
    """Generation counts the tokens it is given; a leaf on the root that adds some takes part in that."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        call: Call = functools.partial(base.generate, self)
        leaves: list[Any] = [leaf for leaf in leaves_of(self) if leaf.generates and leaf.adapter.active]
        if len(leaves) > 1:
            names = ", ".join(repr(leaf.adapter.name) for leaf in leaves)
            raise AttachError(f"generate cannot put several prompts in front of one input, found {names}; use one.")
        return leaves[0].generate(call, args, kwargs) if leaves else call(*args, **kwargs)

    return generate


def _resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers puts a new head in the old one's place: an adapter there would be gone without a word."""
    tables = [table for table in (self.get_input_embeddings(), self.get_output_embeddings()) if table is not None]
    if (args or kwargs) and any(leaves_of(table) for table in tables):
        raise AttachError("resizing would cut off the adapter at the embedding or the head; resize, then attach.")
    return base_class(self).resize_token_embeddings(self, *args, **kwargs)  # type: ignore[attr-defined]


def _refuse_save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
    """Saving the whole model would write keys that a plain reload drops in silence: the result would be the base."""
    records = {name: adapter.merge_record for name, adapter in self._trimtab_attached.adapters.items()}
    unsafe = [name for name, record in records.items() if record is None or record.created]
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


GUARDS["generate"] = _generate_of
GUARDS["resize_token_embeddings"] = lambda base: _resize_token_embeddings
GUARDS["save_pretrained"] = lambda base: _refuse_save_pretrained
