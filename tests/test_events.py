"""Binding: schedules, penalties and checks run on the optimizer's steps, whoever drives the optimizer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab

TOTAL = 12
METHOD = trimtab.AdaLoRA(
    rank=2, initial_rank=4, warmup_steps=2, final_steps=4, interval=2, orthogonality=0.3, targets="0 | 2"
)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


def attached(method: trimtab.Method = METHOD, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, trimtab.Adapter]:
    model = network(dtype)
    return model, trimtab.attach(model, method, dtype=dtype)


def batch(step: int, rows: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 6, generator=generator).to(dtype), torch.randn(rows, 5, generator=generator).to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = batch(step, dtype=dtype)
    return F.mse_loss(model(x), y)


def adamw(adapter: trimtab.Adapter, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameters(), lr=0.05, weight_decay=0.0, **settings)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def triplets(adapter: trimtab.Adapter) -> int:
    return sum(int((leaf.E != 0).sum()) for leaf in adapter.leaves())


def tensors(adapter: trimtab.Adapter) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor, _ in adapter.named_tensors()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=0, atol=tolerance, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.fixture(scope="module")
def plain_run() -> dict[str, Tensor]:
    """The tensors after the whole run in a plain loop; the other ways of training must arrive at the same."""
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    run(model, optimizer, 0, TOTAL)
    return tensors(adapter)


# -- the schedule in a plain loop --------------------------------------------------------------------------------


def test_the_schedule_runs_in_a_plain_loop() -> None:
    """n = 2 matrices, from 4 to 2 triplets each: 8 up to step 2, then 4 + 4·((8 − t)/6)³, fixed at 4 from step 8."""
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    kept = []
    for step in range(TOTAL):
        run(model, optimizer, step, step + 1)
        kept.append(triplets(adapter))
    assert kept == [8, 8, 8, 8, int(4 + 4 * (4 / 6) ** 3), 8, int(4 + 4 * (2 / 6) ** 3), 8, 4, 4, 4, 4]
    assert adapter.steps == TOTAL


def test_the_importance_is_that_of_the_two_averages() -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    leaf: Any = adapter.leaves()[0]
    average, uncertainty = torch.zeros(4, 6), torch.zeros(4, 6)
    for step in range(3):
        run(model, optimizer, step, step + 1)
        present = (leaf.A * leaf.A.grad).abs().float().detach()  # after the step, with the penalty's gradient
        average = 0.85 * average + 0.15 * present
        uncertainty = 0.85 * uncertainty + 0.15 * (present - average).abs()
    torch.testing.assert_close(leaf.A_sensitivity, average, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.A_uncertainty, uncertainty, rtol=1e-4, atol=1e-9)


def test_nothing_is_pruned_when_the_rank_stays() -> None:
    model, adapter = attached(
        trimtab.AdaLoRA(rank=4, initial_rank=4, warmup_steps=1, final_steps=3, interval=1, targets="0 | 2")
    )
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=6)
    run(model, optimizer, 0, 6)
    assert triplets(adapter) == 8


def test_a_frozen_or_inactive_adapter_does_not_follow_its_schedule() -> None:
    model, adapter = attached()
    head = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD([*adapter.parameters(), head], lr=0.1)
    adapter.bind(optimizer, total_steps=TOTAL)
    for setting in ("trainable", "active"):
        setattr(adapter, setting, False)
        (model(batch(0)[0]) + head).sum().backward()
        optimizer.step()
        setattr(adapter, setting, True)
    assert adapter.steps == 0
    assert not any(leaf.E_sensitivity.any() for leaf in adapter.leaves())


# -- the penalty -------------------------------------------------------------------------------------------------


def test_the_penalty_in_the_step_and_in_the_loss_give_the_same_training(plain_run: dict[str, Tensor]) -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL, penalty="loss")
    for step in range(TOTAL):
        optimizer.zero_grad()
        penalty = adapter.penalty()
        assert penalty is not None
        (loss_of(model, step) + penalty).backward()
        optimizer.step()
    assert_equal(tensors(adapter), plain_run, 1e-6)  # the two orders of adding differ in rounding; averages are float32


def test_a_penalty_that_never_enters_the_loss_stops_the_step() -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL, penalty="loss")
    loss_of(model, 0).backward()
    with pytest.raises(trimtab.TrainingError, match="its penalty never entered the loss: use loss = loss"):
        optimizer.step()


# -- loss scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscaled_by_hand", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scale_changes_nothing(fused: bool, unscaled_by_hand: bool, plain_run: dict[str, Tensor]) -> None:
    """A fused optimizer gets scaled gradients and unscales them itself; events must see them unscaled, once."""
    model, adapter = attached()
    optimizer = adamw(adapter, fused=fused)
    adapter.bind(optimizer, total_steps=TOTAL)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=5)
    for step in range(TOTAL):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if unscaled_by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**14
    assert_equal(tensors(adapter), plain_run, 1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_events_see_unscaled_gradients(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    model, adapter = attached(trimtab.LoRA(rank=2, targets="0 | 2"))
    leaf: Any = adapter.leaves()[0]
    monkeypatch.setattr(trimtab.LoRA, "before_step", lambda self, part: seen["before"].append(leaf.B.grad.clone()))
    monkeypatch.setattr(trimtab.LoRA, "after_step", lambda self, part, *_: seen["after"].append(leaf.B.grad.clone()))
    expected = torch.autograd.grad(loss_of(model, 0), [leaf.B])[0]
    optimizer = adamw(adapter, fused=fused)
    adapter.bind(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    for gradients in seen.values():
        assert len(gradients) == 1
        torch.testing.assert_close(gradients[0], expected, rtol=1e-12, atol=0)
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_skipped_for_overflow_is_no_step(fused: bool) -> None:
    model, adapter = attached()
    optimizer = adamw(adapter, fused=fused)
    adapter.bind(optimizer, total_steps=TOTAL)
    before = tensors(adapter)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(model, 0) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert adapter.steps == 0
    assert_equal(tensors(adapter), before)


# -- accelerate and transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bound_to", ["plain", "prepared"])
def test_accelerate_with_gradient_accumulation(bound_to: str, plain_run: dict[str, Tensor]) -> None:
    """Two half batches with accumulation are one whole batch: events run once for both."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, adapter = attached()
    optimizer = adamw(adapter)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    adapter.bind(prepared if bound_to == "prepared" else optimizer, total_steps=TOTAL)
    for step in range(TOTAL):
        x, y = batch(step)
        for half in (slice(0, 4), slice(4, 8)):
            with accelerator.accumulate(prepared_model):
                accelerator.backward(F.mse_loss(prepared_model(x[half]), y[half]))
                prepared.step()
                prepared.zero_grad()
        assert adapter.steps == step + 1
    assert_equal(tensors(adapter), plain_run, 1e-6)


class Regression(nn.Module):
    """The network with the loss inside, as transformers' Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network(torch.float32)

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(features)
        return {"loss": F.mse_loss(logits, labels), "logits": logits}


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = Regression()
    method = trimtab.AdaLoRA(
        rank=2, initial_rank=4, warmup_steps=2, final_steps=4, interval=2, targets="network.0 | network.2"
    )
    adapter = trimtab.attach(model, method)
    kept = []

    class Bind(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            adapter.bind(optimizer, total_steps=state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.append(triplets(adapter))

    examples = [{"features": x, "labels": y} for x, y in zip(*batch(0, rows=96, dtype=torch.float32), strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        learning_rate=0.05, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[Bind()])
    trainer.train()
    assert adapter.steps == trainer.state.max_steps == 12
    assert kept[:4] == [8, 8, 8, 8]
    assert kept[8:] == [4, 4, 4, 4]


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [1, 5, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(
    pause: int, tmp_path: Path, plain_run: dict[str, Tensor]
) -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    run(model, optimizer, 0, pause)
    adapter.save(tmp_path, training=True)
    state = optimizer.state_dict()
    fresh = network()
    resumed = trimtab.load(fresh, tmp_path, trainable=True)
    assert resumed.steps == pause
    again = adamw(resumed)
    again.load_state_dict(state)
    resumed.bind(again, total_steps=TOTAL)
    run(fresh, again, pause, TOTAL)
    assert_equal(tensors(resumed), plain_run)


def test_a_file_for_use_holds_no_schedule(tmp_path: Path) -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    run(model, optimizer, 0, TOTAL)
    output = model(batch(0)[0])
    adapter.save(tmp_path)
    loaded = trimtab.load(fresh := network(), tmp_path)
    assert torch.equal(fresh(batch(0)[0]), output)
    assert loaded.steps == 0
    assert triplets(loaded) == 4
    assert not any(leaf.E_sensitivity.any() for leaf in loaded.leaves())


# -- refusals ----------------------------------------------------------------------------------------------------


def test_training_unbound_stops_before_the_second_step() -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    run(model, optimizer, 0, 1)
    with pytest.raises(trimtab.TrainingError, match="trained without being bound: the schedule of AdaLoRA"):
        loss_of(model, 1)
    with torch.no_grad():
        loss_of(model, 1)  # evaluating is no training


def test_a_copy_of_a_model_under_training_can_be_used() -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    run(model, optimizer, 0, 2)
    assert torch.equal(copy.deepcopy(model)(batch(0)[0]), model(batch(0)[0]))


class HalfUsed(nn.Module):
    """A model that never calls one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_tensor_without_gradient_is_named_at_the_second_step() -> None:
    model = HalfUsed()
    adapter = trimtab.attach(model, trimtab.LoRA(rank=2, targets="used | idle"))
    optimizer = adamw(adapter)
    adapter.bind(optimizer)
    x, y = batch(0, dtype=torch.float32)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    F.mse_loss(model(x), y).backward()
    with pytest.raises(
        trimtab.TrainingError, match=r"no gradient has reached '0/idle:weight/A', '0/idle:weight/B' \(2 of 4"
    ):
        optimizer.step()


def test_a_gradient_that_is_no_number_is_named_as_such() -> None:
    model, adapter = attached(trimtab.LoRA(rank=2))
    optimizer = adamw(adapter)
    adapter.bind(optimizer)
    (loss_of(model, 0) * float("nan")).backward()
    with pytest.raises(
        trimtab.TrainingError, match=r"the gradient of '0/0:weight/A' is not finite; lower the learning rate"
    ):
        optimizer.step()


def test_a_step_beyond_the_end_of_the_schedule_stops() -> None:
    model, adapter = attached()
    optimizer = adamw(adapter)
    adapter.bind(optimizer, total_steps=TOTAL)
    run(model, optimizer, 0, TOTAL)
    before = tensors(adapter)
    with pytest.raises(trimtab.TrainingError, match="its total_steps=12 are over; bind it for the whole run"):
        run(model, optimizer, TOTAL, TOTAL + 1)
    assert_equal(tensors(adapter), before)


def test_only_an_attached_and_unmerged_adapter_is_bound() -> None:
    model, adapter = attached(trimtab.LoRA(rank=2))
    optimizer = adamw(adapter)
    adapter.bind(optimizer)
    run(model, optimizer, 0, 2)
    assert adapter.binding is not None
    adapter.binding.release()
    adapter.merge()
    with pytest.raises(trimtab.AttachError, match="'default' is merged into this model; unmerge it before training"):
        adapter.bind(optimizer)
    adapter.detach()
    with pytest.raises(trimtab.TrainingError, match="adapter 'default' is not attached any more"):
        adapter.bind(optimizer)


def test_an_optimizer_without_the_parameters_is_refused() -> None:
    _, adapter = attached(trimtab.LoRA(rank=2, targets="0 | 2"))
    optimizer = torch.optim.SGD([next(adapter.parameters())], lr=0.1)
    with pytest.raises(
        trimtab.TrainingError, match="does not hold 3 of the adapter's parameters, for example '0/0:weight/B'"
    ):
        adapter.bind(optimizer)
    with pytest.raises(trimtab.TrainingError, match="does not hold 4 of the adapter's parameters"):
        adapter.bind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_an_optimizer_that_cannot_be_seen_through_is_refused() -> None:
    _, adapter = attached()
    engine = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    with pytest.raises(trimtab.TrainingError, match=r"cannot bind to DeepSpeedZeroOptimizer: .*DeepSpeed partitions"):
        adapter.bind(engine, total_steps=TOTAL)
    wrapped = type("FusedAdam", (torch.optim.SGD,), {"__module__": "deepspeed.ops.adam"})(adapter.parameters(), lr=0.1)
    with pytest.raises(trimtab.TrainingError, match="cannot bind to FusedAdam"):
        adapter.bind(wrapped, total_steps=TOTAL)


@pytest.mark.parametrize("total_steps", [None, 0])
def test_a_schedule_needs_the_length_of_the_run(total_steps: int | None) -> None:
    _, adapter = attached()
    with pytest.raises(trimtab.TrainingError, match=f"the number of optimizer steps, found {total_steps}"):
        adapter.bind(adamw(adapter), total_steps=total_steps)


def test_a_schedule_that_does_not_fit_the_run_is_refused_at_binding() -> None:
    _, adapter = attached()
    with pytest.raises(
        trimtab.TrainingError, match="after warmup_steps=2 and before final_steps=4, none of the 6 steps"
    ):
        adapter.bind(adamw(adapter), total_steps=6)
    assert adapter.binding is None
    adapter.bind(adamw(adapter), total_steps=7)


def test_an_adapter_is_bound_to_one_optimizer_at_a_time() -> None:
    model, adapter = attached()
    first, second = adamw(adapter), adamw(adapter)
    adapter.bind(first, total_steps=TOTAL)
    with pytest.raises(trimtab.TrainingError, match="is bound to an optimizer already"):
        adapter.bind(second, total_steps=TOTAL)
    assert adapter.binding is not None
    adapter.binding.release()
    adapter.bind(second, total_steps=TOTAL)
    run(model, second, 0, 1)
    assert adapter.steps == 1


def test_steps_that_torch_does_not_see_stop_too() -> None:
    """DeepSpeed writes to `parameter.data`, which leaves the parameter's version as it was."""
    model, adapter = attached()
    loss_of(model, 0).backward()
    for parameter in adapter.parameters():
        parameter.data = parameter.data + 0.1
    with pytest.raises(trimtab.TrainingError, match="trained without being bound: the schedule of AdaLoRA"):
        loss_of(model, 1)
