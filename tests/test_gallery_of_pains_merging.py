"""Gallery of pains, 12 to 15: merging.

Each test does what the users of the thread in its name did; `tests/gallery.py` makes docs/pains.md from these tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from adapting import moved
from trimtab.contract.quantised import quantised
from zoo import ZOO

NEAR = {"rtol": 1e-4, "atol": 1e-5}


def test_peft_2764_a_merge_that_changes_nothing_stops() -> None:
    """12. The merged model equals the base.

    A merge returns what it changed; one that would change nothing is an error.
    Threads: peft#2764, peft#2502, LlamaFactory#8998, LlamaFactory#6105, unsloth#2009, unsloth#2142, unsloth#611
    """
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, tt.LoRA(rank=2))
    with pytest.raises(tt.AttachError, match="would change nothing: it is still at its start"):
        adapter.merge()
    adapter.detach()
    base = entry.output()
    receipt = moved(entry.model, tt.LoRA(rank=2)).merge(probe=entry.inputs)
    assert len(receipt.parameters) == 14
    assert receipt.relative_change > 0.1
    assert not torch.allclose(entry.output(), base, atol=1e-2)


@pytest.mark.parametrize("method", [tt.LoRA(rank=2), tt.DoRA(rank=2), tt.IA3()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)], ids=["float32", "bfloat16"]
)
def test_unsloth_1267_the_merged_model_is_the_attached_one(
    method: tt.Method, dtype: torch.dtype, largest: float
) -> None:
    """13. The merged model is garbage, or differs from the adapter.

    Merging computes in float32 and rounds once; the receipt holds the largest output difference on a probe batch.
    Threads: unsloth#1267, unsloth#3045, unsloth#5410, LlamaFactory#2505, LlamaFactory#5186, LlamaFactory#9346,
    LlamaFactory#10596, peft#1035, peft#1388
    """
    entry = ZOO["llama"](0, 0.0)
    entry.model.to(dtype)
    weight = entry.model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    original = weight.detach().clone()
    adapter = moved(entry.model, method)
    beside = entry.output()
    leaf = next(leaf for leaf in adapter.leaves() if leaf.target is entry.model.model.layers[0].self_attn.v_proj)
    expected = leaf.edits()[0].value.detach()  # in float32
    receipt = adapter.merge(probe=entry.inputs)
    assert torch.equal(weight, expected.to(dtype))  # rounded once
    assert not torch.equal(weight, original)
    assert receipt.largest_difference is not None
    assert receipt.largest_difference <= largest
    assert float((entry.output() - beside).detach().abs().max()) <= largest


def test_peft_2321_merging_into_quantised_weights_stops() -> None:
    """14. Merging into a 4-bit base rounds the change away, or means something else than expected.

    Such a merge is refused with the reason and the two ways out; the adapter goes on beside the quantised weight.
    Threads: peft#2321, peft#2105, qlora#28
    """
    entry = ZOO["llama"](0, 0.0)
    packed = quantised(lambda: entry.model)
    adapter = moved(packed, tt.LoRA(rank=2))
    beside = entry.output(packed)
    with pytest.raises(tt.AttachError, match=r"stored quantised: merging would round the change away\. Keep"):
        adapter.merge()
    assert torch.equal(entry.output(packed), beside)
    assert not adapter.merged


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied_embedding"])
def test_peft_1750_tied_weights_stay_tied(name: str, tmp_path: Path) -> None:
    """15. Tied weights come apart, or the trained head is thrown away on merge.

    Ties are found by identity and kept through attach, save, load and merge; breaking one needs `untie=True`.
    Threads: peft#1750, peft#2777, peft#2864, unsloth#9331
    """
    entry = ZOO[name](0, 0.0)
    adapter = moved(entry.model, tt.LoRA(rank=2, targets="head"))
    beside = entry.output()
    with pytest.raises(tt.AttachError, match=r"is tied to another weight of the model.*merge\(untie=True\)"):
        adapter.merge()
    adapter.save(tmp_path)
    adapter.detach()
    adapter = tt.load(entry.model, tmp_path)
    adapter.merge(untie=True)
    torch.testing.assert_close(entry.output(), beside, **NEAR)
    adapter.detach()
    holders = [module for module in entry.model.modules() if isinstance(module, nn.Embedding | nn.Linear)]
    table = next(module.weight for module in holders if isinstance(module, nn.Embedding))
    assert sum(module.weight is table for module in holders) == 2
    whole = moved(entry.model, tt.FullTuning(targets="head"))
    both = entry.output()
    whole.merge()  # one weight, trained whole: both of its holders change together
    torch.testing.assert_close(entry.output(), both, **NEAR)
    assert sum(module.weight is table for module in holders) == 2
