"""Ladder side tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.initial import kaiming_uniform
from trimtab.kinds.stack import BlockLeaf, BlockSite, StackMethod
from trimtab.kinds.tokens import AttentionCall
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class LadderSideTuning(StackMethod):
    """LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning. Sung et al. 2022, arXiv 2206.06522.

    A side network of width w = d/reduction along the blocks: s = D_0(input of the first block); then at each block i
    s ← μ_i·s + (1−μ_i)·D_i(b_i), μ_i = σ(α_i/T), with b_i the block's output, and s ← side_i(s); at the last block
    U(LN(s)) takes the place of its output. The base runs without gradient and saves nothing. D (w, d), U (d, w).
    side_i is pre-norm attention plus pre-norm feed-forward (GELU, expansion·w wide), without biases. Its attention has
    the mask, causality and position bias of the base's own (first) attention in that block, as many heads (or the
    largest common divisor with w), and no rotary angles: positions reach it through b_i. In a block without attention
    the side block is the feed-forward alone, for nothing mixes positions there.
    Starts away from the base: U replaces, it does not add. No cache of side states: generate with use_cache=False.
    One list of blocks: an encoder-decoder names `encoder.block.*` or `decoder.block.*`. The authors' code copies the
    base's block type and prunes its weights for a start; here the start is random.
    Trainable, L blocks: (L + 2)·d·w + L·((4 + 2·expansion)·w² + 4·w + 1) + 2·w.
    """

    reduction: int = setting(8, "the base's width divided by that of the side network", minimum=1)
    temperature: float = setting(0.1, "T of the gates", above=0.0)
    expansion: int = setting(4, "width of the side's feed-forward in multiples of w", minimum=1)
    targets: Targets = setting("block", "blocks along which the side network runs")

    capabilities = Capabilities(
        starts_at_base="no",
        merge="none",
        merge_reason="a side network has no weight to be folded into",
        additive=False,
        cached_generation=False,
        checkpointing=False,
    )

    def tensors(self, site: BlockSite) -> dict[str, Spec]:
        d, w = site.features, site.features // self.reduction
        if w * self.reduction != d:
            raise SettingError(f"LadderSideTuning(reduction={self.reduction}) does not divide the base's width {d}.")
        vector, wide = Spec((w,), decay=False), self.expansion * w
        specs = {"down": Spec((w, d)), "gate": Spec((1,), decay=False)}
        if site.attends:
            specs |= {"attention_gain": vector, "attention_shift": vector}
            specs |= {"projections": Spec((3 * w, w)), "output": Spec((w, w))}
        specs |= {"gain": vector, "shift": vector, "inner": Spec((wide, w)), "outer": Spec((w, wide))}
        if site.first:
            specs |= {"enter": Spec((w, d))}
        if site.last:
            specs |= {"leave_gain": vector, "leave_shift": vector, "leave": Spec((d, w))}
        return specs

    def initialise(self, leaf: BlockLeaf, generator: torch.Generator) -> None:
        for name, tensor in leaf.named_parameters(recurse=False):
            if tensor.dim() == 2:
                kaiming_uniform(tensor, generator)
            elif name.endswith("gain"):
                tensor.fill_(1.0)

    def side(
        self, leaf: BlockLeaf, entering: Tensor, hidden: Tensor, stream: Tensor | None, attention: AttentionCall | None
    ) -> Tensor:
        dtype, gate = leaf.down.dtype, torch.sigmoid(leaf.gate / self.temperature)
        before = F.linear(entering.to(dtype), leaf.enter) if stream is None else stream
        state: Tensor = gate * before + (1.0 - gate) * F.linear(hidden.to(dtype), leaf.down)  # (B, positions, w)
        if attention is not None and leaf.site.attends:
            state = state + self._attend(leaf, _norm(state, leaf.attention_gain, leaf.attention_shift), attention)
        inner = F.gelu(F.linear(_norm(state, leaf.gain, leaf.shift), leaf.inner))
        state = state + F.linear(inner, leaf.outer)
        return F.linear(_norm(state, leaf.leave_gain, leaf.leave_shift), leaf.leave) if leaf.site.last else state

    def _attend(self, leaf: BlockLeaf, state: Tensor, base: AttentionCall) -> Tensor:
        """Self-attention of the side state (B, positions, w) under the base's mask."""
        heads = math.gcd(state.shape[-1], base.query.shape[1])
        batch, positions, width = state.shape
        split = F.linear(state, leaf.projections).view(batch, positions, 3, heads, width // heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, heads, positions, w / heads)
        call = AttentionCall(query, key, value, _mask(base, query), is_causal=base.is_causal)
        return F.linear(call.run().transpose(1, 2).reshape(state.shape), leaf.output)


def _norm(state: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(state, gain.shape, gain, shift)


def _mask(base: AttentionCall, query: Tensor) -> Tensor | None:
    mask = base.attn_mask
    if mask is None or mask.dtype == torch.bool:
        return mask
    if mask.dim() == 4 and mask.shape[1] not in (1, query.shape[1]):
        raise SettingError(
            f"the base biases each of its {mask.shape[1]} heads; the side network's width must be a multiple of that: "
            f"choose a smaller reduction."
        )
    # The least number of a wider type would become -inf, and a row that sees nothing then not a number.
    return mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
