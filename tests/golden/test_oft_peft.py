"""OFT against peft (huggingface/peft, run live)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

import trimtab
from golden.peft_models import (
    TOKENS,
    Layers,
    Pair,
    assert_gradients_are_those_of_differences,
    assert_starts_as_in_peft,
    assert_trains_and_merges_as_in_peft,
    beside_peft,
    leaf_at,
    randomise,
    reshaped,
    twins,
)

peft = pytest.importorskip("peft")

ROTATIONS: tuple[tuple[Literal["neumann", "cayley"], int], ...] = (
    ("neumann", 4), ("neumann", 5), ("neumann", 8), ("cayley", 5),
)  # fmt: skip


def pairs_at(leaf: Any, layer: Any) -> list[Pair]:
    return [reshaped(leaf.Q, layer.oft_R["default"].weight)]


@pytest.mark.parametrize("place", ["linear", "head"])
@pytest.mark.parametrize("one_block", [False, True])
@pytest.mark.parametrize(("rotation", "terms"), ROTATIONS)
def test_oft_trains_and_merges_as_in_peft(
    place: str, one_block: bool, rotation: Literal["neumann", "cayley"], terms: int
) -> None:
    method = trimtab.OFT(block_size=4, rotation=rotation, terms=terms, shared_block=one_block, targets=place)
    config = peft.OFTConfig(
        oft_block_size=4,
        block_share=one_block,
        use_cayley_neumann=rotation == "neumann",
        num_cayley_neumann_terms=terms,
        target_modules=[place],
    )
    exact = rotation == "neumann"  # peft's exact rotation is solved with a float32 identity
    beside = beside_peft(method, config, (place,), pairs_at, torch.float64 if exact else torch.float32)
    assert beside.adapter.trainable_count == (1 if one_block else {"linear": 2, "head": 1}[place]) * 6
    assert_starts_as_in_peft(beside)
    assert_trains_and_merges_as_in_peft(beside, (place,), 1e-12 if exact else 2e-6)


def rotation_of(method: trimtab.Method, size: float) -> torch.Tensor:
    """Return R of a layer whose weight is the identity."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    nn.init.eye_(model[0].weight)
    adapter = trimtab.attach(model, method, dtype=torch.float64)
    randomise([leaf_at(adapter, "0").Q])
    with torch.no_grad():
        leaf_at(adapter, "0").Q.mul_(size)
        return model(torch.eye(8, dtype=torch.float64))


def test_rotations_are_orthogonal_and_the_series_tends_to_the_transpose() -> None:
    exact = rotation_of(trimtab.OFT(block_size=4, rotation="cayley", targets="0"), 10.0)
    torch.testing.assert_close(exact @ exact.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    exact = rotation_of(trimtab.OFT(block_size=4, rotation="cayley", targets="0"), 0.2)
    errors = [
        float((rotation_of(trimtab.OFT(block_size=4, terms=terms, targets="0"), 0.2) - exact.T).abs().max())
        for terms in (4, 5, 8, 40)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 1e-2
    assert errors[-1] < 1e-12
    assert (exact - exact.T).abs().max() > 0.05


@pytest.mark.parametrize("rotation", ["neumann", "cayley"])
def test_gradients_are_those_of_differences(rotation: Literal["neumann", "cayley"]) -> None:
    assert_gradients_are_those_of_differences(trimtab.OFT(block_size=4, rotation=rotation, targets="linear"))


def test_peft_s_convolution_does_not_start_at_the_base() -> None:
    """Its patches are folded back by adding what overlaps, so that even R = I is another map."""
    bare = Layers().double()
    expected = bare(TOKENS)
    model, _, _ = twins(trimtab.OFT(block_size=3, targets="plain"))
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-12)
    wrapped = peft.get_peft_model(bare, peft.OFTConfig(oft_block_size=3, target_modules=["plain"]))
    assert (wrapped(TOKENS) - expected).abs().max() > 1e-3


def test_a_block_that_does_not_divide_is_refused_where_peft_takes_another() -> None:
    with pytest.raises(trimtab.SettingError, match=r"OFT: the width 8 of 'linear:weight' .* is not a multiple of 3"):
        twins(trimtab.OFT(block_size=3, targets="linear"))
