"""The built-in cases: small models in plain torch, one for each way in which a weight or an attention is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.contract.case import Case

BATCH, LENGTH, WIDTH, HEADS, KEY_HEADS, VOCABULARY, CLASSES = 3, 6, 16, 4, 2, 24, 5


class Convolutional(nn.Module):
    """Plain, grouped and one-dimensional convolutions with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.sequence = nn.Conv1d(16, WIDTH, 3, dilation=2, padding=2)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.relu(self.stem_norm(self.stem(image)))
        hidden = F.relu(self.sequence(F.relu(self.grouped(hidden)).flatten(2)))  # (batch, width, positions)
        return self.classifier(F.gelu(self.inner(hidden.mean(dim=2))))  # type: ignore[no-any-return]


class EmbeddingClassifier(nn.Module):
    """Mean of token embeddings, normalised, to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(F.gelu(self.hidden(self.norm(self.embedding(tokens)).mean(dim=1))))  # type: ignore[no-any-return]


class GroupedAttention(nn.Module):
    """Causal attention with fewer key than query heads."""

    def __init__(self) -> None:
        super().__init__()
        size = self.head_dim = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, KEY_HEADS * size)
        self.v_proj = nn.Linear(WIDTH, KEY_HEADS * size)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        heads = (HEADS, KEY_HEADS, KEY_HEADS)
        query, key, value = (
            layer(hidden).view(*hidden.shape[:2], count, -1).transpose(1, 2)  # (batch, heads, positions, size)
            for layer, count in zip((self.q_proj, self.k_proj, self.v_proj), heads, strict=True)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = GroupedAttention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        return hidden + self.mlp(self.mlp_norm(hidden))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A causal language model with the forward that token methods expect."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        own = torch.eye(length, dtype=torch.bool, device=hidden.device)
        seen = causal if attention_mask is None else causal & attention_mask[:, None, None, :].bool() | own
        for layer in self.layers:
            hidden = layer(hidden, seen.expand(hidden.shape[0], 1, length, length))
        return {"logits": self.head(self.norm(hidden))}


class TwiceUsed(nn.Module):
    """One linear map that runs twice in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        return self.classifier(self.norm(self.shared(F.gelu(self.shared(features)))))  # type: ignore[no-any-return]


class ExpertStack(nn.Module):
    """Four experts held as raw 3-D parameters, mixed by a softmax gate, beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, 2 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(4, WIDTH, 2 * WIDTH) / WIDTH**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.gelu(torch.einsum("eoi,bi->beo", self.up, hidden))
        outer = torch.einsum("eoi,bei->beo", self.down, inner)
        return hidden + (self.gate(hidden).softmax(dim=-1).unsqueeze(2) * outer).sum(dim=1)  # type: ignore[no-any-return]


def perceptron() -> nn.Module:
    """Return a bare nn.Sequential of linear layers."""
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES, bias=False)
    )


def experts() -> nn.Module:
    """Return a model around a stack of experts."""
    return nn.Sequential(nn.Linear(8, WIDTH), ExpertStack(), nn.Linear(WIDTH, CLASSES))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with a fixed seed, its vectors off their zeros and ones (where a wrong factor would go unseen)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


def logits(output: Any) -> Tensor:
    """Return the logits of the transformer's output."""
    return output["logits"]  # type: ignore[no-any-return]


def built_in_cases() -> list[Case]:
    """Return the cases that every method is checked on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        features = torch.randn(BATCH, 8)
        wide = torch.randn(BATCH, WIDTH)
        image = torch.randn(BATCH, 3, 8, 8)
        tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
        padding = torch.ones(BATCH, LENGTH, dtype=torch.long)
        padding[1, :2] = 0
    text = {"input_ids": tokens, "attention_mask": padding}
    return [
        Case("mlp", partial(seeded, perceptron), {"input": features}),
        Case("transformer", partial(seeded, Transformer), text, logits, tokens="input_ids"),
        Case("cnn", partial(seeded, Convolutional), {"image": image}, targets="all-linear | convolution"),
        Case("embedding", partial(seeded, EmbeddingClassifier), {"tokens": tokens}, targets="all-linear | embedding"),
        Case("twice-used", partial(seeded, TwiceUsed), {"features": wide}),
        Case("experts", partial(seeded, experts), {"input": features}, targets="all-linear | experts"),
    ]
