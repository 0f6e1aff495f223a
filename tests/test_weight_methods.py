"""LoRA, DoRA, SVFit, RandLoRA and AdaLoRA against formulas written out here, on every layout of a weight."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab
from trimtab.kinds.lowrank import Factors, linear_with_update
from trimtab.kinds.random_bases import linear_with_random_bases, scaled_basis
from zoo import ZOO

DOUBLE = torch.float64


class Experts(nn.Module):
    """A stack of matrices (expert, out, in) that is read and not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ni->eno", self.stack, x)


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer, its example input, and how its weight is seen as matrices (*lead, out, in) and put back."""

    layer: Callable[[], nn.Module]
    x: Callable[[int], Tensor]
    matrices: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, Tensor], Tensor]
    parameter: str = "weight"


def features(count: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, count)


def plain(weight: Tensor) -> Tensor:
    return weight


def reshape(matrix: Tensor, weight: Tensor) -> Tensor:
    return matrix.reshape(weight.shape)


PLACES = {
    "tall": Place(lambda: nn.Linear(8, 12), features(8), plain, reshape),
    "wide": Place(lambda: nn.Linear(12, 8, bias=False), features(12), plain, reshape),
    "square": Place(lambda: nn.Linear(8, 8), features(8), plain, reshape),
    "transposed": Place(lambda: Conv1D(6, 8), features(8), lambda w: w.t(), lambda m, w: m.t()),
    "convolution": Place(
        lambda: nn.Conv2d(2, 6, 3, padding=1),
        lambda rows: torch.randn(rows, 2, 4, 4),
        lambda w: w.reshape(6, 18),
        reshape,
    ),
    "groups": Place(
        lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        lambda rows: torch.randn(rows, 4, 5, 5),
        lambda w: w.reshape(2, 3, 18),
        reshape,
    ),
    "embedding": Place(
        lambda: nn.Embedding(9, 6),
        lambda rows: torch.randint(0, 9, (rows, 3)),
        lambda w: w.t(),
        lambda m, w: m.t(),
    ),
    "experts": Place(Experts, features(8), plain, reshape, "stack"),
}  # fmt: skip


def low_rank(leaf: Any, weight: Tensor) -> Tensor:
    return weight + 1.5 * torch.einsum("...or,...ri->...oi", leaf.B, leaf.A)


def decomposed(leaf: Any, weight: Tensor) -> Tensor:
    changed = low_rank(leaf, weight)
    norm = torch.linalg.vector_norm(changed, dim=-1, keepdim=True).detach()
    return leaf.magnitude[..., None] * changed / norm


def spectral(leaf: Any, weight: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    rank = leaf.s.shape[-1]
    rest = U[..., rank:] @ torch.diag_embed(S[..., rank:]) @ Vh[..., rank:, :]
    return rest + U[..., :rank] @ torch.diag_embed(leaf.s) @ Vh[..., :rank, :]


def random_products(leaf: Any, weight: Tensor) -> Tensor:
    """Σ_t B[:, t] · UA[t, :], where t = b·r + k counts B's columns and t = k·n + b the rows of the scaled A."""
    out_features, in_features = weight.shape[-2:]
    small, large = min(weight.shape[-2:]), max(weight.shape[-2:])
    rank, count = leaf.Lambda.shape[-2:]
    A, B = leaf.shared("A"), leaf.shared("B")
    delta = torch.zeros(*weight.shape[:-2], large, small, dtype=weight.dtype)
    for t in range(rank * count):
        column = B[:large, t // rank, t % rank]
        k, b = t // count, t % count
        row = leaf.Lambda[..., k, b, None] * A[k, :small] * leaf.Gamma[..., b, :]
        delta = delta + column[:, None] * row[..., None, :]
    scale = 5.0 / rank / math.sqrt(count)
    return weight + scale * (delta if out_features >= in_features else delta.transpose(-1, -2))


def triplets(leaf: Any, weight: Tensor) -> Tensor:
    return weight + 7.0 / (2 + 1e-5) * leaf.B @ torch.diag_embed(leaf.E) @ leaf.A


METHODS: dict[str, tuple[Callable[[str], trimtab.Method], Callable[[Any, Tensor], Tensor]]] = {
    "LoRA": (lambda at: trimtab.LoRA(rank=2, alpha=3, targets=at), low_rank),
    "DoRA": (lambda at: trimtab.DoRA(rank=2, alpha=3, targets=at), decomposed),
    "SVFit": (lambda at: trimtab.SVFit(rank=2, targets=at), spectral),
    "SVFit, whole": (lambda at: trimtab.SVFit(targets=at), spectral),
    "RandLoRA": (lambda at: trimtab.RandLoRA(rank=4, alpha=5, targets=at), random_products),
    "AdaLoRA": (lambda at: trimtab.AdaLoRA(rank=1, initial_rank=2, alpha=7, targets=at), triplets),
}


def attached(method: Callable[[str], trimtab.Method], place: Place) -> tuple[nn.Module, trimtab.Adapter, Any]:
    """Return a model of one layer with an adapter in float64, and the leaf."""
    torch.manual_seed(0)
    model = nn.Sequential(place.layer()).double()
    target = "0" if place.parameter == "weight" else f"0:{place.parameter}"
    adapter = trimtab.attach(model, method(target), dtype=DOUBLE)
    return model, adapter, adapter.parts[0].leaves[0]


def perturb(adapter: trimtab.Adapter, size: float = 0.3) -> None:
    """Move every trained tensor away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE) * size)


def inputs(place: Place, rows: int) -> Tensor:
    x = place.x(rows)
    return x.double().requires_grad_() if x.is_floating_point() else x


def gradients(output: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=DOUBLE).view(output.shape)
    return list(torch.autograd.grad((output * weights).sum(), wanted))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [1, 40])  # fewer and more than the layer is wide: two ways to compute RandLoRA
def test_output_and_gradients_are_those_of_the_formula(name: str, place: str, rows: int) -> None:
    method, formula = METHODS[name]
    here = PLACES[place]
    model, adapter, leaf = attached(method, here)
    bare = copy.deepcopy(model)
    trimtab.adapters(bare)["default"].detach()
    perturb(adapter)
    x = inputs(here, rows)
    weight = getattr(bare[0], here.parameter).detach()
    effective = here.stored(formula(leaf, here.matrices(weight)), weight)
    expected = torch.func.functional_call(bare, {f"0.{here.parameter}": effective}, (x,))
    output = model(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    assert (output - bare(x)).abs().max() > 1e-2
    wanted = [*adapter.parameters(), *([x] if x.requires_grad else [])]
    for ours, theirs in zip(gradients(output, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PLACES)
def test_the_start_is_the_base_exactly(name: str, place: str) -> None:
    here = PLACES[place]
    model, adapter, _ = attached(METHODS[name][0], here)
    x = inputs(here, 4)
    before = model(x)
    adapter.detach()
    assert torch.equal(before, model(x))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PLACES)
def test_merged_and_loaded_outputs_are_the_attached_one(name: str, place: str, tmp_path: Path) -> None:
    here = PLACES[place]
    model, adapter, _ = attached(METHODS[name][0], here)
    perturb(adapter)
    x = inputs(here, 4)
    output, weight = model(x), getattr(model[0], here.parameter)
    original = weight.detach().clone()
    adapter.merge()
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)  # merged in float32
    adapter.unmerge()
    assert torch.equal(weight, original)
    adapter.save(tmp_path)
    adapter.detach()
    trimtab.load(model, tmp_path)
    assert torch.equal(model(x), output)


def test_bias_and_weight_that_learn_beside_get_their_gradients() -> None:
    """Another method may train the bias of the same layer: the fused functions must not cut it off."""
    for method in (trimtab.RandLoRA(rank=4, targets="0"), trimtab.DoRA(rank=2, targets="0")):
        model = nn.Sequential(nn.Linear(8, 12)).double()
        adapter = trimtab.attach(model, trimtab.Compose(methods=(method, trimtab.BitFit(targets="0"))), dtype=DOUBLE)
        model(torch.randn(5, 8, dtype=DOUBLE)).square().sum().backward()
        learned = {name.split("/")[-1]: p.grad for name, p in adapter.named_parameters()}
        assert learned["value"] is not None
        assert learned["value"].abs().max() > 0


# -- fused functions ---------------------------------------------------------------------------------------------


def numbers(*shape: int, learns: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=DOUBLE).requires_grad_(learns)


@pytest.mark.parametrize(("out_features", "in_features"), [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradcheck_of_the_linear_map_with_random_bases(
    out_features: int, in_features: int, rows: int, has_bias: bool
) -> None:
    small, large, rank, count = min(out_features, in_features), max(out_features, in_features), 3, 2
    A, B = numbers(rank, small, learns=False), numbers(large, count * rank, learns=False)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, Lambda: Tensor, Gamma: Tensor) -> Tensor:
        return linear_with_random_bases(x, weight, bias, A, B, Lambda, Gamma, 0.7)

    x, weight = numbers(rows, in_features), numbers(out_features, in_features)
    bias = numbers(out_features) if has_bias else None
    assert torch.autograd.gradcheck(call, (x, weight, bias, numbers(rank, count), numbers(count, small)))


def test_gradcheck_of_the_scaled_basis() -> None:
    A = numbers(3, 4, learns=False)
    assert torch.autograd.gradcheck(lambda a, b: scaled_basis(A, a, b), (numbers(2, 3, 2), numbers(2, 2, 4)))


@pytest.mark.parametrize("has_middle", [True, False])
def test_gradcheck_of_the_linear_map_with_an_update(has_middle: bool) -> None:
    middle = numbers(2) if has_middle else None

    def call(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, middle: Tensor | None) -> Tensor:
        return linear_with_update(x, weight, bias, Factors(down, up, 0.7, middle), training=True)

    x, weight, bias = numbers(2, 3, 5), numbers(4, 5), numbers(4)
    assert torch.autograd.gradcheck(call, (x, weight, bias, numbers(2, 5), numbers(4, 2), middle))


@pytest.mark.parametrize("rows", [1, 40])
def test_randlora_keeps_nothing_for_backward_but_its_input_and_parameters(rows: int) -> None:
    """A larger layer beside this one makes its bases a slice of the shared ones, which must not be copied either."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(16, 20)).double()
    adapter = trimtab.attach(model, trimtab.RandLoRA(rank=4, targets="0 | 1"), dtype=DOUBLE)
    x = torch.randn(rows, 8, dtype=DOUBLE, requires_grad=True)
    shared = [adapter.parts[0].shared(name) for name in ("A", "B")]
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *shared)}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model[0](x)
    assert kept == []
    assert output.requires_grad


# -- counts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roberta() -> nn.Module:
    config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        return transformers.RobertaModel(config)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (trimtab.LoRA(rank=8, targets="query | value"), 294_912),
        (trimtab.DoRA(rank=8, targets="query | value"), 294_912 + 24 * 768),
        (trimtab.SVFit(targets="query | value"), 18_432),
        (trimtab.RandLoRA(rank=64, targets="query | value"), 239_616),
        (trimtab.AdaLoRA(rank=8, targets="query | value"), 24 * 12 * (768 + 768 + 1)),
    ],
)
def test_counts_on_roberta_base_are_those_of_the_cards(method: trimtab.Method, count: int, roberta: nn.Module) -> None:
    assert trimtab.plan(roberta, method).trainable == count


def test_the_count_of_adalora_on_deberta_base_is_that_of_the_card() -> None:
    config = transformers.DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=1000
    )
    with torch.device("meta"):
        model = transformers.DebertaV2Model(config)
    assert trimtab.plan(model, trimtab.AdaLoRA(rank=8, targets="attention | mlp")).trainable == 1_991_520


def test_the_count_of_randlora_on_llama_3_8b_is_that_of_the_card() -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=1000,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaModel(config)
    places = "*.q_proj | *.k_proj | *.v_proj | *.up_proj | *.down_proj"
    assert trimtab.plan(model, trimtab.RandLoRA(rank=30, targets=places)).trainable == 56_626_112
    assert trimtab.plan(model, trimtab.LoRA(rank=32, targets=places)).trainable == 56_623_104


# -- DoRA --------------------------------------------------------------------------------------------------------


def test_dora_s_norm_is_a_constant_for_the_gradient() -> None:
    model, adapter, leaf = attached(METHODS["DoRA"][0], PLACES["tall"])
    perturb(adapter)
    x = inputs(PLACES["tall"], 5)
    weight = model[0].weight.detach()
    changed = low_rank(leaf, weight)
    undetached = leaf.magnitude[:, None] * changed / torch.linalg.vector_norm(changed, dim=1, keepdim=True)
    ours = gradients(model(x), [leaf.A])[0]
    other = gradients(F.linear(x, undetached, model[0].bias.detach()), [leaf.A])[0]
    assert (ours - other).abs().max() > 1e-2 * ours.abs().max()


def test_a_row_of_zeros_stays_finite_under_dora() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[2] = 0.0
    x = torch.randn(3, 6)
    before = model(x)
    adapter = trimtab.attach(model, trimtab.DoRA(rank=2, targets="0"))
    output = model(x)
    assert torch.equal(output, before)
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("place", ["tall", "wide", "transposed", "convolution", "groups"])
def test_dropout_under_dora_acts_on_all_that_is_added_to_the_base(place: str) -> None:
    here = PLACES[place]
    model, adapter, leaf = attached(lambda at: trimtab.DoRA(rank=2, alpha=3, dropout=0.4, targets=at), here)
    perturb(adapter)
    x = here.x(5).double()
    bare = copy.deepcopy(model)
    trimtab.adapters(bare)["default"].detach()
    weight = bare[0].weight.detach()
    effective = here.stored(decomposed(leaf, here.matrices(weight)), weight)
    without_bias = {"0.bias": torch.zeros_like(bare[0].bias)} if bare[0].bias is not None else {}
    torch.manual_seed(3)
    output = model.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    added = torch.func.functional_call(bare, {"0.weight": effective, **without_bias}, (dropped,))
    added = added - torch.func.functional_call(bare, {"0.weight": weight, **without_bias}, (dropped,))
    torch.testing.assert_close(output, bare(x) + added, rtol=0, atol=1e-11)
    assert (output - model.eval()(x)).abs().max() > 1e-2


def test_a_second_method_beside_dora_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    trimtab.attach(model, trimtab.DoRA(rank=2, targets="0"))
    with pytest.raises(trimtab.AttachError, match="one of them is not additive"):
        trimtab.attach(model, trimtab.LoRA(rank=2, targets="0"), name="second")


# -- SVFit -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_svfit_is_the_diagonal_in_the_singular_bases() -> None:
    model, _, leaf = attached(lambda at: trimtab.SVFit(rank=5, targets=at), PLACES["tall"])
    x = inputs(PLACES["tall"], 6)
    weight = model[0].weight.detach().clone().requires_grad_()
    U, _, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    gradient = gradients(F.linear(x, weight, model[0].bias.detach()), [weight])[0]
    expected = torch.diagonal(U[:, :5].t() @ gradient @ Vh[:5].t())
    torch.testing.assert_close(gradients(model(x), [leaf.s])[0], expected, rtol=0, atol=1e-12)


def test_energy_takes_the_smallest_rank_that_covers_it() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0], dtype=DOUBLE)  # squares 16, 4, 1, 1, 1 of 23
    U, V = (torch.linalg.qr(numbers(size, 5, learns=False))[0] for size in (7, 5))
    model = nn.Sequential(nn.Linear(5, 7)).double()
    with torch.no_grad():
        model[0].weight.copy_(U @ torch.diag(values) @ V.t())
    for energy, rank in ((0.5, 1), (0.69, 1), (0.7, 2), (20.0 / 23.0, 2), (0.88, 3), (1.0, 5)):
        assert trimtab.plan(model, trimtab.SVFit(energy=energy, targets="0")).trainable == rank


def test_svfit_with_energy_saves_and_loads(tmp_path: Path) -> None:
    model, adapter, _ = attached(lambda at: trimtab.SVFit(energy=0.8, targets=at), PLACES["tall"])
    perturb(adapter)
    x = inputs(PLACES["tall"], 3)
    output = model(x)
    adapter.save(tmp_path)
    adapter.detach()
    assert trimtab.load(model, tmp_path).method == trimtab.SVFit(energy=0.8, targets="0")
    assert torch.equal(model(x), output)


def test_svfit_refuses_a_rank_with_an_energy_and_energy_without_weights() -> None:
    with pytest.raises(trimtab.SettingError, match=r"rank=4 or energy=0\.9, not both; leave one out"):
        trimtab.plan(nn.Linear(4, 4), trimtab.SVFit(rank=4, energy=0.9, targets="*"))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(trimtab.SettingError, match="'0:weight' has none on the meta device"):
        trimtab.plan(model, trimtab.SVFit(energy=0.9, targets="0"))


# -- RandLoRA ----------------------------------------------------------------------------------------------------


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))


def test_randlora_has_full_rank_and_one_pair_of_bases() -> None:
    model = two_layers()
    adapter = trimtab.attach(model, trimtab.RandLoRA(rank=3, targets="0 | 1"))
    first, second = adapter.parts[0].leaves
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(5))
    for leaf in (first, second):
        assert torch.linalg.matrix_rank(leaf.method.delta(leaf)) == min(leaf.site.in_features, leaf.site.out_features)
    assert first.shared("B").data_ptr() == second.shared("B").data_ptr()
    assert tuple(first.shared("A").shape) == (3, 12)  # the larger out and the larger in are both 12
    assert tuple(first.shared("B").shape) == (12, 4, 3)
    assert not first.shared("A").requires_grad


def test_the_seed_of_the_bases() -> None:
    def bases(seed: int, projection_seed: int | None) -> Tensor:
        method = trimtab.RandLoRA(rank=3, projection_seed=projection_seed, targets="0 | 1")
        return trimtab.attach(two_layers(), method, seed=seed).parts[0].shared("B")

    assert torch.equal(bases(0, 4), bases(1, 4))
    assert torch.equal(bases(1, None), bases(1, None))
    assert not torch.equal(bases(0, None), bases(1, None))
    assert bases(0, None).std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("bases", "share"), [("sparse", 1 / 3), ("very_sparse", 1 / math.sqrt(64))])
def test_the_share_of_numbers_in_sparse_bases(bases: Any, share: float) -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    B = trimtab.attach(model, trimtab.RandLoRA(rank=8, bases=bases, targets="0")).parts[0].shared("B")
    expected, deviation = share * B.numel(), math.sqrt(share * (1 - share) * B.numel())
    assert abs(int((B != 0).sum()) - expected) < 5 * deviation
    assert B.unique().numel() == 3


def test_the_two_conventions_of_the_scale() -> None:
    for convention, expected in (("authors", 2 / math.sqrt(3)), ("peft", 20.0)):
        method = trimtab.RandLoRA(rank=3, convention=convention, targets="0")
        adapter = trimtab.attach(nn.Sequential(nn.Linear(8, 12)), method)
        assert method.scale(adapter.parts[0].sites[0]) == pytest.approx(expected)


def test_doubling_the_rank_halves_the_trained_numbers() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    counts = [trimtab.plan(model, trimtab.RandLoRA(rank=rank, targets="0")).trainable for rank in (2, 4)]
    assert counts == [32 * (2 + 64), 16 * (4 + 64)]


# -- AdaLoRA: what needs no training loop ------------------------------------------------------------------------


def test_the_penalty_is_the_mean_distance_from_orthonormal() -> None:
    model = two_layers().double()
    method = trimtab.AdaLoRA(rank=2, orthogonality=0.3, targets="0 | 1")
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    perturb(adapter)
    expected = 0.0
    for leaf in adapter.parts[0].leaves:
        for gram in (leaf.A @ leaf.A.t(), leaf.B.t() @ leaf.B):
            expected += 0.3 / 4 * math.sqrt((gram - torch.eye(3, dtype=DOUBLE)).square().sum().item())
    penalty = method.penalty(adapter.parts[0])
    assert penalty is not None
    assert penalty.item() == pytest.approx(expected, rel=1e-12)
    assert dataclasses.replace(method, orthogonality=0.0).penalty(adapter.parts[0]) is None


def test_the_initial_rank_of_adalora() -> None:
    assert [trimtab.AdaLoRA(rank=rank).start_rank for rank in (1, 2, 8)] == [2, 3, 12]
    with pytest.raises(trimtab.SettingError, match="initial_rank=4 is below rank=8"):
        trimtab.plan(two_layers(), trimtab.AdaLoRA(rank=8, initial_rank=4))


# -- learning checks of the cards --------------------------------------------------------------------------------


def losses(adapter: trimtab.Adapter, model: nn.Module, target: Tensor, steps: int, lr: float) -> tuple[float, float]:
    """Fit the layer's whole linear map to `target`; returns the loss at the start and at the end."""
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    eye = torch.eye(target.shape[1], dtype=target.dtype)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(eye) - target.t()).square().mean()
        loss.backward()
        values.append(loss.item())
        optimizer.step()
    return values[0], values[-1]


def bare_layer(weight: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False)).to(weight.dtype)
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def test_svfit_finds_a_change_of_singular_values_that_lora_cannot() -> None:
    """With 32 numbers SVFit reaches it; LoRA of rank r is left with the smallest singular values of the change."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, generator=generator, dtype=DOUBLE) / math.sqrt(32)
    U, S, Vh = torch.linalg.svd(weight)
    target = U @ torch.diag(S * (1 + 0.5 * torch.randn(32, generator=generator, dtype=DOUBLE))) @ Vh
    squares = torch.linalg.svdvals(target - weight).square()
    for method, floor in (
        (trimtab.SVFit(targets="0"), 0.0),
        (trimtab.LoRA(rank=1, targets="0"), float(squares[1:].sum() / squares.sum())),
        (trimtab.LoRA(rank=4, targets="0"), float(squares[4:].sum() / squares.sum())),
    ):
        model = bare_layer(weight)
        start, end = losses(trimtab.attach(model, method, dtype=DOUBLE), model, target, steps=400, lr=0.02)
        assert floor * (1 - 1e-9) <= end / start < floor + 0.05
        assert end < 1e-10 if floor == 0.0 else floor > 0.1


def test_randlora_comes_nearer_to_a_full_rank_change_than_lora_of_its_size() -> None:
    """A random orthogonal change has a flat spectrum: LoRA of rank r cannot go below 1 − r/32 of the start."""
    generator = torch.Generator().manual_seed(0)
    target = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    model = bare_layer(torch.zeros(32, 32))
    adapter = trimtab.attach(model, trimtab.RandLoRA(rank=4, targets="0"))
    assert adapter.trainable_count == 288
    start, end = losses(adapter, model, target, steps=1500, lr=0.01)
    assert end / start < 0.75 < 1 - 5 / 32  # the bound of LoRA of rank 5, with 320 numbers


class Parallel(nn.Module):
    """Two 16 × 16 linear maps side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.needy, self.content = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.needy(x), self.content(x)


@pytest.mark.parametrize("seed", [0, 1])
def test_adalora_gives_its_ranks_to_the_matrix_that_needs_them(seed: int) -> None:
    torch.manual_seed(seed)
    model = Parallel()
    change = torch.randn(16, 6) @ torch.randn(6, 16) / 4
    with torch.no_grad():
        target = model.needy.weight + change
    method = trimtab.AdaLoRA(
        rank=3, initial_rank=6, warmup_steps=50, final_steps=150, interval=10, targets="needy | content"
    )
    adapter = trimtab.attach(model, method)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, weight_decay=0.0)
    adapter.bind(optimizer, total_steps=400)
    for _ in range(400):
        x = torch.randn(32, 16)
        first, second = model(x)
        noise = 0.1 * torch.randn(32, 16)
        optimizer.zero_grad()
        loss = (first - x @ target.t()).square().mean() + (
            second - x @ model.content.weight.t() - noise
        ).square().mean()
        loss.backward()
        optimizer.step()
    ranks = [int((leaf.E != 0).sum()) for leaf in adapter.parts[0].leaves]
    assert sum(ranks) == 6
    assert ranks[0] > 3


@pytest.mark.parametrize("targets", ["query", "query | value"])
def test_a_part_of_a_fused_projection_is_refused(targets: str) -> None:
    with pytest.raises(trimtab.TargetError, match="computes query, key and value in one matrix, so LoRA would"):
        trimtab.attach(ZOO["gpt2"](0, 0.0).model, trimtab.LoRA(rank=2, targets=targets))


@pytest.mark.parametrize("targets", ["query | key | value", "query | all-linear", "attention", "*.c_attn"])
def test_a_whole_fused_projection_is_adapted(targets: str) -> None:
    adapter = trimtab.attach(ZOO["gpt2"](0, 0.0).model, trimtab.LoRA(rank=2, targets=targets))
    assert any(leaf.site.path.endswith("c_attn") for leaf in adapter.leaves())


@pytest.mark.parametrize("method", [trimtab.LoRA(rank=2), trimtab.DoRA(rank=2), trimtab.SSF()], ids=repr)
def test_a_double_precision_base_merges_in_double_precision(method: trimtab.Method) -> None:
    entry = ZOO["mlp"](0, 0.0)
    model = entry.model.double()
    adapter = trimtab.attach(model, method, dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = {name: value.double() for name, value in entry.inputs.items()}
    before = entry.output(inputs=x)
    adapter.merge()
    assert (entry.output(inputs=x) - before).abs().max() < 1e-13


@pytest.mark.parametrize("method", [trimtab.DoRA, trimtab.SVFit, trimtab.AdaLoRA])
def test_a_rank_larger_than_the_layer_is_refused(method: Callable[..., trimtab.Method]) -> None:
    with pytest.raises(trimtab.SettingError, match="is larger than the layer '0:weight' of shape 4×4"):
        trimtab.plan(nn.Sequential(nn.Linear(4, 4)), method(rank=8, targets="0"))


def test_a_rank_larger_than_the_layer_leaves_randlora_one_base() -> None:
    assert trimtab.plan(nn.Sequential(nn.Linear(4, 4)), trimtab.RandLoRA(rank=8, targets="0")).trainable == 8 + 4


def test_an_attribute_that_an_adapter_has_not_is_refused() -> None:
    adapter = trimtab.attach(nn.Sequential(nn.Linear(6, 4)), trimtab.LoRA(rank=2, targets="0"))
    with pytest.raises(trimtab.AttachError, match=r"an adapter has no 'activ'\. Did you mean 'active'"):
        adapter.activ = False  # type: ignore[attr-defined]
    with pytest.raises(trimtab.AttachError, match=r"an adapter has no 'trainabl'\. Did you mean 'trainable'"):
        adapter.trainabl = False  # type: ignore[attr-defined]


def test_a_disabled_or_detached_adapter_cannot_be_used_as_if_it_were_not() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2, targets="0"))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    with (
        adapter.disabled(),
        pytest.raises(trimtab.AttachError, match="is inactive or disabled; set its `active` to True to merge it"),
    ):
        adapter.merge()
    with pytest.raises(trimtab.AttachError, match="probe is a dictionary of the model's keyword inputs, found tensor"):
        adapter.merge(probe=torch.randn(2, 6))
    assert not adapter.merged
    adapter.detach()
    with pytest.raises(trimtab.TrainingError, match="is not attached any more"), adapter.disabled():
        pass


def test_parts_that_do_not_add_up_are_refused_in_one_adapter_too() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    text = r"DoRA and LoRA both act on '0:weight', and one of them is not additive: choose other targets\."
    both = trimtab.Compose(trimtab.LoRA(rank=2, targets="0"), trimtab.DoRA(rank=2, targets="0"))
    with pytest.raises(trimtab.AttachError, match=text):
        trimtab.plan(model, both)
    with pytest.raises(trimtab.AttachError, match=text):
        trimtab.attach(model, both)
    assert not trimtab.adapters(model)


def test_a_head_outside_the_adapter_is_told_when_loading_fails(tmp_path: Path) -> None:
    entry, other = ZOO["bert"](0, 0.0), ZOO["bert"](0, 0.0)
    file = trimtab.attach(entry.model, trimtab.LoRA(rank=2)).save(tmp_path)
    with torch.no_grad():
        other.model.get_parameter("classifier.weight").add_(1.0)  # as transformers draws it anew
    text = (
        r"the weights of 'classifier:weight' are other ones.* A new head is trained by FullTuning\(targets='head'\)\."
    )
    with pytest.raises(trimtab.AdapterFileError, match=text):
        trimtab.load(other.model, file)
    assert repr(trimtab.adapters(entry.model)["default"]).startswith("<Adapter 'default': LoRA(rank=2, ")


def test_a_role_that_a_model_lacks_is_told_with_those_it_has() -> None:
    with pytest.raises(trimtab.TargetError, match=r"no part in the role 'all-linear'; it has .*'head'"):
        trimtab.attach(nn.Sequential(nn.Linear(6, 4)), trimtab.LoRA(rank=2))


def test_parts_that_do_not_add_up_are_refused_in_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = trimtab.Compose(trimtab.LoRA(rank=2, targets="0"), trimtab.DoRA(rank=2, targets="0"))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["trimtab.attach"], "refuse_conflicts", lambda pairs, owner="": None)
        file = trimtab.attach(nn.Sequential(nn.Linear(6, 4)), both).save(tmp_path)
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(trimtab.AdapterFileError, match="DoRA and LoRA both act on '0:weight', and one of them is not"):
        trimtab.load(model, file, accept_other_base=True)
    assert type(model) is nn.Sequential
    assert all(parameter.requires_grad for parameter in model.parameters())
