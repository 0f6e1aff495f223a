"""MTLoRA: figures of the authors' code for every stream, finite differences, counts, and that it learns two tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab
from golden.weight_checks import DOUBLE, assert_finite_differences, assert_formula, linear, numbers, official
from test_weight_methods import PLACES, perturb

Mode = Literal["matrix", "matrixv2"]
STREAMS = (None, "depth", "edge")


def attached(mode: Mode = "matrix") -> tuple[nn.Module, trimtab.Adapter, Any]:
    """Return one linear map with the shared update and two tasks, filled as in the stored run."""
    model = linear(8, 6)
    method = trimtab.MTLoRA(
        rank=3, tasks=("depth", "edge"), task_rank=2, task_scale=2.0, mode=mode, dropout=0.0, targets="0"
    )
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    leaf: Any = adapter.parts[0].leaves[0]
    with torch.no_grad():
        leaf.A.copy_(torch.cat([numbers(3, 6, phase=0.1), numbers(2, 6, phase=0.4), numbers(2, 6, phase=1.4)]))
        leaf.B.copy_(torch.cat([numbers(8, 3, phase=0.2), numbers(8, 2, phase=0.5), numbers(8, 2, phase=1.5)], dim=1))
    return model, adapter, leaf


def streams(model: nn.Module, adapter: trimtab.Adapter, x: Tensor) -> dict[str, Tensor]:
    outputs = {}
    for task in STREAMS:
        trimtab.MTLoRA.use_task(adapter, task)
        outputs[task or "shared"] = model(x)
    return outputs


@pytest.mark.parametrize("mode", ["matrix", "matrixv2"])
def test_every_stream_and_its_gradients_are_those_of_the_authors_code(mode: Mode) -> None:
    model, adapter, leaf = attached(mode)
    theirs = official(f"mtlora_{mode}")
    found = streams(model, adapter, numbers(2, 3, 6, phase=0.9))
    for name, output in found.items():
        torch.testing.assert_close(output, theirs[name], rtol=1e-8, atol=1e-8)
    losses = {name: output.square().sum() for name, output in found.items()}
    (losses["shared"] + 2 * losses["depth"] + 3 * losses["edge"]).backward()  # all streams in one graph
    torch.testing.assert_close(leaf.A.grad, theirs["A"], rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(leaf.B.grad, theirs["B"], rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("embedding", "groups")])
def test_without_tasks_it_is_a_lora_whose_scale_is_not_divided(place: str) -> None:
    assert_formula(
        lambda at: trimtab.MTLoRA(rank=3, dropout=0.0, targets=at), lambda leaf, w: w + 4.0 * leaf.B @ leaf.A, place
    )


@pytest.mark.parametrize("task", STREAMS)
def test_a_stream_starts_at_the_base_and_trains_its_own_numbers(task: str | None) -> None:
    model, x = linear(8, 6), numbers(5, 6, phase=0.9)
    base = model(x)
    method = trimtab.MTLoRA(rank=3, tasks=("depth", "edge"), task_rank=2, dropout=0.0, targets="0")
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    trimtab.MTLoRA.use_task(adapter, task)
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-14)
    perturb(adapter)
    model(x).square().sum().backward()
    leaf: Any = adapter.parts[0].leaves[0]
    own = {None: range(3), "depth": range(3, 5), "edge": range(5, 7)}[task]
    assert [i for i in range(7) if leaf.A.grad[i].any()] == list(own)
    assert [i for i in range(7) if leaf.B.grad[:, i].any()] == list(own)


def test_gradients_are_those_of_finite_differences() -> None:
    assert_finite_differences(trimtab.MTLoRA(rank=2, dropout=0.0, targets="0"))


@pytest.mark.parametrize("task", STREAMS)
def test_the_chosen_stream_is_merged_and_saved(task: str | None, tmp_path: Path) -> None:
    model, adapter, _ = attached()
    x = numbers(5, 6, phase=0.9)
    outputs = streams(model, adapter, x)
    trimtab.MTLoRA.use_task(adapter, task)
    adapter.merge()
    torch.testing.assert_close(model(x), outputs[task or "shared"])
    adapter.unmerge()
    adapter.save(tmp_path)
    adapter.detach()
    loaded = trimtab.load(model, tmp_path)
    assert torch.equal(model(x), outputs[task or "shared"])
    assert torch.equal(streams(model, loaded, x)["edge"], outputs["edge"])


def test_what_it_cannot_do_is_refused() -> None:
    model, adapter, _ = attached()
    with pytest.raises(trimtab.SettingError, match=r"MTLoRA has no task 'dept'\. Did you mean 'depth'"):
        trimtab.MTLoRA.use_task(adapter, "dept")
    with pytest.raises(trimtab.SettingError, match="a task is named twice"):
        trimtab.attach(linear(8, 6), trimtab.MTLoRA(rank=2, tasks=("a", "a"), task_rank=1, targets="0"))
    x = numbers(5, 6, phase=0.9).requires_grad_()
    with pytest.raises(trimtab.AttachError, match="cannot be recomputed"):
        checkpoint(model, x, use_reentrant=False).sum().backward()


@pytest.mark.slow
def test_the_contract_holds_with_tasks() -> None:
    method = trimtab.MTLoRA(rank=2, tasks=("depth", "edge"), task_rank=1)
    assert trimtab.check_method(method).held


def test_counts_are_those_of_the_card() -> None:
    """Swin-T: widths 96·2^i, depths 2 2 6 2; tasks at two linear maps in the last block of each stage."""
    with torch.device("meta"):
        stages = nn.ModuleList()
        for stage, depth in enumerate((2, 2, 6, 2)):
            width = 96 * 2**stage
            shapes = {"qkv": (width, 3 * width), "proj": (width, width)}
            shapes |= {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
            blocks = [nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()}) for _ in range(depth)]
            stages.append(nn.ModuleList(blocks))
        model = nn.ModuleDict({"stages": stages})
    everywhere = "*.qkv | *.proj | *.fc1 | *.fc2"
    assert trimtab.plan(model, trimtab.MTLoRA(rank=64, targets=everywhere)).trainable == 4_521_984
    last = " | ".join(
        f"stages.{i}.{d - 1}.{name}" for i, d in enumerate((2, 2, 6, 2)) for name in ("proj", "fc1", "fc2")
    )
    shared = trimtab.plan(model, trimtab.MTLoRA(rank=64, targets=last)).trainable
    tasks = trimtab.MTLoRA(rank=64, tasks=("semseg", "normals", "saliency", "parts"), task_rank=4, targets=last)
    assert 4_521_984 + trimtab.plan(model, tasks).trainable - shared == 4_798_464


def test_tasks_learn_conflicting_targets_that_a_shared_update_cannot() -> None:
    torch.manual_seed(0)
    x, change = torch.randn(64, 6, dtype=DOUBLE), torch.randn(8, 2, dtype=DOUBLE) @ torch.randn(2, 6, dtype=DOUBLE)
    model = linear(8, 6)
    method = trimtab.MTLoRA(rank=2, tasks=("plus", "minus"), task_rank=2, dropout=0.0, targets="0")
    base = model(x).detach()
    wanted = {"plus": base + x @ change.t(), "minus": base - x @ change.t()}
    adapter = trimtab.attach(model, method, dtype=DOUBLE)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        losses = {}
        for name, target in wanted.items():
            trimtab.MTLoRA.use_task(adapter, name)
            losses[name] = F.mse_loss(model(x), target)
            trimtab.MTLoRA.use_task(adapter, None)
            losses["shared " + name] = F.mse_loss(model(x), target)
        sum(losses.values()).backward()
        optimizer.step()
    last = {name: float(loss.detach()) for name, loss in losses.items()}
    assert last["plus"] + last["minus"] < 1e-3
    assert last["shared plus"] + last["shared minus"] > 1.0
