"""Adapters exchanged with peft (huggingface/peft, run live), both ways: same outputs, same bits, refusals by text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import trimtab
from golden.peft_models import TOKENS, Layers, randomise
from trimtab.interop.peft import export_lora, import_adapter
from zoo import ZOO, ZooModel

peft = pytest.importorskip("peft")

PLACES = "embedding | linear | transposed | plain | grouped"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(model: nn.Module, method: trimtab.Method, dtype: torch.dtype = torch.float32) -> trimtab.Adapter:
    """Attach a method whose tensors are as if trained."""
    adapter = trimtab.attach(model, method, dtype=dtype)
    randomise(adapter.parameters())
    return adapter


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    return Layers().to(dtype).eval()


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())  # type: ignore[no-any-return]


def change_config(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | fields))


def saved_by_peft(model: nn.Module, folder: Path, **settings: Any) -> Any:
    """Wrap a model with peft's LoRA, fill every trained tensor, save, and return the wrapped model."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    randomise(parameter for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max())


# Export


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize(
    "method",
    [
        trimtab.LoRA(rank=4, alpha=6.0, targets=PLACES),
        trimtab.LoRA(rank=4, alpha=6.0, rank_stabilized=True, targets=PLACES),
        trimtab.Compose(
            trimtab.LoRA(rank=2, alpha=3.0, targets="linear | grouped"),
            trimtab.LoRA(rank=4, targets="transposed | plain"),
        ),
        trimtab.Compose(trimtab.LoRA(rank=2, alpha=3.0, targets="linear"), trimtab.LoRA(rank=3, targets="linear")),
    ],
    ids=["every layer", "rank stabilised", "two ranks", "two at one place"],
)
def test_peft_loads_an_export_and_computes_the_same(method: trimtab.Method, tmp_path: Path) -> None:
    model = layers(torch.float64)
    bare = copy.deepcopy(model)
    adapter = trained(model, method, torch.float64)
    receipt = export_lora(adapter, tmp_path)
    # peft's own default would round the factors to single precision
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path, autocast_adapter_dtype=False)
    assert difference(model(TOKENS), loaded(TOKENS)) < 1e-12
    with adapter.disabled():
        assert difference(model(TOKENS), loaded(TOKENS)) > 1e-3
    assert receipt.relative_error < 1e-15
    assert config_of(tmp_path)["lora_alpha"] == config_of(tmp_path)["r"] == receipt.rank
    assert set(receipt.modules) == {site.path for part in adapter.parts for site in part.sites}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "clip"])
def test_transformers_exports_load_with_the_shortest_targets(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]()
    bare = copy.deepcopy(entry.model)
    adapter = trained(entry.model, trimtab.LoRA(rank=3, alpha=5.0))
    export_lora(adapter, tmp_path)
    config = config_of(tmp_path)
    assert all("." not in target for target in config["target_modules"])
    assert config["fan_in_fan_out"] == (name == "gpt2")
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    assert difference(entry.output(), entry.output(loaded)) < 1e-5
    assert set(weights(tmp_path)) == set(peft.get_peft_model_state_dict(loaded))


def test_folding_leaves_what_needs_none(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    adapter = trained(entry.model, trimtab.LoRA(rank=3, targets="query"))
    export_lora(adapter, tmp_path)
    written = weights(tmp_path)
    for leaf in adapter.leaves():
        start = f"base_model.model.{leaf.site.path}.lora_"
        assert torch.equal(written[f"{start}A.weight"], leaf.A)
        assert torch.equal(written[f"{start}B.weight"], leaf.B)


def test_a_head_trained_whole_is_saved_whole(tmp_path: Path) -> None:
    entry = ZOO["bert"]()
    bare = copy.deepcopy(entry.model)
    adapter = trained(
        entry.model, trimtab.Compose(trimtab.LoRA(rank=2, targets="query"), trimtab.FullTuning(targets="head"))
    )
    receipt = export_lora(adapter, tmp_path)
    assert receipt.modules_to_save == ("classifier",)
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    assert difference(entry.output(), entry.output(loaded)) < 1e-5
    with adapter.disabled():
        assert difference(entry.output(), entry.output(loaded)) > 0.01


def test_ambiguous_names_are_written_as_paths(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    bare = copy.deepcopy(entry.model)
    adapter = trained(entry.model, trimtab.LoRA(rank=2, targets="query[0:1]"))
    export_lora(adapter, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    assert difference(entry.output(), entry.output(loaded)) < 1e-5


def test_a_full_rank_change_is_approximated_and_the_error_stated(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    bare = copy.deepcopy(entry.model)
    adapter = trained(entry.model, trimtab.DoRA(rank=2))
    with pytest.raises(
        trimtab.SettingError, match=r"DoRA does not give its change of '.*' as a product of two factors"
    ):
        export_lora(adapter, tmp_path)
    coarse = export_lora(adapter, tmp_path / "coarse", rank=4)
    fine = export_lora(adapter, tmp_path / "fine", rank=32)
    assert 0.01 < coarse.relative_error <= coarse.worst_error
    assert fine.relative_error < 1e-5
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "fine").eval()
    assert difference(entry.output(), entry.output(loaded)) < 1e-4


def test_the_stated_error_is_that_of_the_written_numbers(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    adapter = trained(entry.model, trimtab.LoRA(rank=6, alpha=9.0, targets="query[0:1]"))
    receipt = export_lora(adapter, tmp_path, rank=4)
    (leaf,) = adapter.leaves()
    start = f"base_model.model.{leaf.site.path}.lora_"
    written = weights(tmp_path)[f"{start}B.weight"] @ weights(tmp_path)[f"{start}A.weight"]
    wanted = leaf.method.delta(leaf).detach()
    values = torch.linalg.svdvals(wanted)
    assert receipt.relative_error == pytest.approx(float((written - wanted).norm() / wanted.norm()), rel=1e-4)
    assert receipt.relative_error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)


# Import


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"linear": 3}, "alpha_pattern": {"transposed": 5, "^linear": 2}},
        {"r": 4, "lora_alpha": 6, "modules_to_save": ["head"]},
    ],
    ids=["lora", "rank stabilised", "patterns", "head"],
)
def test_a_saved_peft_lora_is_read_with_the_same_outputs(settings: dict[str, Any], tmp_path: Path) -> None:
    model = layers()
    targets = ["embedding", "linear", "transposed", "plain"]
    wrapped = saved_by_peft(copy.deepcopy(model), tmp_path, target_modules=targets, **settings)
    base = model(TOKENS)
    adapter = import_adapter(model, tmp_path, name="theirs")
    assert adapter.name == "theirs"
    assert difference(model(TOKENS), wrapped(TOKENS)) < 1e-5
    assert difference(model(TOKENS), base) > 0.01
    adapter.detach()
    assert torch.equal(model(TOKENS), base)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_grouped_convolution_is_read_where_it_stays_within_its_groups(tmp_path: Path) -> None:
    model = layers()
    adapter = trained(model, trimtab.LoRA(rank=4, targets="grouped"))
    export_lora(adapter, tmp_path / "ours")
    own = [tensor.clone() for tensor in adapter.parameters()]
    adapter.detach()
    back = import_adapter(model, tmp_path / "ours")
    assert all(torch.equal(*pair) for pair in zip(own, back.parameters(), strict=True))
    back.detach()
    saved_by_peft(copy.deepcopy(model), tmp_path / "theirs", r=4, target_modules=["grouped"])
    with pytest.raises(
        trimtab.AdapterFileError, match=r"'grouped' is a convolution with groups, and the A trained there"
    ):
        import_adapter(model, tmp_path / "theirs")
    assert not trimtab.adapters(model)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_saved_peft_dora_is_read_with_the_same_outputs(tmp_path: Path) -> None:
    model = layers()
    targets = ["embedding", "linear", "transposed", "plain"]
    wrapped = saved_by_peft(copy.deepcopy(model), tmp_path, r=4, lora_alpha=6, use_dora=True, target_modules=targets)
    import_adapter(model, tmp_path)
    assert difference(model(TOKENS), wrapped(TOKENS)) < 1e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear"), ("bert", ["query", "value"])]
)
def test_from_peft_and_back_is_bit_equal(name: str, targets: Any, tmp_path: Path) -> None:
    entry = ZOO[name]()
    saved_by_peft(copy.deepcopy(entry.model), tmp_path / "theirs", r=4, lora_alpha=4, target_modules=targets)
    adapter = import_adapter(entry.model, tmp_path / "theirs")
    export_lora(adapter, tmp_path / "ours")
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert set(theirs) == set(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_from_us_to_peft_and_back_is_bit_equal(tmp_path: Path) -> None:
    entry = ZOO["bert"]()
    bare, again = copy.deepcopy(entry.model), copy.deepcopy(entry.model)
    method = trimtab.Compose(trimtab.LoRA(rank=2), trimtab.FullTuning(targets="classifier"))
    adapter = trained(entry.model, method)
    export_lora(adapter, tmp_path / "ours")
    peft.PeftModel.from_pretrained(bare, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = import_adapter(again, tmp_path / "theirs")
    ours = {name.partition("/")[2]: tensor for name, tensor, _ in adapter.named_tensors()}
    theirs = {name.partition("/")[2]: tensor for name, tensor, _ in back.named_tensors()}
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_import_is_frozen_unless_it_goes_on_training(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    saved_by_peft(copy.deepcopy(entry.model), tmp_path, r=2, lora_dropout=0.5, target_modules=["q_proj"])
    frozen = import_adapter(entry.model, tmp_path, name="frozen")
    assert not frozen.trainable
    assert not any(leaf.training for leaf in frozen.leaves())
    going_on = import_adapter(entry.model.train(), tmp_path, name="going-on", trainable=True)
    assert going_on.trainable
    assert all(leaf.training for leaf in going_on.leaves())
    assert {leaf.method.dropout for leaf in going_on.leaves()} == {0.5}


def test_one_rank_and_alpha_is_one_method_and_several_are_a_composition(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    targets = ["q_proj", "v_proj"]
    saved_by_peft(copy.deepcopy(entry.model), tmp_path / "one", r=2, target_modules=targets)
    patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}}
    saved_by_peft(copy.deepcopy(entry.model), tmp_path / "several", r=2, target_modules=targets, **patterns)
    assert type(import_adapter(entry.model, tmp_path / "one", "one").method) is trimtab.LoRA
    several = import_adapter(entry.model, tmp_path / "several", "several")
    assert sorted((part.method.rank, part.method.alpha) for part in several.parts) == [(2, 5.0), (2, 8.0), (3, 8.0)]


def test_an_import_can_be_saved_and_loaded(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    wrapped = saved_by_peft(copy.deepcopy(entry.model), tmp_path / "theirs", r=2, target_modules=["q_proj"])
    adapter = import_adapter(entry.model, tmp_path / "theirs")
    adapter.save(tmp_path / "ours")
    adapter.detach()
    trimtab.load(entry.model, tmp_path / "ours")
    assert difference(entry.output(), entry.output(wrapped)) < 1e-5


def test_layers_to_transform_is_understood(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    settings = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    wrapped = saved_by_peft(copy.deepcopy(entry.model), tmp_path, **settings)
    adapter = import_adapter(entry.model, tmp_path)
    assert [leaf.site.path for leaf in adapter.leaves()] == ["model.layers.1.self_attn.q_proj"]
    assert difference(entry.output(), entry.output(wrapped)) < 1e-5


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_copies_of_the_bases_embedding_are_skipped_and_other_ones_refused(tmp_path: Path) -> None:
    entry = ZOO["llama"]()
    wrapped = saved_by_peft(copy.deepcopy(entry.model), tmp_path, r=2, target_modules=["embed_tokens"])
    assert any(name.endswith("base_layer.weight") for name in weights(tmp_path))
    import_adapter(entry.model, tmp_path).detach()
    import_adapter(entry.model, tmp_path)
    assert difference(entry.output(), entry.output(wrapped)) < 1e-5
    other = ZOO["llama"](seed=1).model
    with pytest.raises(trimtab.AdapterFileError, match=r"'model\.embed_tokens\.base_layer\.weight' is no LoRA's"):
        import_adapter(other, tmp_path)


# Refusals


@pytest.fixture
def llama() -> ZooModel:
    return ZOO["llama"]()


def saved(entry: ZooModel, folder: Path, **settings: Any) -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
    saved_by_peft(copy.deepcopy(entry.model), folder, **settings)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    safetensors.torch.save_file(change(weights(folder)), folder / WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config.json: has peft_type 'IA3'; only 'LORA' can be read\."),
        ({"lora_bias": True}, r"the field 'lora_bias' is True; it changes what the adapter computes, or is not known"),
        ({"bias": "lora_only"}, r"the field 'bias' is 'lora_only'; it changes what the adapter computes"),
        ({"trainable_token_indices": [1]}, r"the field 'trainable_token_indices' is \[1\]"),
        ({"layer_replication": [[0, 2]]}, r"the field 'layer_replication' is \[\[0, 2\]\]"),
        ({"a_field_of_tomorrow": 3}, r"the field 'a_field_of_tomorrow' is 3; .* Merge the adapter with peft"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' changes the base before training"),
        ({"r": "4"}, r"the field 'r' is '4', which is not of its type\."),
        ({"r": True}, r"the field 'r' is True, which is not of its type\."),
        ({"r": 3}, r"the tensors of '.*q_proj' have rank 4, adapter_config.json says 3\."),
        ({"lora_alpha": 0}, r"does not fit this model: LoRA\(alpha=0.0\): must be above 0"),
        ({"use_dora": True}, r"the tensor 'lora_magnitude_vector' of '.*q_proj' is missing\."),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, r"selects '.*k_proj', but its tensors are missing\."),
        ({"target_modules": ["q_proj"]}, r"holds tensors of '.*v_proj', which adapter_config.json does not select\."),
        ({"modules_to_save": ["score"]}, r"modules_to_save names 'score', which this model has not\."),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(
    llama: ZooModel, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(llama, tmp_path)
    change_config(tmp_path, **fields)
    keys = list(llama.model.state_dict())
    with pytest.raises(trimtab.AdapterFileError, match=message):
        import_adapter(llama.model, tmp_path)
    assert list(llama.model.state_dict()) == keys
    assert not trimtab.adapters(llama.model)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if k != f"{QUERY}.lora_B.weight"},
            r"'lora_B' of '.*0.*q_proj' is missing",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "v_proj" not in k},
            r"selects '.*v_proj', but its tensors are missing",
        ),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(32)}, r"'model.norm.weight' is no LoRA's"),
        (lambda t: t | {f"{QUERY}.lora_C.weight": torch.ones(1)}, r"this model has no module '.*q_proj.lora_C'"),
        (lambda t: t | {f"{QUERY}.lora_magnitude_vector": torch.ones(32)}, r"says use_dora=false"),
        (lambda t: t | {"stranger": torch.ones(1)}, r"the tensor 'stranger' does not begin with 'base_model.model.'"),
        (lambda t: t | {f"{QUERY}.lora_B.weight": torch.full((32, 4), torch.nan)}, r"'.*lora_B.weight' holds NaN"),
        (
            lambda t: t | {f"{QUERY}.lora_B.weight": torch.ones(16, 4)},
            r"has shape \(16, 4\), this model needs \(32, 4\)",
        ),
        (
            lambda t: t | {f"{QUERY}.lora_B.weight": torch.ones(4, 32)},
            r"has shape \(4, 32\), this model needs \(32, 4\)",
        ),
    ],
    ids=["half", "module", "foreign", "unknown", "magnitude", "prefix", "nan", "shape", "transposed"],
)
def test_tensors_that_do_not_fit_are_refused(
    llama: ZooModel, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    saved(llama, tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(trimtab.AdapterFileError, match=message):
        import_adapter(llama.model, tmp_path)
    assert not trimtab.adapters(llama.model)


def test_files_that_cannot_be_read_are_refused(llama: ZooModel, tmp_path: Path) -> None:
    with pytest.raises(trimtab.AdapterFileError, match=r"adapter_config.json: cannot be read \(No such file"):
        import_adapter(llama.model, tmp_path)
    saved(llama, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(trimtab.AdapterFileError, match=r"is not a readable safetensors file"):
        import_adapter(llama.model, tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(trimtab.AdapterFileError, match=r"adapter_model.bin is a pickle file, which can run any code"):
        import_adapter(llama.model, tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(trimtab.AdapterFileError, match=r"adapter_config.json: is not JSON"):
        import_adapter(llama.model, tmp_path)


def test_an_adapter_of_another_model_names_the_nearest_module(llama: ZooModel, tmp_path: Path) -> None:
    saved(llama, tmp_path)
    with pytest.raises(
        trimtab.AdapterFileError, match=r"this model has no module 'model\.layers\.0\.self_attn\.q_proj'"
    ):
        import_adapter(ZOO["bert"]().model, tmp_path)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "llama",
            trimtab.PrefixTuning(length=2),
            r"PrefixTuning cannot be written as a LoRA: it does not change weights",
        ),
        (
            "llama",
            trimtab.PromptTuning(length=2),
            r"PromptTuning cannot be written as a LoRA: it does not change weights",
        ),
        (
            "llama",
            trimtab.PfeifferAdapter(bottleneck=4),
            r"PfeifferAdapter cannot be written as a LoRA: it does not change weights\.",
        ),
        (
            "bert",
            trimtab.BitFit(),
            r"BitFit trains bias of '.*' and not all of the module; peft saves whole modules only",
        ),
        ("bert", trimtab.FullTuning(targets="head"), r"adds nothing to a weight: there is no LoRA to write"),
        (
            "mixtral",
            trimtab.LoRA(targets="experts"),
            r"LoRA cannot be written as a LoRA: '.*' is a parameter that no layer",
        ),
        ("tied_embedding", trimtab.FullTuning(targets="head"), r"is tied to a second module; peft would train one"),
    ],
)
def test_what_a_lora_cannot_express_is_refused(name: str, method: trimtab.Method, message: str, tmp_path: Path) -> None:
    adapter = trimtab.attach(ZOO[name]().model, method)
    with pytest.raises(trimtab.AttachError, match=message):
        export_lora(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_exports_overwrite_nothing_and_need_an_unmerged_adapter(llama: ZooModel, tmp_path: Path) -> None:
    adapter = trained(llama.model, trimtab.LoRA(rank=2))
    export_lora(adapter, tmp_path)
    with pytest.raises(trimtab.AdapterFileError, match=r"adapter_config.json exists already and is left as it is"):
        export_lora(adapter, tmp_path)
    adapter.merge()
    with pytest.raises(trimtab.AttachError, match=r"adapter 'default' is merged: unmerge it before exporting it\."):
        export_lora(adapter, tmp_path / "merged")


def test_ranks_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    adapter = trained(layers(), trimtab.LoRA(rank=4, targets="linear | grouped"))
    with pytest.raises(trimtab.SettingError, match=r"export_lora\(rank=0\): must be at least 1\."):
        export_lora(adapter, tmp_path, rank=0)
    with pytest.raises(trimtab.SettingError, match=r"rank 3 cannot be divided among the 2 groups .* a multiple of 2"):
        export_lora(adapter, tmp_path, rank=3)


def test_names_that_end_alike_are_refused_for_whole_modules(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("pre_head", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 2))
    method = trimtab.Compose(trimtab.LoRA(rank=2, targets="pre_head"), trimtab.FullTuning(targets="=head"))
    adapter = trimtab.attach(model, method)
    with pytest.raises(trimtab.AttachError, match=r"would take 'pre_head' for 'head': their names end alike\."):
        export_lora(adapter, tmp_path)


def test_numbers_that_are_not_finite_are_not_written(llama: ZooModel, tmp_path: Path) -> None:
    adapter = trained(llama.model, trimtab.LoRA(rank=2))
    with torch.no_grad():
        next(iter(adapter.parameters()))[0, 0] = torch.inf
    for rank in (None, 1):
        with pytest.raises(trimtab.AdapterFileError, match=r"holds NaN or infinite numbers; nothing was written\."):
            export_lora(adapter, tmp_path / "new", rank=rank)
    assert not (tmp_path / "new").exists()
