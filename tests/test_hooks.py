"""How a model is hooked: facts about torch, transformers and accelerate that the whole library stands on."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn

import trimtab as tt
from adapting import moved, same_state, state
from contract_cases import zoo_case
from trimtab.contract.processes import WORLD, process_group, shard, trains_distributed
from trimtab.hooks import is_hooked
from trimtab.structure import Structure
from trimtab.targets import resolve
from zoo import ZOO, ZooModel

NEAR = {"rtol": 1e-4, "atol": 1e-5}


# The class swap


@pytest.mark.parametrize("name", list(ZOO))
def test_the_swap_keeps_names_isinstance_keys_and_storage(name: str) -> None:
    entry = ZOO[name](0, 0.0)
    modules = dict(entry.model.named_modules())
    classes = {path: type(module) for path, module in modules.items()}
    pointers = {key: tensor.data_ptr() for key, tensor in entry.model.state_dict().items()}
    adapter = tt.attach(entry.model, tt.FullTuning())
    swapped = [path for path, module in modules.items() if is_hooked(module)]
    assert swapped
    for path, module in modules.items():
        found = type(module)
        assert isinstance(module, classes[path])
        assert (found.__name__, found.__qualname__, found.__module__, found.__doc__) == (
            classes[path].__name__, classes[path].__qualname__, classes[path].__module__, classes[path].__doc__,
        )  # fmt: skip
        assert entry.model.get_submodule(path) is module
    kept = {key: tensor.data_ptr() for key, tensor in entry.model.state_dict().items() if "trimtab_" not in key}
    assert kept == pointers
    adapter.detach()
    assert {path: type(module) for path, module in modules.items()} == classes


@dataclass(frozen=True)
class _FailsToStart(tt.LoRA):
    def initialise(self, leaf: Any, generator: torch.Generator) -> None:
        raise RuntimeError("no start")


def test_a_failed_attach_takes_back_what_it_hooked_and_leaves_the_other_adapter() -> None:
    entry = ZOO["mlp"](0, 0.0)
    first = moved(entry.model, tt.RandLoRA(rank=2, targets="0"), name="first")
    hooked = [path for path, module in entry.model.named_modules() if is_hooked(module)]
    expected, output = state(entry.model), entry.output()
    with pytest.raises(RuntimeError, match="no start"):
        tt.attach(entry.model, _FailsToStart(rank=2, targets="all-linear"), name="second")
    assert [path for path, module in entry.model.named_modules() if is_hooked(module)] == hooked
    assert same_state(entry.model, expected)
    assert torch.equal(entry.output(), output)
    first.detach()
    assert not any(is_hooked(module) for module in entry.model.modules())


def test_the_tensors_of_an_adapter_are_no_part_of_the_base() -> None:
    entry = ZOO["mlp"](0, 0.0)
    numbers = sum(parameter.numel() for parameter in entry.model.parameters())
    everything = resolve(Structure(entry.model), "all")
    first = tt.attach(entry.model, tt.LoRA(rank=2), name="first")
    tt.attach(entry.model, tt.RandLoRA(rank=2), name="shares")  # its shared tensors are registered on the model
    assert resolve(Structure(entry.model), "all") == everything
    assert first.report().base == numbers


def test_a_tied_weight_counts_once() -> None:
    entry = ZOO["tied_embedding"](0, 0.0)
    numbers = sum(parameter.numel() for parameter in entry.model.parameters())
    assert tt.plan(entry.model, tt.LoRA(rank=2)).base == numbers
    assert tt.attach(entry.model, tt.LoRA(rank=2)).report().base == numbers


def test_calling_the_class_of_an_attached_model_makes_a_plain_one() -> None:
    entry = ZOO["bert"](0, 0.0)
    tt.attach(entry.model, tt.LoRA(rank=2))
    plain = type(entry.model)(entry.model.config)
    assert type(plain) is type(ZOO["bert"](0, 0.0).model)
    assert not any(is_hooked(module) for module in plain.modules())
    assert entry.output(plain).shape == entry.output().shape


def test_one_class_for_all_modules_of_a_class() -> None:
    entry = ZOO["llama"](0, 0.0)
    tt.attach(entry.model, tt.LoRA(rank=2, targets="query | key"))
    layer = entry.model.model.layers[0].self_attn
    assert type(layer.q_proj) is type(layer.k_proj)
    assert type(layer.q_proj) is not type(layer.v_proj)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_leaves_of_their_own(way: Callable[[nn.Module], nn.Module]) -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = moved(entry.model, tt.Compose(tt.LoRA(rank=2), tt.BitFit()))
    twin = way(entry.model)
    assert torch.equal(entry.output(twin), entry.output())
    own = {id(tensor) for _, tensor, _ in adapter.named_tensors()}
    copied = tt.adapters(twin)["default"]
    assert not own & {id(tensor) for _, tensor, _ in copied.named_tensors()}
    assert copied.model is twin
    assert all(leaf.root is twin for leaf in copied.leaves())
    assert all(id(leaf.target) in {id(module) for module in twin.modules()} for leaf in copied.leaves())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "torch_encoder"])
def test_one_graph(name: str) -> None:
    entry = ZOO[name](0, 0.0)
    moved(entry.model, tt.LoRA(rank=2))
    torch._dynamo.reset()
    compiled = torch.compile(entry.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(entry.output(compiled), entry.output(), **NEAR)


# Forwards on the instance: accelerate's dispatch


def test_attaching_to_a_dispatched_model_stops() -> None:
    entry = ZOO["llama"](0, 0.0)
    before = state(entry.model)
    for module in entry.model.modules():
        add_hook_to_module(module, ModelHook())
    with pytest.raises(
        tt.AttachError, match=r"has a forward of its own on the instance .* Attach first, then dispatch"
    ):
        tt.attach(entry.model, tt.LoRA(rank=2))
    assert tt.adapters(entry.model) == {}
    assert same_state(entry.model, before)
    assert not any(is_hooked(module) for module in entry.model.modules())
    assert all(parameter.requires_grad for parameter in entry.model.parameters())


def test_an_instance_forward_of_any_target_stops() -> None:
    entry = ZOO["bert"](0, 0.0)
    module = entry.model.get_submodule("bert.encoder.layer.1.output.dense")
    module.forward = module.forward
    with pytest.raises(
        tt.AttachError, match=r"module 'bert\.encoder\.layer\.1\.output\.dense' has a forward of its own"
    ):
        tt.attach(entry.model, tt.LoRA(rank=2))
    assert not any(is_hooked(other) for other in entry.model.modules())


def test_dispatching_an_attached_model_keeps_the_adapter() -> None:
    entry = ZOO["llama"](0, 0.0)
    base = entry.output()
    adapter = moved(entry.model, tt.LoRA(rank=2))
    expected = entry.output()
    for module in entry.model.modules():
        add_hook_to_module(module, ModelHook())
    assert torch.equal(entry.output(), expected)
    with adapter.disabled():
        assert torch.equal(entry.output(), base)
    remove_hook_from_submodules(entry.model)
    assert torch.equal(entry.output(), expected)


def test_offloading_an_attached_model_keeps_the_adapter(tmp_path: Path) -> None:
    entry = ZOO["llama"](0, 0.0)
    moved(entry.model, tt.LoRA(rank=2))
    expected = entry.output()
    parts = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    devices: dict[str, Any] = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.layers.1": "disk"}
    dispatch_model(entry.model, devices, main_device="cpu", offload_dir=str(tmp_path))
    with torch.no_grad():
        assert torch.equal(entry.output(), expected)


def test_offloading_first_stops() -> None:
    entry = ZOO["llama"](0, 0.0)
    cpu_offload(entry.model, execution_device="cpu")
    with pytest.raises(tt.AttachError, match="has a forward of its own"):
        tt.attach(entry.model, tt.LoRA(rank=2))


# torch's inference fast paths, which read weights without calling modules


def encoder_layer() -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    return layer, {"src": torch.randn(3, 5, 16)}


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return nn.TransformerEncoder(layer, 2), {"src": torch.randn(3, 5, 16), "src_key_padding_mask": padding}


def multihead() -> tuple[nn.Module, dict[str, Tensor]]:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    return Attend(), {"x": torch.randn(3, 5, 16)}


MIXES: dict[str, tt.Method] = {
    "linear": tt.LoRA(rank=2, targets="re:(.*\\.)?linear1"),
    "attention": tt.LoRA(rank=2, targets="attention"),
    "biases": tt.BitFit(),
    "norms": tt.LNTuning(),
    "everything": tt.FullTuning(),
}
FAST = [
    (build, name)
    for build in (encoder_layer, encoder, multihead)
    for name in MIXES
    if not (build is multihead and name in ("linear", "norms"))
]


@pytest.mark.parametrize(("build", "name"), FAST, ids=[f"{build.__name__}-{name}" for build, name in FAST])
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_inference_gives_the_adapted_output(
    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], name: str, gradients: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    kept = ~inputs["src_key_padding_mask"] if "src_key_padding_mask" in inputs else ...
    with torch.set_grad_enabled(gradients):
        base = model(**inputs)
        adapter = moved(model, MIXES[name])
        found = model(**inputs)
        assert not torch.allclose(found[kept], base[kept], atol=1e-3)
        plain = copy.deepcopy(model)
        twin = tt.adapters(plain)["default"]
        twin.merge()
        twin.detach(keep_merged=True)
        torch.testing.assert_close(found[kept], plain(**inputs)[kept], **NEAR)  # the plain model, fast paths and all
        model.train()
        torch.testing.assert_close(model(**inputs)[kept], found[kept], **NEAR)
        model.eval()
        with adapter.disabled():
            torch.testing.assert_close(model(**inputs)[kept], base[kept], **NEAR)
        adapter.detach()
        assert torch.equal(model(**inputs)[kept], base[kept])


def test_a_bare_multihead_attention_reads_its_adapted_weights() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        base = attention(x, x, x, need_weights=False)[0]
        adapter = moved(attention, tt.LoRA(rank=2, targets=":in_proj_weight"))
        found = attention(x, x, x, need_weights=False)[0]
        effective = copy.deepcopy(attention)
        twin = tt.adapters(effective)["default"]
        twin.merge()
        torch.testing.assert_close(effective(x, x, x, need_weights=False)[0], found, **NEAR)
        assert not torch.allclose(found, base, atol=1e-3)
        assert attention.in_proj_weight is attention._parameters["in_proj_weight"]  # outside its forward: the base's
        adapter.detach()
        assert torch.equal(attention(x, x, x, need_weights=False)[0], base)


# Tied weights


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied_embedding"])
def test_merging_a_tied_weight_stops_unless_untied(name: str) -> None:
    entry = ZOO[name](0, 0.0)
    before, base = state(entry.model), entry.output()
    adapter = moved(entry.model, tt.LoRA(rank=2, targets="head"))
    beside = entry.output()
    with pytest.raises(tt.AttachError, match=r"is tied to another weight of the model.*merge\(untie=True\)"):
        adapter.merge()
    assert not adapter.merged
    assert torch.equal(entry.output(), beside)
    adapter.merge(untie=True)
    torch.testing.assert_close(entry.output(), beside, **NEAR)
    adapter.unmerge()
    assert torch.equal(entry.output(), beside)
    adapter.detach()
    assert same_state(entry.model, before)
    assert torch.equal(entry.output(), base)
    embedding = next(module for module in entry.model.modules() if isinstance(module, nn.Embedding))
    assert any(other.weight is embedding.weight for other in entry.model.modules() if isinstance(other, nn.Linear))


# save_pretrained


def test_saving_a_model_with_an_adapter_stops_and_is_right_after_merging(tmp_path: Path) -> None:
    entry = ZOO["bert"](0, 0.0)
    adapter = moved(entry.model, tt.LoRA(rank=2))
    expected = entry.output()
    with pytest.raises(
        tt.AttachError,
        match=r"attached adapter 'default': a plain reload would silently be the base model\. "
        r"Either save the adapter \(adapter\.save\(path\)\), or merge it first \(adapter\.merge\(\)\)",
    ):
        entry.model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    adapter.merge()
    entry.model.save_pretrained(tmp_path / "merged")
    reloaded = type(entry.model).from_pretrained(tmp_path / "merged", attn_implementation="sdpa").eval()
    torch.testing.assert_close(entry.output(reloaded), expected, **NEAR)
    assert torch.equal(entry.output(reloaded), entry.output())
    adapter.unmerge()
    with pytest.raises(tt.AttachError, match="attached adapter 'default'"):
        entry.model.save_pretrained(tmp_path / "refused")
    adapter.detach()
    entry.model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "config.json").is_file()


# A failed attach


@pytest.mark.parametrize("earlier", [False, True], ids=["fresh", "beside another"])
def test_a_failed_attach_leaves_the_model_untouched(earlier: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ZOO["llama"](0, 0.0)
    if earlier:
        moved(entry.model, tt.LoRA(rank=2), name="earlier")
    before, output = state(entry.model), entry.output()
    classes = [type(module) for module in entry.model.modules()]
    wanting = [parameter.requires_grad for parameter in entry.model.parameters()]
    inner = entry.model.model.layers[1].mlp.down_proj
    with pytest.raises(tt.TargetError, match="no module or role is called 'q_porj'"):
        tt.attach(entry.model, tt.LoRA(rank=2, targets="q_porj"), name="late")
    with pytest.raises(tt.SettingError, match="rank 4000 is larger than the layer"):
        tt.attach(entry.model, tt.LoRA(rank=4000), name="late")

    def failing(self: tt.Method, leaf: Any, generator: torch.Generator) -> None:
        if leaf.target is inner:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(type(tt.LoRA(rank=2)), "initialise", failing)
    with pytest.raises(RuntimeError, match="out of memory"):  # after half of the leaves are in place
        tt.attach(entry.model, tt.LoRA(rank=2), name="late")
    assert same_state(entry.model, before)
    assert [type(module) for module in entry.model.modules()] == classes
    assert [parameter.requires_grad for parameter in entry.model.parameters()] == wanting
    assert list(tt.adapters(entry.model)) == (["earlier"] if earlier else [])
    assert torch.equal(entry.output(), output)


def test_attaching_inside_an_attached_model_stops() -> None:
    entry = ZOO["llama"](0, 0.0)
    tt.attach(entry.model, tt.LoRA(rank=2))
    with pytest.raises(tt.AttachError, match="belongs to an attachment of another root"):
        tt.attach(entry.model.model, tt.LoRA(rank=2), name="inner")


# Several processes


def test_ddp_and_fsdp2_train_like_one_process() -> None:
    jobs = [
        (tt.LoRA(rank=2), zoo_case("llama")),
        (tt.Compose(tt.LoRA(rank=2, targets="mlp"), tt.BitFit()), zoo_case("bert")),
        (tt.PrefixTuning(length=2), zoo_case("gpt2")),
        (tt.LoRA(rank=2, targets="all-linear | experts"), zoo_case("mixtral")),
        (tt.LoRA(rank=2), zoo_case("torch_encoder")),
    ]
    outcomes = trains_distributed(jobs)
    assert [str(outcome) for outcome in outcomes if outcome.result != "held"] == []
    assert len(outcomes) == 2 * len(jobs)


def refused_actions(rank: int, folder: str) -> list[str]:
    """Return what every action that must stop says; saves what may be saved."""
    said = []

    def expect(action: Callable[[], object]) -> None:
        try:
            action()
        except tt.TrimtabError as error:
            said.append(str(error))
        else:
            said.append("went through")

    wrapped = nn.parallel.DistributedDataParallel(ZOO["mlp"](0, 0.0).model)
    expect(lambda: tt.attach(wrapped, tt.LoRA(rank=2)))
    sharded = ZOO["llama"](0, 0.0).model
    shard(sharded)
    expect(lambda: tt.attach(sharded, tt.LoRA(rank=2)))
    entry: ZooModel = ZOO["llama"](0, 0.0)
    adapter = moved(entry.model, tt.LoRA(rank=2))
    shard(entry.model)
    expect(adapter.detach)
    expect(lambda: adapter.merge())
    adapter.save(f"{folder}/of{rank}/adapter.safetensors")
    return said


def refusals(rank: int, folder: str) -> None:
    """In each process: everything that must stop on a wrapped or sharded model stops; saving works. Writes all down."""
    with process_group(rank, folder):
        said = refused_actions(rank, folder)
    if rank == 0:
        Path(folder, "said.txt").write_text("\n".join(said), encoding="utf-8")


def test_wrapped_and_sharded_models_are_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(refusals, args=(folder,), nprocs=WORLD)
        wrapped, sharded, detached, merged = Path(folder, "said.txt").read_text(encoding="utf-8").splitlines()
        files = [Path(folder, f"of{rank}", "adapter.safetensors") for rank in range(WORLD)]
        assert files[0].read_bytes() == files[1].read_bytes()
        entry = ZOO["llama"](0, 0.0)
        saved = tt.load(entry.model, files[0])
    assert wrapped.startswith("cannot attach an adapter to a model that is already distributed (the root).")
    assert sharded.startswith("cannot attach an adapter to a model that is already distributed")
    assert "Attach before DistributedDataParallel or fully_shard." in sharded
    assert detached.startswith("cannot detach an adapter from a model that is already distributed")
    assert merged.startswith("cannot merge an adapter into a model that is already distributed")
    never_sharded = moved(ZOO["llama"](0, 0.0).model, tt.LoRA(rank=2))
    for (_, found, _), (_, expected, _) in zip(saved.named_tensors(), never_sharded.named_tensors(), strict=True):
        assert torch.equal(found, expected)
