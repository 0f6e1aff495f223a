"""Methods that train the base's own numbers: counts of published models, what is saved for the backward pass, PaCA."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import trimtab
from zoo import ZOO


class Saved:
    """The tensors that autograd keeps inside the `with`, without those of the model itself."""

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.tensors: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.own:
            self.tensors[place] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    def __enter__(self) -> Saved:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def bert_base() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig())


def clip_vision() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    return transformers.CLIPVisionModel(config)


def llama_7b() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig())  # the defaults are those of Llama-2 7B


@pytest.mark.parametrize(
    ("build", "method", "count"),
    [
        (bert_base, trimtab.BitFit(), 102_912),
        (bert_base, trimtab.LNTuning(), 38_400),
        (clip_vision, trimtab.LNTuning(), 102_400),
        (llama_7b, trimtab.PaCA(rank=8), 10_878_976),
        (llama_7b, trimtab.PaCA(rank=16), 21_757_952),
    ],
)
def test_counts_of_published_models(build: Callable[[], nn.Module], method: trimtab.Method, count: int) -> None:
    assert trimtab.plan(on_meta(build), method).trainable == count


def train(entry_loss: Callable[[], Tensor], adapter: trimtab.Adapter, steps: int = 3) -> None:
    """AdamW with weight decay on every parameter it can reach, the base's own included."""
    everything = [*adapter.parameters(), *adapter.model.parameters()]
    unique = list({id(parameter): parameter for parameter in everything}.values())
    optimizer = torch.optim.AdamW(unique, lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        entry_loss().backward()
        optimizer.step()


@pytest.mark.parametrize("method", [trimtab.BitFit(), trimtab.LNTuning(), trimtab.LinearProbe(), trimtab.PaCA(rank=4)])
def test_the_base_stays_bit_for_bit_with_weight_decay_on(method: trimtab.Method) -> None:
    entry = ZOO["bert"](0, 0.0)
    before = copy.deepcopy(entry.model.state_dict())
    base = entry.output().detach()
    adapter = trimtab.attach(entry.model, method)
    assert torch.equal(entry.output(), base)
    train(entry.loss, adapter)
    trained = entry.output().detach()
    assert (trained - base).abs().max() > 1e-3
    with adapter.disabled():
        assert torch.equal(entry.output(), base)
    adapter.merge()
    torch.testing.assert_close(entry.output(), trained, rtol=1e-4, atol=1e-5)
    adapter.detach()
    after = entry.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


# ---- BitFit ----


def test_bitfit_saves_no_input_of_a_linear_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 8))
    x = torch.randn(5, 16)
    with Saved(model) as dense:
        model(x).sum().backward()
    expected = [layer.bias.grad.clone() for layer in model]
    adapter = trimtab.attach(model, trimtab.BitFit())
    with Saved(model) as saved:
        model(x).sum().backward()
    assert dense.bytes >= 5 * (16 + 64) * 4
    assert saved.bytes == 0
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_bias_table_is_no_bias() -> None:
    entry = ZOO["t5"](0, 0.0)
    assert any("relative_attention_bias" in name for name, _ in entry.model.named_parameters())
    with pytest.raises(trimtab.TargetError, match="this model has no part in the role 'bias'"):
        trimtab.attach(entry.model, trimtab.BitFit())


# ---- norms ----


@pytest.mark.parametrize(("name", "norms"), [("bert", 5), ("llama", 5), ("gpt2", 5), ("cnn", 2), ("torch_encoder", 4)])
def test_norms_are_found_by_type(name: str, norms: int) -> None:
    entry = ZOO[name](0, 0.0)
    adapter = trimtab.attach(entry.model, trimtab.LNTuning())
    per_norm = 1 if name == "llama" else 2
    assert len(list(adapter.parameters())) == norms * per_norm


def test_norms_inside_named_modules() -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = trimtab.attach(entry.model, trimtab.LNTuning(targets="block[0:1]"))
    paths = {leaf.site.path for leaf in adapter.parts[0].leaves}
    prefix = "bert.encoder.layer.0."
    assert paths == {prefix + "attention.output.LayerNorm", prefix + "output.LayerNorm"}
    with pytest.raises(trimtab.TargetError, match="hold no norm; use 'norm'"):
        trimtab.plan(ZOO["bert"](0, 0.0).model, trimtab.LNTuning(targets="query"))


def test_norm_tuning_recovers_perturbed_gains_and_a_head_alone_does_not() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher[1].weight.mul_(1.0 + 0.5 * torch.randn(16))
    x = torch.randn(256, 8)
    target = teacher(x).detach()
    losses = {}
    for method in (trimtab.LNTuning(), trimtab.LinearProbe()):
        model = copy.deepcopy(student)
        adapter = trimtab.attach(model, method)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
        start = F.mse_loss(model(x), target).item()
        for _ in range(400):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
        losses[type(method).__name__] = F.mse_loss(model(x), target).item() / start
    assert losses["LNTuning"] < 0.01 < losses["LinearProbe"]


# ---- linear probe ----


def test_a_probe_keeps_the_backbone_in_evaluation_mode() -> None:
    entry = ZOO["bert"](0, 0.5)
    entry.model.train()
    adapter = trimtab.attach(entry.model, trimtab.LinearProbe())
    assert adapter.base_mode == "eval"
    entry.model.train()
    assert torch.equal(entry.output(), entry.output())
    assert not any(module.training for name, module in entry.model.named_modules() if "trimtab" not in name)


def test_a_probe_may_be_asked_to_let_the_base_follow() -> None:
    entry = ZOO["bert"](0, 0.5)
    trimtab.attach(entry.model, trimtab.LinearProbe(), base_mode="follow")
    entry.model.train()
    assert not torch.equal(entry.output(), entry.output())


def test_a_probe_within_a_composition_holds_the_base_as_well() -> None:
    entry = ZOO["bert"](0, 0.5)
    adapter = trimtab.attach(entry.model, trimtab.Compose(trimtab.LoRA(rank=2), trimtab.LinearProbe()))
    assert adapter.base_mode == "eval"
    assert trimtab.attach(ZOO["bert"](0, 0.5).model, trimtab.LoRA(rank=2)).base_mode == "follow"


def test_a_probe_leaves_running_statistics_alone() -> None:
    entry = ZOO["cnn"](0, 0.0)
    before = {name: buffer.clone() for name, buffer in entry.model.named_buffers()}
    adapter = trimtab.attach(entry.model, trimtab.LinearProbe())
    entry.model.train()
    train(entry.loss, adapter)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in entry.model.named_buffers())


def test_a_probe_saves_nothing_of_the_backbone() -> None:
    entry = ZOO["bert"](0, 0.0)
    trimtab.attach(entry.model, trimtab.LinearProbe())
    del entry.inputs["labels"]
    with Saved(entry.model) as saved:
        entry.output()
    assert saved.bytes == 3 * 32 * 4  # the pooled state, input of the head


def test_a_tied_head_is_refused() -> None:
    entry = ZOO["gpt2"](0, 0.0)
    with pytest.raises(trimtab.TargetError) as caught:
        trimtab.attach(entry.model, trimtab.LinearProbe())
    assert str(caught.value) == (
        "the head 'lm_head:weight' is tied to 'transformer.wte': a probe would change the features it reads. Give the "
        "head a weight of its own, or train both with FullTuning(targets='lm_head:weight')."
    )


# ---- PaCA ----


def linear_pair(double: bool = True) -> tuple[nn.Linear, nn.Sequential, trimtab.Adapter]:
    """A dense layer, and PaCA on a copy of it, moved away from its start by the same columns."""
    torch.manual_seed(0)
    dense = nn.Linear(12, 7)
    dense = dense.double() if double else dense
    model = nn.Sequential(copy.deepcopy(dense), nn.Identity())
    dtype = torch.float64 if double else torch.float32
    adapter = trimtab.attach(model, trimtab.PaCA(rank=4, alpha=2.0, targets="0"), dtype=dtype)
    leaf = adapter.parts[0].leaves[0]
    with torch.no_grad():
        leaf.change.normal_()
        dense.weight[:, leaf.index.long()] += 0.5 * leaf.change
    return dense, model, adapter


@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_those_of_the_dense_columns(shape: tuple[int, ...], fused: bool) -> None:
    dense, model, adapter = linear_pair()
    leaf = adapter.parts[0].leaves[0]
    leaf.fusible = fused
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    (expected_x, expected_weight) = torch.autograd.grad((dense(x) * weights).sum(), (x, dense.weight))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-12, atol=1e-12)
    (found_x, found) = torch.autograd.grad((model(x) * weights).sum(), (x, leaf.change))
    torch.testing.assert_close(found_x, expected_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, 0.5 * expected_weight[:, leaf.index.long()], rtol=1e-12, atol=1e-12)


def test_a_transposed_layer_is_adapted_by_its_input() -> None:
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(6, 10).double()  # 10 in, 6 out, stored as (in, out)
    model = nn.ModuleDict({"layer": layer})
    adapter = trimtab.attach(model, trimtab.PaCA(rank=3, targets="layer"), dtype=torch.float64)
    leaf = adapter.parts[0].leaves[0]
    assert leaf.change.shape == (6, 3)
    with torch.no_grad():
        leaf.change.normal_()
    x = torch.randn(2, 4, 10, dtype=torch.float64)
    weight = layer.weight.clone()
    weight[leaf.index.long()] += leaf.change.detach().t()
    torch.testing.assert_close(layer(x), x @ weight + layer.bias)
    adapter.merge()
    torch.testing.assert_close(layer.weight, weight, rtol=1e-6, atol=1e-6)  # merging computes in float32


@pytest.mark.parametrize("fused", [True, False])
def test_only_the_chosen_inputs_are_saved(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Identity())
    adapter = trimtab.attach(model, trimtab.PaCA(rank=8, targets="0"))
    adapter.parts[0].leaves[0].fusible = fused
    x = torch.randn(128, 256)
    with Saved(model) as saved:
        model(x)
    assert saved.bytes == 128 * 8 * 4
    adapter.detach()
    trimtab.attach(model, trimtab.LoRA(rank=8, targets="0"))
    with Saved(model) as saved:
        model(x)
    assert saved.bytes == 128 * (256 + 8) * 4


def test_merging_writes_the_chosen_columns_only() -> None:
    dense, model, adapter = linear_pair(double=False)
    chosen = adapter.parts[0].leaves[0].index.long()
    others = torch.ones(12, dtype=torch.bool)
    others[chosen] = False
    before = model[0].weight.detach().clone()
    adapter.merge()
    assert torch.equal(model[0].weight[:, others], before[:, others])
    assert not torch.isclose(model[0].weight[:, chosen], before[:, chosen]).any()
    torch.testing.assert_close(model[0].weight, dense.weight)
    adapter.unmerge()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("width", "dtype"), [(256, torch.uint8), (257, torch.int32), (40_000, torch.int32)])
def test_indices_are_as_narrow_as_they_can_be(width: int, dtype: torch.dtype, tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(width, 2), nn.Identity())
    adapter = trimtab.attach(model, trimtab.PaCA(rank=2, targets="0"), seed=3)
    index = adapter.parts[0].leaves[0].index
    assert index.dtype == dtype
    assert len(index.unique()) == 2
    kept = index.clone()
    with torch.no_grad():
        next(adapter.parameters()).normal_()
    adapter.save(str(tmp_path))
    adapter.detach()
    loaded = trimtab.load(model, str(tmp_path))
    assert torch.equal(loaded.parts[0].leaves[0].index, kept)


def test_the_seed_chooses_the_columns() -> None:
    chosen = []
    for seed in (0, 0, 1):
        adapter = trimtab.attach(ZOO["bert"](0, 0.0).model, trimtab.PaCA(rank=4), seed=seed)
        chosen.append(torch.cat([leaf.index for leaf in adapter.parts[0].leaves]))
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_every_expert_has_columns_of_its_own() -> None:
    entry = ZOO["mixtral"](0, 0.0)
    base = entry.output()
    adapter = trimtab.attach(entry.model, trimtab.PaCA(rank=4, targets="experts"))
    assert torch.equal(entry.output(), base)
    index = adapter.parts[0].leaves[0].index
    assert index.shape == (4, 4)
    assert len({tuple(row.tolist()) for row in index}) == 4
    entry.loss().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_low_precision_starts_exactly_and_learns(dtype: torch.dtype) -> None:
    entry = ZOO["bert"](0, 0.0)
    entry.model.to(dtype)
    base = entry.output()
    adapter = trimtab.attach(entry.model, trimtab.PaCA(rank=4))
    assert torch.equal(entry.output(), base)
    entry.loss().backward()
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in adapter.parameters())


def test_autocast_gives_the_same_to_its_precision() -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = trimtab.attach(entry.model, trimtab.PaCA(rank=4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.05)
    expected = entry.output()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entry.output()
        entry.loss().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_the_loss_falls_to_what_the_other_columns_hold() -> None:
    """Whitened inputs, target W + D: what is left is Σ over the columns j not chosen of ‖D_j‖² / width."""
    torch.manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(64, 16).double()).Q * 8.0  # (tokens, in), covariance 1
    model = nn.Sequential(nn.Linear(16, 5, bias=False).double(), nn.Identity())
    difference = torch.randn(5, 16).double()
    target = orthogonal @ (model[0].weight + difference).detach().t()
    adapter = trimtab.attach(model, trimtab.PaCA(rank=6, targets="0"), dtype=torch.float64)
    leaf = adapter.parts[0].leaves[0]
    optimizer = torch.optim.LBFGS(adapter.parameters(), lr=1.0, max_iter=50, tolerance_grad=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(orthogonal), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    others = torch.ones(16, dtype=torch.bool)
    others[leaf.index.long()] = False
    expected = difference[:, others].square().sum() / 5
    assert closure().item() == pytest.approx(expected.item(), rel=1e-8)


def test_places_without_input_columns_are_refused() -> None:
    with pytest.raises(trimtab.TargetError, match="PaCA is not defined for the embedding 'embedding'"):
        trimtab.attach(ZOO["tied_embedding"](0, 0.0).model, trimtab.PaCA(rank=2, targets="embedding"))
    with pytest.raises(trimtab.TargetError, match="PaCA is not defined for the convolution 'stem'"):
        trimtab.attach(ZOO["cnn"](0, 0.0).model, trimtab.PaCA(rank=2, targets="stem"))
    with pytest.raises(trimtab.SettingError, match="has only 32 input columns"):
        trimtab.attach(ZOO["bert"](0, 0.0).model, trimtab.PaCA(rank=33, targets="query"))
