"""(IA)³ against huggingface/peft, live: same tensors, same outputs, same path under an optimizer, same counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab as tt
from zoo import ZOO, ZooModel

peft = pytest.importorskip("peft", reason="needs huggingface/peft: pip install 'trimtab[peft]'")

# Regular expressions, since names alone (peft's defaults) would also take BERT's attention output projection.
PLACES = {
    "bert": (r".*\.(key|value)|.*layer\.\d+\.output\.dense", r".*layer\.\d+\.output\.dense"),
    "llama": (r".*\.(k_proj|v_proj|down_proj)", r".*\.down_proj"),
    "t5": (r".*\.(k|v|wo)", r".*\.wo"),
    "vit": (r".*\.(k_proj|v_proj|fc2)", r".*\.fc2"),
}


def pair(name: str) -> tuple[ZooModel, tt.Adapter, ZooModel, dict[str, torch.nn.Parameter]]:
    """The same model twice, adapted here and by peft, with the same random vectors."""
    own, other = ZOO[name](0, 0.0), ZOO[name](0, 0.0)
    targets, feed_forward = PLACES[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feed_forward)
    theirs: Any = peft.get_peft_model(other.model, config)
    vectors = {n: p for n, p in theirs.named_parameters() if "ia3_l" in n}
    adapter = tt.attach(own.model, tt.IA3())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, scale in paths(adapter).items():
            scale.copy_(1.0 + 0.3 * torch.randn(scale.shape, generator=generator))
            vector = vectors[f"base_model.model.{path}.ia3_l.default"]
            vector.copy_(scale.view(vector.shape))
    return own, adapter, other, vectors


def paths(adapter: tt.Adapter) -> dict[str, Tensor]:
    return {leaf.site.path: leaf.scale for part in adapter.parts for leaf in part.leaves}


def same(adapter: tt.Adapter, vectors: dict[str, torch.nn.Parameter], gradients: bool = False) -> None:
    for path, scale in paths(adapter).items():
        vector = vectors[f"base_model.model.{path}.ia3_l.default"]
        expected, found = (vector.grad, scale.grad) if gradients else (vector, scale)
        assert expected is not None
        assert found is not None
        torch.testing.assert_close(found, expected.flatten(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PLACES)
def test_outputs_gradients_and_optimizer_steps(name: str) -> None:
    own, adapter, other, vectors = pair(name)
    torch.testing.assert_close(own.output(), other.output(), rtol=1e-5, atol=1e-5)
    optimizers = [torch.optim.Adam(list(adapter.parameters()), lr=1e-2), torch.optim.Adam(vectors.values(), lr=1e-2)]
    before = [scale.detach().clone() for scale in adapter.parameters()]
    for _ in range(5):
        for optimizer, entry in zip(optimizers, (own, other), strict=True):
            optimizer.zero_grad()
            entry.loss().backward()
        same(adapter, vectors, gradients=True)
        for optimizer in optimizers:
            optimizer.step()
        same(adapter, vectors)
    assert all(not torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
    torch.testing.assert_close(own.output(), other.output(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLACES)
def test_trainable_count(name: str) -> None:
    _, adapter, _, vectors = pair(name)
    assert len(vectors) == len(list(adapter.parameters()))
    assert adapter.trainable_count == sum(vector.numel() for vector in vectors.values())


@pytest.mark.parametrize("name", PLACES)
def test_merged_weights(name: str) -> None:
    own, adapter, other, _ = pair(name)
    adapter.merge()
    for module in other.model.modules():
        if isinstance(module, peft.tuners.ia3.layer.IA3Layer):
            module.merge()
    theirs = {n.replace(".base_layer", ""): p for n, p in other.model.named_parameters() if "ia3_l" not in n}
    ours = {n: p for n, p in own.model.named_parameters() if "trimtab_" not in n}
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def test_gpt2s_fused_projection_is_pefts_with_the_queries_left_alone() -> None:
    own, other = ZOO["gpt2"](0, 0.0), ZOO["gpt2"](0, 0.0)
    config = peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    )
    theirs: Any = peft.get_peft_model(other.model, config)
    vectors = {n: p for n, p in theirs.named_parameters() if "ia3_l" in n}
    adapter = tt.attach(own.model, tt.IA3())
    with torch.no_grad():
        for path, scale in paths(adapter).items():
            scale.copy_(1.0 + 0.3 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(1)))
            vector = vectors[f"base_model.model.{path}.ia3_l.default"]
            vector.flatten()[-scale.numel() :] = scale.flatten()
    torch.testing.assert_close(own.output(), other.output(), rtol=1e-5, atol=1e-5)
    own.loss().backward()
    other.loss().backward()
    for path, scale in paths(adapter).items():
        gradient = vectors[f"base_model.model.{path}.ia3_l.default"].grad
        assert scale.grad is not None
        torch.testing.assert_close(scale.grad.flatten(), gradient.flatten()[-scale.numel() :], rtol=1e-4, atol=1e-6)
