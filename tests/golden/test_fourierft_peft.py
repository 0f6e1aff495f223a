"""FourierFT against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import transformers

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_starts_as_in_peft,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    reshaped,
    twins,
)

peft = pytest.importorskip("peft")

# Not the head: a frequency that is constant over the classes has no gradient, and Adam would train rounding errors.
PLACES = ("linear", "transposed")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.spectrum, layer.fourierft_spectrum["default"])]


def test_fourierft_trains_and_merges_as_in_peft() -> None:
    """The places are drawn by the same generator; peft's transform is in float32 whatever the base."""
    method = trimtab.FourierFT(frequencies=9, scale=30.0, location_seed=5, initial="zero", targets=" | ".join(PLACES))
    config = peft.FourierFTConfig(
        n_frequency=9, scaling=30.0, random_loc_seed=5, init_weights=True, target_modules=list(PLACES)
    )
    beside = beside_peft(method, config, PLACES, pairs_at, torch.float32)
    assert_starts_as_in_peft(beside)
    for place in PLACES:
        layer, leaf = beside.wrapped.base_model.model.get_submodule(place), leaf_at(beside.adapter, place)
        rows, columns = layer.indices["default"]
        ours = leaf.shared(f"places_{leaf.site.out_features}x{leaf.site.in_features}").long()
        assert torch.equal(ours, rows * leaf.site.in_features + columns)
    assert_trains_and_merges_as_in_peft(beside, PLACES, 5e-6)


def test_the_update_is_the_sum_of_cosines() -> None:
    """ΔW[j, k] = s/(out·in)·Σ c·cos(2π(j·u/out + k·v/in)) over the entries c at (u, v)."""
    _, adapter, _ = twins(trimtab.FourierFT(frequencies=5, scale=3.0, targets="linear"))
    leaf = leaf_at(adapter, "linear")
    j, k = torch.arange(12.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
    expected = torch.zeros(12, 8, dtype=torch.float64)
    for place, c in zip(leaf.shared("places_12x8").tolist(), leaf.spectrum, strict=True):
        expected += 3.0 / 96 * c.detach() * torch.cos(2 * torch.pi * (j * (place // 8) / 12 + k * (place % 8) / 8))
    torch.testing.assert_close(leaf.method.delta(leaf), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("initial", ["normal", "zero"])
def test_gradients_are_those_of_differences(initial: Literal["normal", "zero"]) -> None:
    assert_gradients_are_those_of_differences(
        trimtab.FourierFT(frequencies=6, scale=20.0, initial=initial, targets="linear")
    )


def test_the_count_is_that_of_the_paper() -> None:
    """RoBERTa-base, query and value, n = 1000: the paper prints 0.024 million."""
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=100))
    assert trimtab.plan(model, trimtab.FourierFT(targets="query | value")).trainable == 24_000


def test_more_entries_than_the_weight_has_are_refused() -> None:
    with pytest.raises(trimtab.SettingError, match=r"frequencies=97\): 'linear:weight' of shape 12×8 has fewer"):
        twins(trimtab.FourierFT(frequencies=97, targets="linear"))
