"""Gallery of pains, 16 to 23: saving, loading and resuming.

Each test does what the users of the thread in its name did; `tests/gallery.py` makes docs/pains.md from these tests.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from reliability_parts.hostile import sealed
from torch import nn

import trimtab as tt
from adapting import moved, same_state, state
from test_training_loop import Stop, crash_at, fit, make_adapter, state_hash
from trimtab.adapter_file import file_bytes, read_adapter_file
from trimtab.training.loop import LoopSettings
from zoo import HIDDEN, VOCABULARY, ZOO


def deep_llama() -> nn.Module:
    """More layers than a fingerprint that looks at some tensors would look at."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=24, num_attention_heads=2, intermediate_size=24
    )
    return transformers.LlamaForCausalLM(config).eval()


def rewrite_header(file: Path, **changes: object) -> None:
    """Change entries of the header of an adapter file and seal it again with a right checksum, as nobody does."""
    header, tensors = read_adapter_file(file)
    text = json.dumps(header | changes | {"sha256": "0" * 64}, separators=(",", ":"), ensure_ascii=False)
    file.write_bytes(sealed(file_bytes(tensors, {"trimtab": text})))


def test_peft_286_what_was_trained_is_what_the_file_holds(tmp_path: Path) -> None:
    """16. An empty adapter of 443 bytes is saved, without an error.

    A file is written whole, read back and compared; it holds every trained number, or there is no file.
    Threads: peft#286, alpaca-lora#293, alpaca-lora#363, alpaca-lora#446, transformers#24551
    """
    entry = ZOO["llama"](0, 0.0)
    adapter = moved(entry.model, tt.LoRA(rank=2))
    expected = {name: tensor.detach().clone() for name, tensor in adapter.named_parameters()}
    _, tensors = read_adapter_file(adapter.save(tmp_path))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_peft_1443_a_tensor_without_its_numbers_stops_the_save(tmp_path: Path) -> None:
    """17. Under ZeRO-3 tensors of size zero are saved, and only loading finds out.

    A tensor whose shape is not the planned one is an error when it is saved; nothing is written.
    Threads: peft#1443, peft#1328, peft#1710, peft#2071, DeepSpeed#4295, LlamaFactory#852
    """
    adapter = moved(ZOO["llama"](0, 0.0).model, tt.LoRA(rank=2))
    next(adapter.parameters()).data = torch.empty(0)  # as ZeRO-3 leaves a parameter that it has partitioned
    with pytest.raises(tt.AdapterFileError, match=r"q_proj:weight/A' has shape \(0,\), not \(2, 32\); gather it"):
        adapter.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def other_weights() -> nn.Module:
    return ZOO["llama"](1, 0.0).model


def fewer_layers() -> nn.Module:
    model = ZOO["llama"](0, 0.0).model
    model.model.layers = model.model.layers[:1]
    return model


def one_other_weight() -> nn.Module:
    model = ZOO["llama"](0, 0.0).model
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1e-3)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (other_weights, "was trained on another base model: the weights of '.*' are other ones"),
        (one_other_weight, r"the weights of 'model\.layers\.1\.mlp\.down_proj:weight' are other ones"),
        (
            fewer_layers,
            r"this model has no 'model\.layers\.1\.self_attn\.q_proj' \(7 of 14 places are missing\)",
        ),
    ],
)
def test_peft_2118_another_base_is_refused(build: object, message: str, tmp_path: Path) -> None:
    """18. Missing keys are a warning and the adapter a no-op; another base of the same shape is accepted.

    Loading is strict: the file knows the values of its base and the list of its tensors; nothing is left attached.
    Threads: peft#2118, peft#2084, peft#1932, peft#2566, peft#2699, sentence-transformers#3865
    """
    moved(ZOO["llama"](0, 0.0).model, tt.LoRA(rank=2), "lora").save(tmp_path)
    model = build()  # type: ignore[operator]
    before = state(model)
    with pytest.raises(tt.AdapterFileError, match=message):
        tt.load(model, tmp_path)
    assert tt.adapters(model) == {}
    assert same_state(model, before)
    assert tt.load(ZOO["llama"](0, 0.0).model, tmp_path).name == "lora"  # a name that peft took for its own prefix


@pytest.mark.parametrize("target", ["query", "key", "value", "attention-output", "mlp-output", "norm"])
def test_peft_2118_every_weight_of_a_deep_base_is_known(target: str, tmp_path: Path) -> None:
    """18. Another base of the same shape is accepted.

    Every weight counts, also where a model has hundreds of them.
    Threads: peft#2118
    """
    base = deep_llama()
    moved(copy.deepcopy(base), tt.LoRA(rank=2)).save(tmp_path)
    method = tt.LNTuning() if target == "norm" else tt.LoRA(rank=2, targets=f"{target}[13:14]")
    moved(base, method).merge()
    tt.adapters(base)["default"].detach(keep_merged=True)
    with pytest.raises(tt.AdapterFileError, match=r"the weights of '.*' are other ones"):
        tt.load(base, tmp_path)


def test_peft_2118_a_merged_adapter_is_saved_for_its_own_base(tmp_path: Path) -> None:
    """18. An adapter acts twice: on a base that it is already merged into.

    A file names the base itself, also when it is saved while the adapter is merged.
    Threads: peft#2118, peft#2764
    """
    entry = ZOO["llama"](0, 0.0)
    base = copy.deepcopy(entry.model)
    adapter = moved(entry.model, tt.LoRA(rank=2))
    beside = entry.output()
    adapter.merge()
    adapter.save(tmp_path)
    tt.load(base, tmp_path)
    assert torch.equal(entry.output(base), beside)
    adapter.detach(keep_merged=True)
    with pytest.raises(tt.AdapterFileError, match=r"another base model: the weights of '.*' are other ones"):
        tt.load(entry.model, tmp_path)


def test_transformers_24354_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    """19. A resumed run jumps or restarts.

    One checkpoint holds adapter, schedule, optimizer and random states: the resumed run ends in the same bits.
    Threads: transformers#24354, transformers#35850, LlamaFactory#512, LlamaFactory#5218, alpaca-lora#72
    """
    settings = LoopSettings(lr=1e-2, steps=6, batch_size=4, warmup=0.3, checkpoint_every=1)
    method = tt.AdaLoRA(rank=2, initial_rank=3, warmup_steps=1, final_steps=2, interval=1, dropout=0.1)
    whole = make_adapter(0.2, method)
    expected = fit(whole, settings, output=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(make_adapter(0.2, method), settings, output=tmp_path / "cut", on_progress=crash_at(3))
    resumed = make_adapter(0.2, method)
    torch.manual_seed(99)
    result = fit(resumed, settings, output=tmp_path / "cut", resume=True)
    assert result.resumed_from == 3
    assert result.final_loss == expected.final_loss
    assert state_hash(resumed) == state_hash(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"has format 2, this version reads .*1; upgrade trimtab"),
        ({"method": {"name": "LoRA", "settings": {"rank": 2, "sparsity": 0.5}}}, "LoRA has no setting 'sparsity'"),
        ({"method": {"name": "LoRAXS", "settings": {}}}, "there is no method 'LoRAXS'. Did you mean"),
    ],
    ids=["format", "setting", "method"],
)
def test_peft_2275_a_file_of_a_newer_version_says_so(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    """20. A configuration that a newer version wrote cannot be opened, or is opened as something else.

    A file holds only what differs from the defaults; what is not understood and changes the meaning stops by name.
    Threads: peft#2275, peft#1979, LlamaFactory#2696, textgen#6819
    """
    file = moved(ZOO["llama"](0, 0.0).model, tt.LoRA(rank=2)).save(tmp_path)
    assert read_adapter_file(file)[0]["method"] == {"name": "LoRA", "settings": {"rank": 2}}
    rewrite_header(file, **changes)
    with pytest.raises(tt.AdapterFileError, match=message):
        tt.load(ZOO["llama"](0, 0.0).model, tmp_path)


def test_peft_1457_tables_of_other_sizes_are_never_mixed(tmp_path: Path) -> None:
    """21. New tokens: a size mismatch on load, or an adapter cut off when the table grows.

    Growing a table under an adapter is refused before it; grown first, the adapter trains, saves and loads, and the
    file does not hold the table.
    Threads: peft#1457, peft#1554, peft#2415
    """
    entry = ZOO["mixtral"](0, 0.0)
    tt.attach(entry.model, tt.LoRA(rank=2, targets="embedding | head"))
    with pytest.raises(tt.AttachError, match="resizing would cut off the adapter at the embedding or the head"):
        entry.model.resize_token_embeddings(VOCABULARY + 6)
    tt.adapters(entry.model)["default"].detach()
    entry.model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    base = copy.deepcopy(entry.model)
    adapter = moved(entry.model, tt.LoRA(rank=2, targets="embedding | head"))
    file = adapter.save(tmp_path)
    assert sum(tensor.numel() for tensor in read_adapter_file(file)[1].values()) == 2 * 2 * (VOCABULARY + 6 + HIDDEN)
    new = {"input_ids": torch.full((1, 3), VOCABULARY + 5)}
    tt.load(base, tmp_path)
    assert torch.equal(entry.output(base, new), entry.output(entry.model, new))
    with pytest.raises(tt.AdapterFileError, match=r"has shape \[64, 32\], the adapter's base has \[70, 32\]"):
        tt.load(ZOO["mixtral"](0, 0.0).model, tmp_path)


def test_peft_3227_frozen_random_parts_are_a_seed(tmp_path: Path) -> None:
    """22. Adapter files are larger than the idea: 42 GB of random bases.

    Frozen random parts are kept as a seed and checked by hash; a file holds the trained numbers.
    Threads: peft#3227, peft#3714
    """
    entry = ZOO["llama"](0, 0.0)
    adapter = moved(entry.model, tt.RandLoRA(rank=2))
    held = sum(tensor.numel() for _, tensor, _ in adapter.named_tensors())
    _, tensors = read_adapter_file(adapter.save(tmp_path))
    written = sum(tensor.numel() for tensor in tensors.values())
    assert written == adapter.trainable_count
    assert held > 1.1 * written
    again = tt.load(ZOO["llama"](0, 0.0).model, tmp_path)
    assert torch.equal(entry.output(again.model), entry.output())


def test_trl_4713_an_adapter_of_a_merged_base_names_what_was_merged(tmp_path: Path) -> None:
    """23. Lineage is lost: an adapter trained on a merged base that was never saved.

    Such an adapter is refused on the base without the merge, and names, with checksums, what was merged.
    Threads: trl#4713, peft#3647
    """
    entry = ZOO["llama"](0, 0.0)
    base = copy.deepcopy(entry.model)
    first = moved(entry.model, tt.LoRA(rank=2), "style")
    numbers = file_bytes(read_adapter_file(first.save(tmp_path / "first"))[1])
    checksum = hashlib.sha256(numbers).hexdigest()
    first.merge()
    first.detach(keep_merged=True)
    second = moved(entry.model, tt.IA3(), "facts")
    file = second.save(tmp_path / "second")
    assert read_adapter_file(file)[0]["lineage"] == [f"style (LoRA, sha256 {checksum})"]
    with pytest.raises(tt.AdapterFileError, match=rf"merged into it, in order: style \(LoRA, sha256 {checksum}\)"):
        tt.load(base, tmp_path / "second")
    merged = tt.load(base, tmp_path / "first")
    merged.merge()
    merged.detach(keep_merged=True)
    tt.load(base, tmp_path / "second")
    assert torch.equal(entry.output(base), entry.output())
