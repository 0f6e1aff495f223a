"""Real quantised bases, beside what the contract's matrix proves on them: their storage, and what it is refused for."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.quantized import dense_weight, is_packed
from zoo import STORED

PACKED = ("llama_nf4", "llama_int8", "llama_torchao")
PATH = "model.layers.0.mlp.up_proj"


def packed_map(name: str) -> Any:
    return STORED[name](0, 0.0).model.get_submodule(PATH)


def on_this_processor(module: Any) -> None:
    """As on a processor with AVX512-BF16, where bitsandbytes repacks at the first forward in evaluation mode."""
    module.support_avx512bf16_for_cpu = True


def product(module: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(5, 64 if dense_weight(module).shape[1] == 64 else 32)
    return module(x), x @ dense_weight(module).T


@pytest.mark.parametrize("name", ["llama_nf4", "llama_torchao"])
def test_the_numbers_of_a_packed_weight_are_those_it_multiplies_by(name: str) -> None:
    module = packed_map(name)
    assert is_packed(module)
    torch.testing.assert_close(*product(module), rtol=1e-5, atol=1e-5)


def test_eight_bits_of_bitsandbytes_round_the_input_too() -> None:
    found, expected = product(packed_map("llama_int8"))
    assert 1e-4 < float((found - expected).abs().max() / expected.abs().max()) < 0.05


@pytest.mark.parametrize("name", ["llama_nf4", "llama_int8"])
def test_numbers_survive_pickling_which_drops_the_class_of_the_weight(name: str) -> None:
    module = packed_map(name)
    restored = pickle.loads(pickle.dumps(module))
    assert type(restored.weight) is nn.Parameter
    assert is_packed(restored)
    assert torch.equal(dense_weight(restored), dense_weight(module))


def test_integers_without_scales_are_refused() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(tt.AttachError, match=r"the weight of a Linear is stored as torch\.uint8, which cannot be read"):
        dense_weight(module)


def repacked(model: nn.Module) -> None:
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            quant_state: Any = module.weight.quant_state  # type: ignore[union-attr]
            quant_state.packing_format_for_cpu = True


def test_a_weight_that_was_repacked_for_inference_is_refused() -> None:
    model = STORED["llama_nf4"](0, 0.0).model
    repacked(model)
    text = r"repacked the 4-bit weight of 'model\.layers\.0\.self_attn\.q_proj'.*attach before the first forward"
    with pytest.raises(tt.AttachError, match=text):
        tt.attach(model, tt.LoRA(rank=2))
    with pytest.raises(tt.AttachError, match=r"repacked the 4-bit weight of a Linear4bit"):
        tt.plan(model, tt.SVFit(energy=0.5))


def test_no_weight_is_repacked_while_an_adapter_is_attached() -> None:
    entry = STORED["llama_nf4"](0, 0.0)
    maps: list[Any] = [m for m in entry.model.modules() if "support_avx512bf16_for_cpu" in m.__dict__]
    for module in maps:
        on_this_processor(module)
    before = [module.weight.data.clone() for module in maps]
    adapter = tt.attach(entry.model, tt.LoRA(rank=2))
    with torch.no_grad():
        entry.output()
    assert all(torch.equal(module.weight.data, old) for module, old in zip(maps, before, strict=True))
    assert not any(module.support_avx512bf16_for_cpu for module in maps)
    adapter.detach()
    assert all(module.support_avx512bf16_for_cpu for module in maps)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("method", [tt.LoRA(rank=2), tt.IA3(), tt.SSF()])
def test_merging_into_a_packed_weight_is_refused(name: str, method: tt.Method) -> None:
    adapter = tt.attach(STORED[name](0, 0.0).model, method)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(tt.AttachError, match="is stored quantised: merging would round the change away"):
        adapter.merge(untie=True)
