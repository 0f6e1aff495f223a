"""RoAd against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any

import pytest

import trimtab
from golden.peft_models import (
    Pair,
    assert_gradients_are_those_of_differences,
    assert_starts_as_in_peft,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    reshaped,
    twins,
)

peft = pytest.importorskip("peft")


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.theta, layer.road_theta["default"]), reshaped(leaf.alpha, layer.road_alpha["default"])]


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_road_trains_and_merges_as_in_peft(variant: int, group_size: int) -> None:
    """The bias is rotated with the weight, in the output and in the merged layer."""
    method = trimtab.RoAd(variant=variant, group_size=group_size, targets="linear")
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=group_size, target_modules=["linear"])
    beside = beside_peft(method, config, ("linear",), pairs_at)
    assert beside.adapter.trainable_count == 12 * variant
    assert_starts_as_in_peft(beside)
    assert_trains_and_merges_as_in_peft(beside, ("linear",))


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_gradients_are_those_of_differences(variant: int) -> None:
    assert_gradients_are_those_of_differences(trimtab.RoAd(variant=variant, group_size=4, targets="linear"))


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(trimtab.SettingError, match=r"RoAd: the width 12 of 'linear:weight' .* is not a multiple of 8"):
        twins(trimtab.RoAd(group_size=8, targets="linear"))
    with pytest.raises(trimtab.SettingError, match="take an even size"):
        twins(trimtab.RoAd(group_size=3, targets="linear"))
