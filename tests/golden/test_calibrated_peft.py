"""CorDA, LoRA-GA and EVA, which start from data, against peft (huggingface/peft, run live) and their formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab
from golden.peft_models import LABELS, TOKENS, Layers, Pair, leaf_at, reshaped, trainable_count

peft = pytest.importorskip("peft")
corda = pytest.importorskip("peft.tuners.lora.corda")
loraga = pytest.importorskip("peft.tuners.lora.loraga")

PLACES = ["linear", "transposed"]
DATA = [torch.randint(0, 11, (16, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), tokens[:, 0] % 3)


def pairs_at(wrapped: Any, adapter: trimtab.Adapter, place: str) -> list[Pair]:
    layer, leaf = wrapped.base_model.model.get_submodule(place), leaf_at(adapter, place)
    return [reshaped(leaf.A, layer.lora_A["default"].weight), reshaped(leaf.B, layer.lora_B["default"].weight)]


def assert_same_directions(ours: Tensor, theirs: Tensor) -> Tensor:
    """The rows are the same up to their signs, which are returned."""
    signs = torch.sign((ours * theirs).sum(-1, keepdim=True)).detach()
    torch.testing.assert_close(ours * signs, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))
    return signs


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("mode", "theirs"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_starts_as_in_peft(place: str, mode: Any, theirs: str) -> None:
    model = Layers()
    bare = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        init_lora_weights="corda",
        target_modules=[place],
        fan_in_fan_out=place == "transposed",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=theirs),
    )

    rows = [row.unsqueeze(0) for batch in DATA for row in batch]
    corda.preprocess_corda(bare, config, run_model=lambda: [bare(row) for row in rows])
    wrapped = peft.get_peft_model(bare, config)
    method = trimtab.CorDA(rank=3, alpha=6, components=mode, targets=place)
    adapter = trimtab.attach(model, method, calibration=trimtab.Batches(rows))
    assert adapter.trainable_count == trainable_count(wrapped)
    down, up = pairs_at(wrapped, adapter, place)
    signs = assert_same_directions(down.ours, down.view(down.theirs))
    assert torch.equal(signs, assert_same_directions(up.ours.t(), up.view(up.theirs).t()))  # of one component


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_starts_as_in_peft(place: str, direction: Any) -> None:
    model = Layers()
    bare = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        init_lora_weights="lora_ga",
        target_modules=[place],
        fan_in_fan_out=place == "transposed",
        lora_ga_config=peft.LoraGAConfig(direction=direction, stable_gamma=16),
    )
    loraga.preprocess_loraga(bare, config, lambda: [loss(bare, batch).backward() for batch in DATA])
    wrapped = peft.get_peft_model(bare, config)
    method = trimtab.LoRAGA(rank=2, alpha=4, rank_stabilized=True, direction=direction, compat="peft", targets=place)
    adapter = trimtab.attach(model, method, calibration=trimtab.Batches(DATA, loss))
    assert adapter.trainable_count == trainable_count(wrapped)
    down, up = pairs_at(wrapped, adapter, place)
    # The fourth root of the outputs scales B; peft takes the inputs for them where a weight is stored transposed.
    sizes = model.get_submodule(place).weight.shape
    factor = (sizes[0] / sizes[1]) ** 0.25 if place == "transposed" else 1.0
    assert_same_directions(down.ours, down.view(down.theirs))
    assert_same_directions(factor * up.ours.t(), up.view(up.theirs).t())


def test_lora_ga_starts_as_in_the_paper() -> None:
    """Both factors are orthonormal directions of the gradient times out^¼/√γ, as in the official code."""
    model = Layers()
    weight = model.linear.weight.detach().clone().requires_grad_(True)
    total = torch.zeros_like(weight)
    for batch in DATA:
        output = torch.func.functional_call(model, {"linear.weight": weight}, (batch,))
        total += torch.autograd.grad(F.cross_entropy(output, batch[:, 0] % 3), weight)[0] / len(DATA)
    U, _, Vh = torch.linalg.svd(total)
    adapter = trimtab.attach(model, trimtab.LoRAGA(rank=2, targets="linear"), calibration=trimtab.Batches(DATA, loss))
    (leaf,) = adapter.leaves()
    size = 12**0.25 / 16**0.5
    expected = torch.diag(torch.ones(2))
    torch.testing.assert_close((leaf.A @ Vh[:2].t() / size).abs(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close((U[:, 2:4].t() @ leaf.B / size).abs(), expected, rtol=0, atol=1e-4)


def inputs_of(model: nn.Module, place: str, batches: list[Tensor]) -> Tensor:
    """All inputs of one module, (tokens, in)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(place).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def test_eva_starts_with_the_principal_components() -> None:
    model = Layers()
    x = inputs_of(model, "transposed", DATA)
    adapter = trimtab.attach(
        model, trimtab.EVA(rank=3, rho=1.0, targets="transposed"), calibration=trimtab.Batches(DATA)
    )
    (leaf,) = adapter.leaves()
    components = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)[2][:3].float()
    torch.testing.assert_close((leaf.A @ components.t()).abs(), torch.eye(3), rtol=0, atol=2e-3)
    assert not leaf.B.any()


def test_eva_puts_ranks_where_the_data_vary() -> None:
    """r for each site on average, at most ρ·r; what is not chosen stays zero in training."""
    model = Layers()
    adapter = trimtab.attach(
        model, trimtab.EVA(rank=2, rho=2.0, targets="linear | transposed"), calibration=trimtab.Batches(DATA)
    )
    shares = {}
    for place in ("linear", "transposed"):
        x = inputs_of(model, place, DATA).double()
        variances = torch.linalg.svdvals(x - x.mean(0)).square()
        shares[place] = (variances / variances.sum())[:4]
    least = torch.cat(list(shares.values())).sort(descending=True).values[3]
    alive = {place: int((leaf_at(adapter, place).A != 0).any(-1).sum()) for place in shares}
    assert alive == {place: int((share >= least).sum()) for place, share in shares.items()}
    assert sum(alive.values()) == 4
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(TOKENS), LABELS).backward()
        optimizer.step()
    assert {place: int((leaf_at(adapter, place).A != 0).any(-1).sum()) for place in shares} == alive
    assert all(leaf_at(adapter, place).B.any() for place in shares if alive[place])


def test_padding_does_not_count_for_eva() -> None:
    class Masked(Layers):
        def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(tokens)

    torch.manual_seed(3)
    mask = torch.ones(16, 6, dtype=torch.long)
    mask[:, 4:] = 0
    full = [{"tokens": batch, "attention_mask": mask} for batch in DATA]
    spoilt = [{"tokens": torch.where(mask.bool(), batch, 10 - batch), "attention_mask": mask} for batch in DATA]
    rows = []
    for data in (full, spoilt):
        method = trimtab.EVA(rank=2, rho=1.0, targets="linear")
        (leaf,) = trimtab.attach(Masked(), method, calibration=trimtab.Batches(data)).leaves()
        rows.append(leaf.A.clone())
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize("method", [trimtab.CorDA(rank=2), trimtab.LoRAGA(rank=2), trimtab.EVA(rank=2)], ids=repr)
def test_a_method_that_starts_from_data_needs_them(method: trimtab.Method) -> None:
    with pytest.raises(trimtab.SettingError, match=r"starts from data: calibration=tt\.Batches\(data, loss\)"):
        trimtab.attach(Layers(), method)
    with pytest.raises(trimtab.SettingError, match="the calibration data are empty"):
        trimtab.attach(Layers(), method, calibration=trimtab.Batches([], loss))


def test_data_for_a_method_without_use_for_them_stop() -> None:
    with pytest.raises(trimtab.SettingError, match="no method here starts from data"):
        trimtab.attach(Layers(), trimtab.LoRA(rank=2), calibration=trimtab.Batches(DATA))


def test_lora_ga_needs_a_loss() -> None:
    with pytest.raises(trimtab.SettingError, match="LoRAGA needs the loss of a batch"):
        trimtab.attach(Layers(), trimtab.LoRAGA(rank=2, targets="linear"), calibration=trimtab.Batches(DATA))


@pytest.mark.parametrize("method", [trimtab.CorDA(rank=2, targets="linear"), trimtab.LoRAGA(rank=2, targets="linear")])
def test_the_start_is_the_base_and_nothing_of_the_calibration_stays(method: trimtab.Method, tmp_path: Any) -> None:
    model = Layers().train()
    before = model(TOKENS)
    adapter = trimtab.attach(model, method, calibration=trimtab.Batches(DATA, loss))
    assert torch.equal(model(TOKENS), before)
    assert model.training
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "trimtab" not in n)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    changed = model(TOKENS)
    adapter.save(tmp_path)
    adapter.detach()
    trimtab.load(model, tmp_path)  # needs no data
    assert torch.equal(model(TOKENS), changed)
