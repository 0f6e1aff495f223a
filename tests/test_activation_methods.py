"""Activation methods against formulas written out here: placement, values, gradients, counts, merging, learning.

The reference never uses the engine: it hangs plain forward hooks on a second, equal model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trimtab as tt
from trimtab.hooks import Leaf
from trimtab.kinds.activation import ActivationMethod
from trimtab.kinds.placement import norm_behind
from trimtab.structure import Structure
from zoo import HIDDEN, LAYERS, ZOO, ZooModel

ATTENTION_MODELS = ["bert", "llama", "gpt2", "t5", "vit", "clip"]
Change = Callable[[Tensor], Tensor]


def randomise(adapter: tt.Adapter, seed: int = 0, size: float = 0.3) -> None:
    """Move every tensor away from its start, so that a wrong factor or place shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def tensors(leaf: Leaf) -> dict[str, Tensor]:
    """Copies of a leaf's tensors that receive gradients of their own."""
    return {name: p.detach().clone().requires_grad_() for name, p in leaf.named_parameters(recurse=False)}


def leaves(adapter: tt.Adapter) -> dict[str, Leaf]:
    return {str(site): leaf for part in adapter.parts for site, leaf in zip(part.sites, part.leaves, strict=True)}


def after(model: nn.Module, path: str, change: Change) -> None:
    model.get_submodule(path).register_forward_hook(lambda module, args, output: change(output))


def before(model: nn.Module, path: str, change: Change) -> None:
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))


def bottleneck(t: dict[str, Tensor], x: Tensor, act: Change = F.relu) -> Tensor:
    return act(x @ t["down"].T + t["down_bias"]) @ t["up"].T + t["up_bias"]


def compare(name: str, method: tt.Method, place: Callable[[nn.Module, str, dict[str, Tensor]], None]) -> tt.Adapter:
    """Attach to one model, place the formula on another, and compare outputs and the gradient of every tensor."""
    entry, reference = ZOO[name](0, 0.0), ZOO[name](0, 0.0)
    adapter = tt.attach(entry.model, method)
    randomise(adapter)
    copies = {site: tensors(leaf) for site, leaf in leaves(adapter).items()}
    for site, own in copies.items():
        place(reference.model, site, own)
    base = ZOO[name](0, 0.0).output()
    output = entry.output()
    torch.testing.assert_close(output, reference.output(), rtol=1e-4, atol=1e-5)
    assert (output - base).abs().max() > 1e-3
    entry.loss().backward()
    reference.loss().backward()
    for site, leaf in leaves(adapter).items():
        for tensor, own in copies[site].items():
            gradient = getattr(leaf, tensor).grad
            torch.testing.assert_close(gradient, own.grad, rtol=1e-3, atol=1e-6, msg=lambda m, s=site: f"{s}: {m}")
            assert gradient.abs().max() > 0
    return adapter


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


# Counts of the papers.


def test_pfeiffer_and_houlsby_on_bert_base() -> None:
    model = on_meta(lambda: transformers.BertModel(transformers.BertConfig()))
    d = 768
    assert tt.plan(model, tt.PfeifferAdapter(bottleneck=48)).trainable == 894_528
    assert tt.plan(model, tt.PfeifferAdapter()).trainable == 894_528  # 768 / 16 = 48
    norms = 25 * 2 * d
    assert tt.plan(model, tt.HoulsbyAdapter()).trainable == 24 * (2 * d * 64 + 64 + d) + norms
    assert tt.plan(model, tt.HoulsbyAdapter(bottleneck=8, train_norms=False)).trainable == 24 * (2 * d * 8 + 8 + d)


def test_ssf_on_vit_base() -> None:
    model = on_meta(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=100)))
    assert tt.plan(model, tt.SSF()).trainable == 205_824
    with_head = tt.Compose(tt.SSF(), tt.FullTuning(targets="head"))
    assert tt.plan(model, with_head).trainable == 282_724


def test_mam_on_bart_large() -> None:
    model = on_meta(lambda: transformers.BartForConditionalGeneration(transformers.BartConfig()))
    assert tt.plan(model, tt.MAM()).trainable == 27_377_664 + 36_864
    composed = tt.Compose(tt.PrefixTuning(length=30), tt.ParallelAdapter(bottleneck=512, scale=4.0))
    assert tt.plan(model, composed).trainable == 27_377_664 + 36_864


def test_ia3_on_t0_3b() -> None:
    config = transformers.T5Config(
        d_model=2048, d_ff=5120, d_kv=64, num_heads=32, num_layers=24, feed_forward_proj="gated-gelu"
    )
    model = on_meta(lambda: transformers.T5ForConditionalGeneration(config))
    assert tt.plan(model, tt.IA3()).trainable == 540_672


def test_lofit_on_llama2_7b_and_on_gemma_7b_whose_heads_are_wider_than_its_hidden_state() -> None:
    model = on_meta(lambda: transformers.LlamaModel(transformers.LlamaConfig()))
    assert tt.plan(model, tt.LoFiT()).trainable == 131_072
    heads = tuple((f"layers.{i}.self_attn.o_proj", 31 - i) for i in range(32))
    assert tt.plan(model, tt.LoFiT(stage="offset", heads=heads)).trainable == 4_096
    gemma = on_meta(lambda: transformers.GemmaModel(transformers.GemmaConfig()))
    assert tt.plan(gemma, tt.LoFiT()).trainable == 28 * 16 * 256


# Values and gradients.


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "gpt2", "mixtral"])
def test_houlsby_formula(name: str, activation: str) -> None:
    act = {"gelu": F.gelu, "silu": F.silu}[activation]

    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        after(model, site.removesuffix(":output"), lambda f: f + bottleneck(t, f, act))

    adapter = compare(name, tt.HoulsbyAdapter(bottleneck=4, train_norms=False, activation=activation), place)
    attentions, blocks = {"t5": (6, 4)}.get(name, (2, 2))
    assert len(leaves(adapter)) == attentions + blocks


def test_houlsby_trains_the_norms_too_and_nothing_else_of_the_base() -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = tt.attach(entry.model, tt.HoulsbyAdapter(bottleneck=4))
    norms = [p for n, p in entry.model.named_parameters() if "LayerNorm" in n and "trimtab" not in n]
    assert adapter.trainable_count == 4 * (2 * 32 * 4 + 4 + 32) + sum(p.numel() for p in norms)
    entry.loss().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for n, p in entry.model.named_parameters() if "trimtab" not in n)


def test_pfeiffer_uses_the_norm_of_bert_twice() -> None:
    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        block: Any = model.get_submodule(site.split("→")[1].removesuffix(".LayerNorm"))

        def forward(inside: Tensor, x: Tensor) -> Tensor:
            f = block.dense(inside)
            u = block.LayerNorm(f + x)
            return block.LayerNorm(f + bottleneck(t, u) + x)

        block.forward = forward

    compare("bert", tt.PfeifferAdapter(bottleneck=4), place)


def test_pfeiffer_uses_the_norm_of_torchs_own_layer_twice() -> None:
    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        layer: Any = model.get_submodule(site.split("→")[1].removesuffix(".norm2"))

        def forward(
            x: Tensor, src_mask: Any = None, is_causal: bool = False, src_key_padding_mask: Any = None
        ) -> Tensor:
            x = layer.norm1(x + layer._sa_block(x, src_mask, src_key_padding_mask, is_causal))
            f = layer.linear2(F.gelu(layer.linear1(x)))
            return layer.norm2(f + bottleneck(t, layer.norm2(f + x)) + x)  # type: ignore[no-any-return]

        layer.forward = forward

    compare("torch_encoder", tt.PfeifferAdapter(bottleneck=4), place)


@pytest.mark.parametrize(
    ("name", "norm", "feed_forward"), [("llama", "post_attention_layernorm", "mlp"), ("gpt2", "ln_2", "mlp")]
)
def test_pfeiffer_without_a_norm_behind_the_sum(name: str, norm: str, feed_forward: str) -> None:
    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        block, seen = site.removesuffix(":output"), {}
        before(model, f"{block}.{norm}", lambda x: seen.setdefault("x", x))
        after(model, f"{block}.{feed_forward}", lambda f: seen.setdefault("f", f))

        def sum_up(output: Any) -> Any:
            x, f = seen.pop("x"), seen.pop("f")
            y = f + bottleneck(t, f + x) + x
            return y if isinstance(output, Tensor) else (y, *output[1:])

        after(model, block, sum_up)

    compare(name, tt.PfeifferAdapter(bottleneck=4), place)


def tiny(name: str) -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0}
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
    gpt = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32}
    builders: dict[str, Callable[[], nn.Module]] = {
        "bart": lambda: transformers.BartModel(transformers.BartConfig(**sizes, **heads)),
        "mbart": lambda: transformers.MBartModel(transformers.MBartConfig(**sizes, **heads)),
        "gpt1": lambda: transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig(**gpt)),
        "distilbert": lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=32)
        ),
        "torch-pre": lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer, norm_first=True), 1, nn.LayerNorm(16), False
        ),
        "torch-post": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 1, nn.LayerNorm(16)),
    }
    return builders[name]()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bart", ["encoder.layers.0.final_layer_norm", "decoder.layers.0.final_layer_norm"]),
        ("mbart", [None, None]),
        ("gpt1", ["h.0.ln_2"]),
        ("distilbert", ["transformer.layer.0.output_layer_norm"]),
        ("torch-pre", [None]),
        ("torch-post", ["layers.0.norm2"]),
    ],
)
def test_norms_behind_the_sum_are_told_from_structure(name: str, expected: list[str | None]) -> None:
    structure = Structure(tiny(name))
    assert [norm_behind(structure, part) for part in structure.feed_forwards] == expected


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit", "clip"])
def test_norms_behind_the_sum_in_the_zoo(name: str) -> None:
    structure = Structure(ZOO[name](0, 0.0).model)
    found = {norm_behind(structure, part) is not None for part in structure.feed_forwards}
    assert found == {name == "bert"}


class NormsLastButFirst(nn.Module):
    """A pre-norm block that registers its norm last, in a model without a final norm: the structure misleads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        return x + self.down(F.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


def test_pfeiffer_stops_where_the_structure_misleads_and_can_be_told() -> None:
    model = nn.Sequential(NormsLastButFirst(), NormsLastButFirst())
    x = torch.randn(2, 3, 8)
    adapter = tt.attach(model, tt.PfeifferAdapter(bottleneck=2))
    with pytest.raises(tt.AttachError, match=r"'0\.norm' ran, but '0\.down' had not run before it"):
        model(x)
    adapter.detach()
    adapter = tt.attach(model, tt.PfeifferAdapter(bottleneck=2, norm="pre"))
    assert list(leaves(adapter)) == ["0:output", "1:output"]
    assert model(x).shape == x.shape


def test_two_of_pfeiffer_s_adapters_around_one_norm_take_turns() -> None:
    entry = ZOO["bert"](0, 0.0)
    adapters = [tt.attach(entry.model, tt.PfeifferAdapter(bottleneck=2), name=name) for name in ("a", "b")]
    text = (
        r"adapters 'b' and 'a' both run 'bert\.encoder\.layer\.0\.output\.LayerNorm' twice.* set one of them inactive"
    )
    with pytest.raises(tt.AttachError, match=text):
        entry.output()
    for active in adapters:
        for adapter in adapters:
            adapter.active = adapter is active
        assert torch.isfinite(entry.output()).all()


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("layer_norm", ["none", "in", "out"])
@pytest.mark.parametrize("name", ["bert", "torch_encoder", "llama"])
def test_parallel_formula(name: str, layer_norm: str, learn_scale: bool) -> None:
    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        source, _, sink = site.removesuffix(":output").partition("→")
        seen: dict[str, Tensor] = {}
        before(model, source, lambda x: seen.setdefault("x", x))

        def normed(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            return centred / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * t["norm_weight"] + t["norm_bias"]

        def add(h: Tensor) -> Tensor:
            x = seen.pop("x")
            branch = bottleneck(t, normed(x) if layer_norm == "in" else x) * (t["scale"] if learn_scale else 2.0)
            return h + (normed(branch) if layer_norm == "out" else branch)

        after(model, sink or source, add)

    compare(name, tt.ParallelAdapter(4, 2.0, learn_scale, layer_norm=layer_norm), place)


def test_parallel_reads_the_feed_forward_parts_own_input() -> None:
    sites = list(leaves(tt.attach(ZOO["bert"](0, 0.0).model, tt.ParallelAdapter(bottleneck=4))))
    layer = "bert.encoder.layer.0"
    assert sites[0] == f"{layer}.intermediate.dense→{layer}.output.dense"


def test_scale_four_is_scale_one_with_four_times_the_up_projection() -> None:
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, tt.ParallelAdapter(bottleneck=4, scale=4.0))
    randomise(adapter)
    scaled = entry.output()
    own = {site: tensors(leaf) for site, leaf in leaves(adapter).items()}
    adapter.detach()
    other = tt.attach(entry.model, tt.ParallelAdapter(bottleneck=4, scale=1.0))
    with torch.no_grad():
        for site, leaf in leaves(other).items():
            for tensor, value in own[site].items():
                getattr(leaf, tensor).copy_(4.0 * value if tensor.startswith("up") else value)
    torch.testing.assert_close(entry.output(), scaled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "cnn"])
def test_ssf_formula(name: str) -> None:
    channels_first = {"stem", "stem_norm", "grouped", "grouped_norm"}

    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        path = site.removesuffix(":output")
        spatial = 2 if path in channels_first or "patch_embeddings" in path else 1 if path == "sequence" else 0
        shape = (-1, *[1] * spatial)

        def change(y: Tensor) -> Tensor:
            scaled = y * (1 + t["scale_change"].view(shape))
            return scaled + t["shift"].view(shape) if "shift" in t else scaled

        after(model, path, change)

    adapter = compare(name, tt.SSF(), place)
    norms = [leaf for site, leaf in leaves(adapter).items() if "norm" in site.lower()]
    assert all((name == "llama") == (not hasattr(leaf, "shift")) for leaf in norms)
    assert all(group["weight_decay"] == 0.0 for group in adapter.parameter_groups(lr=1e-3, weight_decay=0.05))


def test_ssf_goes_by_the_modules_type_on_a_map_as_wide_as_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)).eval()
    image = torch.randn(2, 3, 8, 8)
    adapter = tt.attach(model, tt.SSF(targets="0"))
    (leaf,) = leaves(adapter).values()
    randomise(adapter)
    with adapter.disabled():
        base = model[0](image)
    expected = base * (1 + leaf.scale_change)[None, :, None, None] + leaf.shift[None, :, None, None]
    torch.testing.assert_close(model[0](image), expected)
    torch.testing.assert_close(model[0](image[0]), expected[0])  # without a batch axis, channels come first
    adapter.detach()
    for path in ("1", "2"):
        adapter = tt.attach(model, tt.SSF(targets=path, deviation=0.0))
        (leaf,) = leaves(adapter).values()
        with torch.no_grad():
            leaf.scale_change[3] = 1.0
        with adapter.disabled():
            plain = model[int(path)](base)
        changed = (model[int(path)](base) != plain).flatten(2).any(2).any(0)
        assert changed.tolist() == [i == 3 for i in range(8)]
        adapter.detach()


class LayerNorm2d(nn.LayerNorm):
    """A layer norm over the channels of images, as vision libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_layer_norm_of_images_has_its_channels_in_front() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), LayerNorm2d(8))
    image = torch.randn(2, 3, 8, 8)
    adapter = tt.attach(model, tt.SSF(targets="1"))
    randomise(adapter)
    attached = model(image)
    adapter.merge()
    torch.testing.assert_close(model(image), attached, rtol=1e-5, atol=1e-5)


def test_a_width_that_is_not_the_modules_own_stops_the_forward() -> None:
    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[..., :3]

    model = nn.Sequential(nn.Linear(4, 4), Odd(4))
    tt.attach(model, tt.SSF(targets="1"))
    with pytest.raises(tt.AttachError, match=r"'1:output' was expected to have 4 channels .* has the shape \(2, 3\)"):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_ia3_formula(name: str) -> None:
    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        path, _, side = site.partition(":")
        (after if side == "output" else before)(model, path, lambda h: h * t["scale"])

    adapter = compare(name, tt.IA3(), place)
    sides = {site.partition(":")[0].rpartition(".")[2]: site.partition(":")[2] for site in leaves(adapter)}
    expected = {
        "bert": {"key": "output", "value": "output", "dense": "input"},
        "llama": {"k_proj": "output", "v_proj": "output", "down_proj": "input"},
        "t5": {"k": "output", "v": "output", "wo": "input"},
        "vit": {"k_proj": "output", "v_proj": "output", "fc2": "input"},
    }
    assert sides == expected[name]


def test_ia3_scales_keys_and_values_of_a_fused_projection_and_leaves_queries() -> None:
    def place(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        path = site.partition(":")[0]
        if path.endswith("c_attn"):
            key, value = t["scale"]
            after(model, path, lambda h: torch.cat([h[..., :32], h[..., 32:64] * key, h[..., 64:] * value], dim=-1))
        else:
            before(model, path, lambda h: h * t["scale"])

    adapter = compare("gpt2", tt.IA3(), place)
    assert adapter.trainable_count == LAYERS * (HIDDEN + HIDDEN + 2 * HIDDEN)


class FusedAttention(nn.Module):
    """One linear map for query, key and value, all queries first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(query, key, value))  # type: ignore[no-any-return]


def test_ia3_refuses_a_fused_projection_it_cannot_divide() -> None:
    model = nn.Sequential(FusedAttention())
    with pytest.raises(tt.TargetError, match=r"'0\.qkv' computes query, key and value in one.*fused='contiguous'"):
        tt.plan(model, tt.IA3(targets="key | value"))
    assert tt.plan(model, tt.IA3(fused="contiguous", targets="key | value")).trainable == 16
    gpt2 = ZOO["gpt2"](0, 0.0).model
    with pytest.raises(tt.TargetError, match="scales the key and the value there, not only key"):
        tt.plan(gpt2, tt.IA3(targets="key | mlp-output"))
    with pytest.raises(tt.TargetError, match="not only query"):
        tt.plan(gpt2, tt.IA3(targets="query"))


def test_ia3_can_be_told_which_targets_are_scaled_at_their_input() -> None:
    entry = ZOO["mlp"](0, 0.0)
    adapter = tt.attach(entry.model, tt.IA3(targets="0 | 3", input_targets="3"))
    assert list(leaves(adapter)) == ["0:output", "3:input"]


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_lofit_formula(name: str) -> None:
    def scale(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        before(model, site.removesuffix(":input"), lambda z: z * (1 + t["scale"].flatten()))

    adapter = compare(name, tt.LoFiT(), scale)
    assert {tuple(leaf.scale.shape) for leaf in leaves(adapter).values()} == {(4, HIDDEN // 4)}
    paths = [leaf.site.path for leaf in leaves(adapter).values()]
    heads = ((paths[-1], 3), (paths[0], 2), (paths[0], 0))

    def offset(model: nn.Module, site: str, t: dict[str, Tensor]) -> None:
        own = [head for path, head in heads if path == site.removesuffix(":input")]

        def change(z: Tensor) -> Tensor:
            z = z.clone()
            for row, head in enumerate(own):
                z[..., 8 * head : 8 * (head + 1)] += t["offset"][row]
            return z

        before(model, site.removesuffix(":input"), change)

    adapter = compare(name, tt.LoFiT(stage="offset", heads=heads), offset)
    assert adapter.trainable_count == 3 * 8


def test_lofit_generates_the_same_with_and_without_a_cache() -> None:
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, tt.LoFiT(stage="offset", heads=(("model.layers.0.self_attn.o_proj", 1),)))
    randomise(adapter, size=3.0)
    prompt = entry.inputs["input_ids"][:1]
    cached, plain = (
        entry.model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    with adapter.disabled():
        base = entry.model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert not torch.equal(base, cached)


# Start, merging, refusals.

EVERYWHERE: list[tuple[tt.Method, list[str]]] = [
    (tt.HoulsbyAdapter(bottleneck=4), [*ATTENTION_MODELS, "mixtral", "torch_encoder"]),
    (tt.PfeifferAdapter(bottleneck=4), [*ATTENTION_MODELS, "mixtral", "torch_encoder"]),
    (tt.ParallelAdapter(bottleneck=4), [*ATTENTION_MODELS, "mixtral", "torch_encoder"]),
    (tt.ParallelAdapter(bottleneck=4, start="bert"), [*ATTENTION_MODELS, "mixtral", "torch_encoder"]),
    (tt.ParallelAdapter(bottleneck=4, layer_norm="out"), ["bert", "llama"]),
    (tt.SSF(), [*ATTENTION_MODELS, "mixtral", "cnn", "mlp", "tied_embedding"]),
    (tt.SSF(deviation=0.0), [*ATTENTION_MODELS, "mixtral", "cnn", "mlp", "tied_embedding"]),
    (tt.SSF(targets="operation - attention-core | attention-output"), ["torch_encoder"]),
    (tt.SSF(targets="attention-output | norm"), ["multihead"]),
    (tt.IA3(), ATTENTION_MODELS),
    (tt.IA3(targets="key | value"), ["mixtral"]),
    (tt.LoFiT(), [*ATTENTION_MODELS, "mixtral"]),
    (tt.LoFiT(deviation=0.0), [*ATTENTION_MODELS, "mixtral"]),
]  # fmt: skip
CASES = [pytest.param(method, name, id=f"{method}-{name}") for method, names in EVERYWHERE for name in names]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_start_is_what_the_method_promises(method: tt.Method, name: str) -> None:
    entry = ZOO[name](0, 0.0)
    with torch.no_grad():
        base = entry.output()
        tt.attach(entry.model, method)
        output = entry.output()
    difference = float((output - base).norm() / base.norm())
    promised = method.promises().starts_at_base
    if promised == "exact":
        assert torch.equal(output, base) or (name == "torch_encoder" and difference < 1e-6)  # its native path is left
    elif promised == "approximate":
        assert 1e-7 < difference < (1e-4 if isinstance(method, tt.HoulsbyAdapter) else 1e-2)
    else:
        assert difference > 1e-4


@pytest.mark.parametrize(("method", "name"), CASES)
def test_merged_is_attached(method: tt.Method, name: str) -> None:
    entry = ZOO[name](0, 0.0)
    adapter = tt.attach(entry.model, method)
    randomise(adapter, size=0.1)
    attached = entry.output()
    if method.promises().merge == "none":
        with pytest.raises(tt.AttachError, match="cannot be merged: the activation function in the bottleneck"):
            adapter.merge()
        return
    receipt = adapter.merge()
    torch.testing.assert_close(entry.output(), attached, rtol=1e-4, atol=2e-5)
    assert bool(receipt.created) <= method.promises().creates_bias
    adapter.unmerge()
    torch.testing.assert_close(entry.output(), attached, rtol=0, atol=0)


def test_lofit_offsets_merge_into_a_bias() -> None:
    entry = ZOO["llama"](0, 0.0)
    path = "model.layers.1.self_attn.o_proj"
    adapter = tt.attach(entry.model, tt.LoFiT(stage="offset", heads=((path, 2), (path, 0))))
    randomise(adapter)
    attached = entry.output()
    receipt = adapter.merge()
    assert receipt.created == (f"{path}.bias",)
    torch.testing.assert_close(entry.output(), attached, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), [case for case in CASES if case.values[1] in ("bert", "cnn", "llama")])
def test_per_sample_gradients_of_a_leaf_add_up_to_its_gradient(method: tt.Method, name: str) -> None:
    """What a per-sample gradient engine does: run a leaf again for each row of what it was called with."""
    entry = ZOO[name](0, 0.0)
    adapter = tt.attach(entry.model, method)
    randomise(adapter)
    calls: dict[Leaf, tuple[Any, ...]] = {}
    gradients: dict[Leaf, Tensor] = {}
    for part in (part for part in adapter.parts if isinstance(part.method, ActivationMethod)):
        for leaf in part.leaves:

            def keep(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
                calls[module] = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                output.register_hook(lambda grad, m=module: gradients.__setitem__(m, grad))

            leaf.register_forward_hook(keep)
    entry.loss().backward()
    assert calls
    for leaf, args in calls.items():
        own = dict(leaf.named_parameters())

        def one(values: dict[str, Tensor], row: tuple[Any, ...], leaf: Leaf = leaf) -> Tensor:
            return torch.func.functional_call(leaf, values, tuple(None if a is None else a[None] for a in row))[0]

        def pull(grad: Tensor, row: tuple[Any, ...], one: Any = one, own: Any = own) -> dict[str, Tensor]:
            return torch.func.vjp(lambda values: one(values, row), own)[1](grad)[0]  # type: ignore[no-any-return]

        axes = tuple(0 if isinstance(a, Tensor) and a.is_floating_point() else None for a in args)
        rows = tuple(a if axis == 0 else None for a, axis in zip(args, axes, strict=True))
        each = torch.func.vmap(pull, in_dims=(0, axes))(gradients[leaf], rows)
        for key, parameter in own.items():
            torch.testing.assert_close(each[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-5)


def test_places_inside_torchs_attention_are_refused() -> None:
    model = ZOO["multihead"](0, 0.0).model
    with pytest.raises(
        tt.TargetError, match=r"'attention\.out_proj' is never called.*Its output is that of 'attention'"
    ):
        tt.plan(model, tt.SSF(targets="attention.out_proj"))
    with pytest.raises(
        tt.TargetError, match=r"'attention:in_proj_weight' is a parameter that MultiheadAttention reads"
    ):
        tt.plan(model, tt.SSF())
    with pytest.raises(tt.TargetError, match="no part in the role 'key'"):
        tt.plan(model, tt.IA3())
    with pytest.raises(tt.TargetError, match="'attention' is none"):
        tt.plan(model, tt.LoFiT())


def test_an_item_is_taken_whole_where_its_name_is_also_a_role_or_the_end_of_longer_names() -> None:
    model = ZOO["multihead"](0, 0.0).model  # its attention is called "attention"
    assert list(leaves(tt.attach(model, tt.SSF(targets="attention-output")))) == ["attention:output"]
    nested = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert list(leaves(tt.attach(nested, tt.SSF(targets="re:0")))) == ["0:output"]


def test_settings_that_cannot_hold_are_refused() -> None:
    model = ZOO["bert"](0, 0.0).model
    with pytest.raises(tt.SettingError, match="leaves no bottleneck at"):
        tt.plan(model, tt.PfeifferAdapter(reduction_factor=64))
    with pytest.raises(tt.TargetError, match="belongs to no feed-forward part"):
        tt.plan(model, tt.ParallelAdapter(targets="query"))
    with pytest.raises(tt.SettingError, match="stage 'offset' needs the heads"):
        tt.plan(model, tt.LoFiT(stage="offset"))
    with pytest.raises(tt.SettingError, match="named twice"):
        tt.plan(model, tt.LoFiT(stage="offset", heads=(("x", 1), ("x", 1))))
    with pytest.raises(tt.TargetError, match=r"the head \('bert.*layer\.7.*', 1\) is at no target.* Did you mean"):
        tt.plan(model, tt.LoFiT(stage="offset", heads=(("bert.encoder.layer.7.attention.output.dense", 1),)))
    path = "bert.encoder.layer.0.attention.output.dense"
    with pytest.raises(tt.SettingError, match="has the heads 0 to 3, asked for 4"):
        tt.plan(model, tt.LoFiT(stage="offset", heads=((path, 4),)))
    with pytest.raises(tt.TargetError, match="is not a number of heads of width 5"):
        tt.plan(model, tt.LoFiT(head_size=5))
    with pytest.raises(tt.SettingError, match="asked for 9 of 8 heads"):
        tt.LoFiT.select_heads(tt.attach(model, tt.LoFiT()), 9)


@pytest.mark.parametrize(
    "method", [tt.ParallelAdapter(bottleneck=4), tt.PfeifferAdapter(bottleneck=4), tt.IA3(), tt.SSF()]
)
def test_rows_can_be_routed(method: tt.Method) -> None:
    entry = ZOO["bert"](0, 0.0)
    alone = []
    for seed in (1, 2):
        adapter = tt.attach(entry.model, method, name="other")
        randomise(adapter, seed)
        alone.append(entry.output())
        adapter.detach()
    base = entry.output()
    if not method.capabilities.additive:
        tt.attach(entry.model, method, name="a")
        with pytest.raises(tt.AttachError, match="is not additive"):
            tt.attach(entry.model, method, name="b")
        return
    for name, seed in (("a", 1), ("b", 2)):
        randomise(tt.attach(entry.model, method, name=name), seed)
    with tt.route(entry.model, ["b", None, "a"]):
        routed = entry.output()
    torch.testing.assert_close(routed, torch.stack([alone[1][0], base[1], alone[0][2]]), rtol=1e-5, atol=1e-5)


def test_lofit_heads_survive_the_file(tmp_path: Any) -> None:
    entry = ZOO["llama"](0, 0.0)
    heads = (("model.layers.1.self_attn.o_proj", 3), ("model.layers.0.self_attn.o_proj", 0))
    adapter = tt.attach(entry.model, tt.LoFiT(stage="offset", heads=heads))
    randomise(adapter)
    attached = entry.output()
    adapter.save(tmp_path)
    adapter.detach()
    loaded = tt.load(entry.model, tmp_path)
    assert loaded.method == tt.LoFiT(stage="offset", heads=heads)
    assert torch.equal(entry.output(), attached)


def test_penalty_is_the_weighted_sum_of_magnitudes() -> None:
    adapter = tt.attach(ZOO["llama"](0, 0.0).model, tt.LoFiT(penalty_weight=0.25))
    expected = 0.25 * sum(float(p.detach().abs().sum()) for p in adapter.parameters())
    assert float(adapter.penalty().detach()) == pytest.approx(expected)
    offset = tt.attach(ZOO["gpt2"](0, 0.0).model, tt.LoFiT(stage="offset", heads=LOFIT_HEADS, penalty_weight=0.25))
    assert offset.penalty() is None


# Learning.

LOFIT_HEADS = (("transformer.h.0.attn.c_proj", 2), ("transformer.h.1.attn.c_proj", 1))


def minimise(adapter: tt.Adapter, loss: Callable[[], Tensor], steps: int, lr: float) -> float:
    optimizer = torch.optim.Adam(adapter.parameter_groups(lr=lr))
    adapter.bind(optimizer, total_steps=steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    return float(loss().detach())


def planted(seed: int) -> tuple[ZooModel, dict[tuple[str, int], Tensor], Tensor]:
    """A model, offsets of two of its eight heads, and what it gives with these planted.

    They lie along what the head says on average: that is what scaling a head can express.
    """
    entry, teacher = ZOO["gpt2"](seed, 0.0), ZOO["gpt2"](seed, 0.0)
    spoken: dict[str, Tensor] = {}
    for path, _ in LOFIT_HEADS:
        before(teacher.model, path, lambda z, path=path: spoken.setdefault(path, z.detach()))
    teacher.output()
    offsets = {(path, i): 2.0 * spoken[path][..., 8 * i : 8 * (i + 1)].mean((0, 1)) for path, i in LOFIT_HEADS}
    teacher = ZOO["gpt2"](seed, 0.0)
    for (path, head), offset in offsets.items():
        shift = F.pad(offset, (8 * head, 32 - 8 * (head + 1)))
        before(teacher.model, path, lambda z, shift=shift: z + shift)
    return entry, offsets, teacher.output().detach()


@pytest.mark.parametrize("seed", range(3))
def test_lofit_finds_planted_heads_and_recovers_their_offsets(seed: int) -> None:
    entry, offsets, target = planted(seed)
    first = tt.attach(entry.model, tt.LoFiT(penalty_weight=5e-3))
    minimise(first, lambda: F.mse_loss(entry.output(), target), 150, 3e-2)
    heads = tt.LoFiT.select_heads(first, 2)
    assert set(heads) == set(LOFIT_HEADS)
    first.detach()

    second = tt.attach(entry.model, tt.LoFiT(stage="offset", heads=heads))
    reached = minimise(second, lambda: F.mse_loss(entry.output(), target), 300, 1e-1)
    for leaf in leaves(second).values():
        own = [head for head in heads if head[0] == leaf.site.path]
        for row, head in enumerate(own):
            assert F.cosine_similarity(leaf.offset[row], offsets[head], dim=0) > 0.99
    second.detach()

    others = tuple((path, 3 - head) for path, head in LOFIT_HEADS)
    third = tt.attach(entry.model, tt.LoFiT(stage="offset", heads=others))
    assert minimise(third, lambda: F.mse_loss(entry.output(), target), 300, 1e-1) > 10 * reached


def test_a_larger_penalty_leaves_smaller_scales() -> None:
    entry, _, target = planted(0)
    totals = []
    for weight in (1e-4, 1e-2, 1.0):
        adapter = tt.attach(entry.model, tt.LoFiT(penalty_weight=weight))
        minimise(adapter, lambda: F.mse_loss(entry.output(), target), 100, 3e-2)
        totals.append(sum(float(p.detach().abs().sum()) for p in adapter.parameters()))
        adapter.detach()
    assert totals[0] > totals[1] > totals[2]


def test_ssf_learns_what_a_low_rank_update_with_more_parameters_cannot() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    teacher, x = copy.deepcopy(base.double()), torch.randn(128, 6, dtype=torch.float64)
    with torch.no_grad():
        for path in ("0", "1", "3"):
            module: Any = teacher.get_submodule(path)
            gain, shift = 1 + 0.3 * torch.randn(12), 0.3 * torch.randn(12)
            module.weight.mul_(gain.view(-1, *[1] * (module.weight.dim() - 1)))
            module.bias.mul_(gain).add_(shift)
        target = teacher(x)
    start = float(F.mse_loss(base(x), target).detach())
    remaining = {}
    for method in (tt.SSF(deviation=0.0), tt.LoRA(rank=2, targets="0 | 3")):
        adapter = tt.attach(base, method, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(list(adapter.parameters()), max_iter=1000, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(base(x), target)
            loss.backward()
            return loss

        optimizer.step(closure)
        remaining[type(method)] = (float(F.mse_loss(base(x), target).detach()) / start, adapter.trainable_count)
        adapter.detach()
    assert remaining[tt.SSF][0] < 1e-6
    assert remaining[tt.LoRA][0] > 1e-3
    assert remaining[tt.LoRA][1] > remaining[tt.SSF][1]


class FrozenFeedForward(nn.Module):
    """A block whose feed-forward part is all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))  # type: ignore[no-any-return]


def remaining_loss(method: tt.Method, seed: int) -> float:
    torch.manual_seed(seed)
    base = nn.Sequential(FrozenFeedForward())
    teacher, x = copy.deepcopy(base), torch.randn(512, 32)
    with torch.no_grad():
        for linear in (teacher[0].up, teacher[0].down):
            linear.weight.add_(0.3 * linear.weight.std() * torch.randn_like(linear.weight))
        target = teacher(x)
    start = float(F.mse_loss(base(x), target).detach())
    adapter = tt.attach(base, method)
    if isinstance(method, tt.HoulsbyAdapter):
        with torch.no_grad():
            for leaf in leaves(adapter).values():
                nn.init.kaiming_uniform_(leaf.down, a=5**0.5)
                leaf.up.zero_()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=5e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        F.mse_loss(base(x), target).backward()
        optimizer.step()
    return float(F.mse_loss(base(x), target).detach()) / start


@pytest.mark.parametrize("seed", range(4))
def test_a_parallel_bottleneck_learns_more_than_a_sequential_one(seed: int) -> None:
    parallel = remaining_loss(tt.ParallelAdapter(bottleneck=4, scale=1.0), seed)
    series = tt.HoulsbyAdapter(bottleneck=4, activation="relu", train_norms=False, targets="feed-forward")
    sequential = remaining_loss(series, seed)
    assert parallel < sequential < 0.95


def test_mam_is_its_two_parts() -> None:
    parts = tt.MAM(prefix_length=5, bottleneck=6, scale=2.0, dropout=0.1).parts()
    assert parts == (tt.PrefixTuning(length=5), tt.ParallelAdapter(bottleneck=6, scale=2.0, dropout=0.1))
    entry, composed = ZOO["bert"](0, 0.0), ZOO["bert"](0, 0.0)
    first = tt.attach(entry.model, tt.MAM(prefix_length=5, bottleneck=6))
    second = tt.attach(composed.model, tt.Compose(tt.PrefixTuning(length=5), tt.ParallelAdapter(bottleneck=6)))
    randomise(first)
    randomise(second)
    assert torch.equal(entry.output(), composed.output())
    with pytest.raises(tt.AttachError, match="cannot be merged: added keys and values"):
        first.merge()


def test_promises_follow_the_settings() -> None:
    assert tt.SSF().promises().starts_at_base == "no"
    assert tt.SSF(deviation=0.0).promises() == replace(tt.SSF.capabilities, starts_at_base="exact")
    assert tt.ParallelAdapter(start="bert").promises().starts_at_base == "no"
    assert tt.ParallelAdapter().promises() == tt.ParallelAdapter.capabilities


def method_files() -> Iterator[type[tt.Method]]:
    yield from (tt.HoulsbyAdapter, tt.PfeifferAdapter, tt.ParallelAdapter, tt.SSF, tt.IA3, tt.LoFiT, tt.MAM)


def test_every_card_names_its_paper() -> None:
    assert all("arXiv" in (cls.__doc__ or "") and "Trainable:" in (cls.__doc__ or "") for cls in method_files())
