"""Arithmetic with adapter files: sums, differences and means of changes as one LoRA, exact where the rank allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import trimtab as tt
from adapting import moved, state
from trimtab.merging.arithmetic import CombineReceipt, combine
from zoo import ZOO, ZooModel

PLACES = "query | mlp"  # as wide as the model, so that its width is every rank
METHODS: dict[str, tt.Method] = {
    "LoRA": tt.LoRA(rank=2, targets=PLACES),
    "DoRA": tt.DoRA(rank=3, targets=PLACES),
    "LoHa": tt.LoHa(rank=2, targets="query"),
    "PiSSA": tt.PiSSA(rank=2, targets=PLACES),
    "OFT": tt.OFT(block_size=8, targets=PLACES),
}
WIDTH = 32


def saved(folder: Path, name: str) -> Path:
    """The file of a trained adapter."""
    return moved(ZOO["llama"](0, 0.0).model, METHODS[name], name, seed=len(name)).save(folder / f"{name}.safetensors")


def weights(entry: ZooModel) -> dict[str, Tensor]:
    return state(entry.model)


def merged(folder: Path, files: list[tuple[str, float]], rank: int) -> tuple[dict[str, Tensor], CombineReceipt]:
    entry = ZOO["llama"](0, 0.0)
    adapter, receipt = combine(entry.model, [(folder / f"{name}.safetensors", factor) for name, factor in files], rank)
    assert adapter.name == "combined"
    adapter.merge(untie=True)
    adapter.detach(keep_merged=True)
    return weights(entry), receipt


def expected(files: list[tuple[str, float]]) -> dict[str, Tensor]:
    """W + Σ factor · (W′ − W), each W′ from merging that adapter alone."""
    base = weights(ZOO["llama"](0, 0.0))
    total = {name: tensor.double() for name, tensor in base.items()}
    for name, factor in files:
        entry = ZOO["llama"](0, 0.0)
        adapter = moved(entry.model, METHODS[name], name, seed=len(name))
        adapter.merge(untie=True)
        adapter.detach(keep_merged=True)
        for key, tensor in weights(entry).items():
            total[key] += factor * (tensor.double() - base[key].double())
    return total


@pytest.mark.parametrize(
    ("files", "rank"),
    [
        ([("LoRA", 1.0)], 2),
        ([("LoRA", 1.0), ("PiSSA", -0.5)], 6),
        ([("LoRA", 0.5), ("LoHa", 0.5)], WIDTH),
        ([("DoRA", 0.25), ("OFT", 2.0), ("LoRA", -1.0)], WIDTH),
    ],
)
def test_the_sum_is_exact_where_the_rank_allows(files: list[tuple[str, float]], rank: int, tmp_path: Path) -> None:
    for name, _ in files:
        saved(tmp_path, name)
    found, receipt = merged(tmp_path, files, rank)
    assert receipt.relative_error < 1e-5
    assert receipt.worst_error < 1e-5
    for name, tensor in expected(files).items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-5)


def test_less_rank_gives_the_nearest_with_its_error(tmp_path: Path) -> None:
    files = [("LoRA", 1.0), ("DoRA", 1.0)]
    for name, _ in files:
        saved(tmp_path, name)
    found, receipt = merged(tmp_path, files, 2)
    base, wanted = weights(ZOO["llama"](0, 0.0)), expected(files)
    missed = total = 0.0
    for name, tensor in wanted.items():
        change = tensor - base[name].double()
        if change.dim() == 2 and change.abs().max() > 0:
            values = torch.linalg.svdvals(change)
            missed += float(values[2:].square().sum())
            total += float(values.square().sum())
            assert torch.linalg.matrix_rank(found[name].double() - base[name].double(), rtol=1e-4) <= 2
    assert receipt.relative_error == pytest.approx((missed / total) ** 0.5, rel=1e-3)
    assert f"in rank 2; relative error {receipt.relative_error:.3g}, at worst" in str(receipt)


def test_heads_are_averaged(tmp_path: Path) -> None:
    files, heads = [], []
    for seed in (1, 2):
        entry = ZOO["bert"](0, 0.0)
        method = tt.Compose(tt.LoRA(rank=2), tt.FullTuning(targets="head"))
        adapter = moved(entry.model, method, f"run{seed}", seed)
        files.append((adapter.save(tmp_path / f"{seed}.safetensors"), 0.5))
        heads.append(dict(adapter.named_parameters())["1/classifier:weight/value"].detach().clone())
    model = ZOO["bert"](0, 0.0).model
    adapter, receipt = combine(model, files, rank=4)
    assert receipt.averaged_whole == ("classifier:weight", "classifier:bias")
    torch.testing.assert_close(dict(adapter.named_parameters())["1/classifier:weight/value"], sum(heads) / 2)
    adapter.detach()
    with pytest.raises(tt.SettingError, match=r"is trained whole.*the factors must sum to 1, found 2"):
        combine(model, [(file, 1.0) for file, _ in files], rank=4)
    assert not tt.adapters(model)


def test_what_is_no_change_of_a_weight_is_refused(tmp_path: Path) -> None:
    entry = ZOO["llama"](0, 0.0)
    file = moved(entry.model, tt.IA3(), "scales", 0).save(tmp_path / "scales.safetensors")
    with pytest.raises(tt.AttachError, match="combine: adapter 'scales' is attached; detach it first"):
        combine(entry.model, [(file, 1.0)], rank=2)
    model = ZOO["llama"](0, 0.0).model
    with pytest.raises(tt.AttachError, match="combine: IA3 cannot be written as a LoRA: it does not change weights"):
        combine(model, [(file, 1.0)], rank=2)
    with pytest.raises(tt.SettingError, match=r"the factor of .* must be a finite number, found nan"):
        combine(model, [(file, float("nan"))], rank=2)
    with pytest.raises(tt.SettingError, match="there is no adapter file to combine"):
        combine(model, [], rank=2)
    lora = saved(tmp_path, "LoRA")
    with pytest.raises(tt.SettingError, match="is larger than the layer"):
        combine(model, [(lora, 1.0)], rank=1000)
    assert not tt.adapters(model)
