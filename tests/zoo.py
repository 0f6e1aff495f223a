"""Small, randomly initialised models of the architectures that adapters must work on.

Every builder takes a seed and a dropout rate and returns a `ZooModel`: a model in evaluation mode, example inputs with
three rows that are passed as keywords, the tensor to compare outputs by, and a scalar loss. The padding of text inputs
sits where such models are trained with it: on the right for encoders, on the left for decoders that generate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

BATCH, LENGTH, HIDDEN, LAYERS, HEADS, VOCABULARY, CLASSES = 3, 7, 32, 2, 4, 64, 3
INITIALIZER_RANGE = 0.2  # the usual 0.02 leaves attention uniform at this width, and mistakes in it invisible
IGNORED_LABEL = -100

Kind = Literal["weight", "activation", "selection", "tokens", "stack"]
Attention = Literal["sdpa", "multihead", "none"]

WITHOUT_ATTENTION: frozenset[Kind] = frozenset({"weight", "activation", "selection"})
WITH_BLOCKS: frozenset[Kind] = WITHOUT_ATTENTION | {"stack"}
EVERY_KIND: frozenset[Kind] = WITH_BLOCKS | {"tokens"}


@dataclass(frozen=True)
class ZooModel:
    """One model with its example inputs and the facts that tests select models by."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    """Keyword arguments of the forward; the first axis of each is the batch of three."""
    main_output: Callable[[Any], Tensor]
    """Takes what the forward returned, gives the tensor to compare outputs by: rows depend on their own inputs only."""
    objective: Callable[[Any], Tensor]
    """Takes what the forward returned for `inputs`, gives the scalar loss."""
    kinds: frozenset[Kind]
    """The engines that have something to act on in this model."""
    attention: Attention
    """How attention is computed: `scaled_dot_product_attention` in Python, inside `nn.MultiheadAttention`, or not."""
    block_lists: tuple[str, ...] = ()
    """Qualified names of the module lists of blocks."""
    causal: bool = False
    """Whether the output at one position may depend on earlier positions only."""
    generates: bool = False
    """Whether `model.generate` works."""
    tied_head: bool = False
    """Whether the head's weight is the embedding's."""

    def loss(self, model: nn.Module | None = None) -> Tensor:
        """The scalar loss of `model` (default: this entry's own; give a copy or compiled form otherwise)."""
        target = self.model if model is None else model
        return self.objective(target(**self.inputs))

    def output(self, model: nn.Module | None = None, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """The main output of `model` (default: this entry's own) for `inputs` (default: the examples)."""
        target = self.model if model is None else model
        return self.main_output(target(**(self.inputs if inputs is None else inputs)))

    def rows(self, *indices: int) -> dict[str, Tensor]:
        """The example inputs restricted to some rows of the batch."""
        return {key: value[list(indices)] for key, value in self.inputs.items()}


def logits(result: Any) -> Tensor:
    return result.logits


def own_loss(result: Any) -> Tensor:
    return result.loss


def itself(result: Any) -> Tensor:
    return result


def classification_loss(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda scores: F.cross_entropy(scores.flatten(0, -2), labels.flatten())


def joint_embedding(result: Any) -> Tensor:
    """CLIP's image and text embeddings side by side: unlike its logits, each row depends on its own inputs only."""
    return torch.cat([result.image_embeds, result.text_embeds], dim=1)


def contrastive_loss(result: Any) -> Tensor:
    """CLIP's symmetric loss, as the model's own `return_loss=True` computes it."""
    pairs = torch.arange(len(result.logits_per_text))
    return (F.cross_entropy(result.logits_per_text, pairs) + F.cross_entropy(result.logits_per_image, pairs)) / 2


def random_tokens(length: int = LENGTH) -> Tensor:
    """Token ids; 0, 1 and 2 are kept for padding, start and end."""
    return torch.randint(3, VOCABULARY, (BATCH, length))


def random_labels() -> Tensor:
    return torch.randint(CLASSES, (BATCH,))


def padding_mask(side: Literal["left", "right"], padding: int = 2) -> Tensor:
    """Ones, with `padding` zeros at one side of the second row."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, slice(0, padding) if side == "left" else slice(LENGTH - padding, LENGTH)] = 0
    return mask


def encoder_inputs() -> dict[str, Tensor]:
    mask = padding_mask("right")
    return {"input_ids": random_tokens() * mask, "attention_mask": mask}


def decoder_inputs() -> dict[str, Tensor]:
    mask = padding_mask("left")
    tokens = random_tokens() * mask
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED_LABEL)}


def as_if_trained(model: nn.Module) -> nn.Module:
    """Moves biases, norms and running statistics off their zeros and ones, where a wrong factor would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def bert(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """BERT with a sequence classification head: separate query, key and value, norm after each residual."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        initializer_range=INITIALIZER_RANGE,
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN, max_position_embeddings=64, num_labels=CLASSES, attn_implementation="sdpa",
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = as_if_trained(transformers.BertForSequenceClassification(config))
    inputs = encoder_inputs() | {"labels": random_labels()}
    return ZooModel("bert", model, inputs, logits, own_loss, EVERY_KIND, "sdpa", ("bert.encoder.layer",))


def llama(seed: int = 0, dropout: float = 0.0, width: int = HIDDEN) -> ZooModel:
    """Llama with grouped queries (two key-value heads for four query heads) and a tied head.

    Llama knows dropout on the attention probabilities only.
    """
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        initializer_range=INITIALIZER_RANGE,
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", attention_dropout=dropout,
    )  # fmt: skip
    model = as_if_trained(transformers.LlamaForCausalLM(config))
    return ZooModel(
        "llama", model, decoder_inputs(), logits, own_loss, EVERY_KIND, "sdpa", ("model.layers",),
        causal=True, generates=True, tied_head=True,
    )  # fmt: skip


def gpt2(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """GPT-2: fused query-key-value and transposed `Conv1D` weights, learned positions, tied head."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        initializer_range=INITIALIZER_RANGE,
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=2 * HIDDEN, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    model = as_if_trained(transformers.GPT2LMHeadModel(config))
    model.loss_type = "ForCausalLM"  # left to itself it logs that it found none, which breaks a full compiled graph
    return ZooModel(
        "gpt2", model, decoder_inputs(), logits, own_loss, EVERY_KIND, "sdpa", ("transformer.h",),
        causal=True, generates=True, tied_head=True,
    )  # fmt: skip


def t5(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """T5: encoder and decoder, cross-attention, relative position bias owned by the first block, tied head."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=2 * HIDDEN, num_layers=LAYERS,
        num_decoder_layers=LAYERS, num_heads=HEADS, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        attn_implementation="sdpa", dropout_rate=dropout,
    )  # fmt: skip
    model = as_if_trained(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():
        model.shared.weight.mul_(INITIALIZER_RANGE)  # at unit scale a tied decoder only repeats its last token
    inputs = encoder_inputs() | {"labels": random_tokens(5)}
    return ZooModel(
        "t5", model, inputs, logits, own_loss, EVERY_KIND, "sdpa", ("encoder.block", "decoder.block"),
        causal=False, generates=True, tied_head=True,
    )  # fmt: skip


def vit(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """ViT for image classification: four patches and a class token, norm before each residual."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        initializer_range=INITIALIZER_RANGE,
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=2 * HIDDEN,
        image_size=16, patch_size=8, num_labels=CLASSES, attn_implementation="sdpa",
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = as_if_trained(transformers.ViTForImageClassification(config))
    inputs = {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": random_labels()}
    return ZooModel("vit", model, inputs, logits, own_loss, EVERY_KIND, "sdpa", ("vit.layers",))


def clip(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """CLIP: a causal text tower and a vision tower, joined by a contrastive loss over the batch.

    CLIP knows dropout on the attention probabilities only.
    """
    torch.manual_seed(seed)
    tower = {
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "projection_dim": 16, "attention_dropout": dropout,
    }  # fmt: skip
    text = tower | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 0}
    vision = tower | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=16, attn_implementation="sdpa"
    )
    model = as_if_trained(transformers.CLIPModel(config))
    inputs = encoder_inputs()
    last = inputs["attention_mask"].sum(dim=1, keepdim=True) - 1
    inputs["input_ids"] = inputs["input_ids"].scatter(1, last, 2)  # text is pooled at the end token
    inputs["pixel_values"] = torch.randn(BATCH, 3, 16, 16)
    blocks = ("text_model.encoder.layers", "vision_model.encoder.layers")
    return ZooModel("clip", model, inputs, joint_embedding, contrastive_loss, EVERY_KIND, "sdpa", blocks)


def mixtral(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """Mixtral: a mixture of four experts per block, held as three-dimensional parameters; the head is its own.

    Mixtral knows dropout on the attention probabilities only.
    """
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        initializer_range=INITIALIZER_RANGE,
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, intermediate_size=HIDDEN, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa",
        attention_dropout=dropout,
    )  # fmt: skip
    model = as_if_trained(transformers.MixtralForCausalLM(config))
    return ZooModel(
        "mixtral", model, decoder_inputs(), logits, own_loss, EVERY_KIND, "sdpa", ("model.layers",),
        causal=True, generates=True,
    )  # fmt: skip


class ConvolutionalNetwork(nn.Module):
    """Plain, grouped and one-dimensional convolutions with batch normalisation; one row of pixels in, classes out."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1, groups=4)
        self.grouped_norm = nn.BatchNorm2d(32)
        self.sequence = nn.Conv1d(32, 32, kernel_size=3, dilation=2, padding=2)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        hidden = F.relu(self.stem_norm(self.stem(image)))
        hidden = F.relu(self.grouped_norm(self.grouped(hidden)))  # (batch, 32, height / 2, width / 2)
        hidden = F.relu(self.sequence(hidden.flatten(2)))  # (batch, 32, positions)
        return self.classifier(self.dropout(hidden.mean(dim=2)))


def cnn(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A convolutional network whose batch norms hold running statistics."""
    torch.manual_seed(seed)
    model = as_if_trained(ConvolutionalNetwork(dropout))
    inputs = {"image": torch.randn(BATCH, 3, 8, 8)}
    objective = classification_loss(random_labels())
    return ZooModel("cnn", model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


def mlp(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A bare `nn.Sequential` of linear layers: no names, no configuration, no blocks."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, HIDDEN), nn.GELU(), nn.Dropout(dropout),
        nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Dropout(dropout),
        nn.Linear(HIDDEN, CLASSES, bias=False),
    )  # fmt: skip
    as_if_trained(model)
    inputs = {"input": torch.randn(BATCH, 16)}
    objective = classification_loss(random_labels())
    return ZooModel("mlp", model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


class EncoderClassifier(nn.Module):
    """Embedding, `nn.TransformerEncoder` told of the padding (token 0), mean over the kept positions, classes."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 2 * HIDDEN, dropout, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        for parameter in self.encoder.parameters():  # the layers start as copies of one another
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0  # (batch, positions)
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        kept = (~padding).to(hidden.dtype)[:, :, None]
        return self.classifier((hidden * kept).sum(dim=1) / kept.sum(dim=1))


def torch_encoder(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A classifier around `nn.TransformerEncoder`, whose inference path reads weights without calling its modules."""
    torch.manual_seed(seed)
    model = as_if_trained(EncoderClassifier(dropout))
    inputs = {"tokens": random_tokens() * padding_mask("right")}
    objective = classification_loss(random_labels())
    return ZooModel(
        "torch_encoder", model, inputs, itself, objective, WITH_BLOCKS, "multihead", ("encoder.layers",)
    )  # fmt: skip


class MultiheadClassifier(nn.Module):
    """One `nn.MultiheadAttention` between a linear input and a linear output."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(16, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, dropout, batch_first=True)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.input(features)  # (batch, positions, hidden)
        normed = self.norm(hidden)
        attended, _ = self.attention(normed, normed, normed, need_weights=False)
        return self.classifier((hidden + attended).mean(dim=1))


def multihead(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A model around one `nn.MultiheadAttention`, which never calls its output projection."""
    torch.manual_seed(seed)
    model = as_if_trained(MultiheadClassifier(dropout))
    inputs = {"features": torch.randn(BATCH, LENGTH, 16)}
    objective = classification_loss(random_labels())
    return ZooModel("multihead", model, inputs, itself, objective, WITHOUT_ATTENTION, "multihead")


class TiedEmbeddingModel(nn.Module):
    """Predicts a token at each position from that position alone; the output weight is the embedding's."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.dropout(F.gelu(self.hidden(self.embedding(tokens)))))


def tied_embedding(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """An embedding classifier with a tied output in plain torch."""
    torch.manual_seed(seed)
    model = as_if_trained(TiedEmbeddingModel(dropout))
    inputs = {"tokens": random_tokens()}
    objective = classification_loss(random_tokens())
    return ZooModel("tied_embedding", model, inputs, itself, objective, WITHOUT_ATTENTION, "none", tied_head=True)


class SignalNetwork(nn.Module):
    """Plain, grouped and depthwise one-dimensional convolutions with group normalisation."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 16, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.grouped = nn.Conv1d(16, 32, kernel_size=3, stride=2, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv1d(32, 32, kernel_size=3, padding=1, groups=32)
        self.hidden = nn.Linear(32, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, signal: Tensor) -> Tensor:
        hidden = F.relu(self.grouped(F.relu(self.norm(self.stem(signal)))))  # (batch, 32, positions / 2)
        hidden = F.gelu(self.hidden(F.relu(self.depthwise(hidden)).mean(dim=2)))
        return self.classifier(self.dropout(hidden))


def cnn_1d(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A network over signals."""
    torch.manual_seed(seed)
    model = as_if_trained(SignalNetwork(dropout))
    inputs = {"signal": torch.randn(BATCH, 4, 12)}
    objective = classification_loss(random_labels())
    return ZooModel("cnn_1d", model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


class VolumeNetwork(nn.Module):
    """Plain and grouped three-dimensional convolutions with batch normalisation."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 8, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(8)
        self.grouped = nn.Conv3d(8, 16, kernel_size=(1, 3, 3), stride=2, padding=(0, 1, 1), groups=2)
        self.hidden = nn.Linear(16, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, volume: Tensor) -> Tensor:
        hidden = F.relu(self.grouped(F.relu(self.norm(self.stem(volume)))))  # (batch, 16, half of each axis)
        return self.classifier(self.dropout(F.gelu(self.hidden(hidden.flatten(2).mean(dim=2)))))


def cnn_3d(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A network over volumes."""
    torch.manual_seed(seed)
    model = as_if_trained(VolumeNetwork(dropout))
    inputs = {"volume": torch.randn(BATCH, 2, 4, 6, 6)}
    objective = classification_loss(random_labels())
    return ZooModel("cnn_3d", model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


class RecurrentClassifier(nn.Module):
    """Embedding, a recurrent network whose weights are one list of its own, mean over positions, classes."""

    def __init__(self, recurrent: type[nn.GRU | nn.LSTM], dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.recurrent = recurrent(16, HIDDEN // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))  # (batch, positions, hidden)
        return self.classifier(self.dropout(F.gelu(self.hidden(self.norm(states).mean(dim=1)))))


def _recurrent(name: str, kind: type[nn.GRU | nn.LSTM], seed: int, dropout: float) -> ZooModel:
    torch.manual_seed(seed)
    model = as_if_trained(RecurrentClassifier(kind, dropout))
    inputs = {"tokens": random_tokens()}
    objective = classification_loss(random_labels())
    return ZooModel(name, model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


def gru(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A classifier around two layers of `nn.GRU` in both directions."""
    return _recurrent("gru", nn.GRU, seed, dropout)


def lstm(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A classifier around two layers of `nn.LSTM` in both directions."""
    return _recurrent("lstm", nn.LSTM, seed, dropout)


class RawParameterMixer(nn.Module):
    """Learned positions, a matrix that mixes positions and one that maps channels, all raw parameters."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(16, HIDDEN)
        self.position = nn.Parameter(torch.randn(1, LENGTH, HIDDEN) / 2)
        self.mixing = nn.Parameter(torch.randn(LENGTH, LENGTH) / LENGTH**0.5)
        self.channel = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5)
        self.gain = nn.Parameter(torch.ones(HIDDEN))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.input(features) + self.position  # (batch, positions, hidden)
        hidden = hidden + F.gelu(torch.einsum("pq,bqh->bph", self.mixing, hidden)) * self.gain
        hidden = hidden + F.gelu(F.linear(hidden, self.channel))
        return self.classifier(self.dropout(hidden.mean(dim=1)))


def raw_parameters(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A model that holds most of its weights as parameters of its own root."""
    torch.manual_seed(seed)
    model = as_if_trained(RawParameterMixer(dropout))
    inputs = {"features": torch.randn(BATCH, LENGTH, 16)}
    objective = classification_loss(random_labels())
    return ZooModel("raw_parameters", model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


class TwiceUsedBlocks(nn.Module):
    """One linear map and one norm that run three times in each forward; one map under two names."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.input = nn.Linear(16, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.shared = nn.Linear(HIDDEN, HIDDEN)
        self.same = self.shared
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HIDDEN, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.input(features)
        for layer in (self.shared, self.same, self.shared):
            hidden = hidden + F.gelu(layer(self.norm(hidden)))
        return self.classifier(self.dropout(hidden))


def twice_used(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """A model that uses its modules more than once, and one under two names."""
    torch.manual_seed(seed)
    model = as_if_trained(TwiceUsedBlocks(dropout))
    inputs = {"features": torch.randn(BATCH, 16)}
    objective = classification_loss(random_labels())
    return ZooModel("twice_used", model, inputs, itself, objective, WITHOUT_ATTENTION, "none")


def stored_as(entry: ZooModel, name: str, model: nn.Module) -> ZooModel:
    """The entry under another name, with its weights stored in another way."""
    return dataclasses.replace(entry, name=name, model=model.eval())


def plain_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, map) of every linear map but the head, which libraries leave as it is."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and name != "lm_head"
    ]


def llama_bf16(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """The Llama with bfloat16 weights."""
    entry = llama(seed, dropout)
    return stored_as(entry, "llama_bf16", entry.model.to(torch.bfloat16))


def llama_nf4(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """The Llama with bitsandbytes' four-bit NormalFloat weights (QLoRA's base), which compute in float32.

    A row of the weights is one block of 64 numbers. Repacking for inference, which some processors do and which is
    another rounding, is off: it would be another base.
    """
    import bitsandbytes

    entry = llama(seed, dropout, width=64)
    for parent, name, plain in plain_linears(entry.model):
        packed = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            plain.weight.detach(), requires_grad=False, quant_type="nf4", module=packed
        )
        packed.support_avx512bf16_for_cpu = False
        setattr(parent, name, packed.to("cpu"))
    return stored_as(entry, "llama_nf4", entry.model)


def llama_int8(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """The Llama with bitsandbytes' eight-bit weights, whose product rounds its inputs to eight bits too."""
    import bitsandbytes

    entry = llama(seed, dropout)
    for parent, name, plain in plain_linears(entry.model):
        packed = bitsandbytes.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
        packed.weight = bitsandbytes.nn.Int8Params(plain.weight.detach(), requires_grad=False, has_fp16_weights=False)
        setattr(parent, name, packed.to("cpu"))
    return stored_as(entry, "llama_int8", entry.model)


def llama_torchao(seed: int = 0, dropout: float = 0.0) -> ZooModel:
    """The Llama with torchao's eight-bit weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    entry = llama(seed, dropout)
    chosen = {id(plain) for _, _, plain in plain_linears(entry.model)}
    quantize_(entry.model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: id(module) in chosen)
    return stored_as(entry, "llama_torchao", entry.model)


Builder = Callable[[int, float], ZooModel]

ZOO: dict[str, Builder] = {
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
    "clip": clip,
    "mixtral": mixtral,
    "cnn": cnn,
    "mlp": mlp,
    "torch_encoder": torch_encoder,
    "multihead": multihead,
    "tied_embedding": tied_embedding,
    "cnn_1d": cnn_1d,
    "cnn_3d": cnn_3d,
    "gru": gru,
    "lstm": lstm,
    "raw_parameters": raw_parameters,
    "twice_used": twice_used,
}

# The same architecture with its weights stored in another way, and how far two ways to compute one output lie apart
# there, as a share of the largest output. They need the optional packages of the extra `quant`.
STORED: dict[str, Builder] = {
    "llama_bf16": llama_bf16,
    "llama_nf4": llama_nf4,
    "llama_int8": llama_int8,
    "llama_torchao": llama_torchao,
}
