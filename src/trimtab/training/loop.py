"""The training loop: one process or many (DistributedDataParallel, FSDP2), any precision, resumed bit for bit.

Start a script that calls `train` with `torchrun` or `accelerate launch` to use many processes: each micro-batch is
split over them, and the losses are weighted so that the sum is what one process would have computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.adapter import Adapter
from trimtab.errors import SettingError, TrainingError
from trimtab.extras import require
from trimtab.hooks import keeping_modes
from trimtab.quantized import placed_like, whole
from trimtab.storage import save_adapter
from trimtab.training.batches import Loader, make_loader
from trimtab.training.checkpoints import RunState, load_checkpoint, newest_checkpoint, save_checkpoint
from trimtab.training.encoding import Encoded
from trimtab.training.errors import Interrupted
from trimtab.training.interruption import Interruption
from trimtab.training.metrics import Metrics
from trimtab.training.processes import Processes, holds_shards, make_accelerator, prepare, reshard
from trimtab.training.progress import Progress, TrainingResult, peak_bytes
from trimtab.training.randomness import capture, seeded
from trimtab.training.schedule import LoopSettings, Schedule, Step
from trimtab.training.tasks import Task

__all__ = ["LoopSettings", "Progress", "TrainingResult", "train"]


def train(
    model: nn.Module,
    adapter: Adapter,
    task: Task,
    train: Encoded,
    validation: Encoded | None,
    settings: LoopSettings,
    *,
    output: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train an attached adapter with AdamW; at the end it holds the state that was best on the validation data.

    `model`: the one that the adapter is attached to; it gives `.loss`, its mean over the terms that `task` counts.
    `output`: folder for checkpoints and, at the end, the adapter; `resume` goes on from the newest checkpoint there,
    with the same settings and data, to the same bits as the unbroken run. `on_progress` is called after every step,
    in the main process. Ctrl-C finishes the step, saves a checkpoint, and raises Interrupted. With FSDP2 the model
    stays sharded. Raises SettingError, TrainingError (a loss that is not finite), AdapterFileError.
    """
    checkpoint = _checked_request(model, adapter, output, resume)
    accelerator = make_accelerator(task.name)
    schedule = Schedule(settings, _loader(train, settings).order)
    wrapped, plain, optimizer = prepare(accelerator, adapter, settings.lr, settings.weight_decay)
    shared = Processes(accelerator.process_index, accelerator.num_processes)
    checks = None
    if validation is not None:
        checks = make_loader(validation, settings.batch_size, shuffle=False, processes=shared)
    with _training(accelerator, adapter, wrapped):
        if checkpoint is None:
            adapter.steps = 0
        adapter.bind(optimizer, schedule.total_steps, penalty="loss")
        run = _Run(accelerator, wrapped, adapter, task, train, checks, schedule, plain, optimizer, output, RunState())
        with seeded(settings.seed + accelerator.process_index, accelerator.device), Interruption() as interruption:
            resumed_from = 0 if checkpoint is None else run.resume(checkpoint)
            run.go(interruption, on_progress)
    return run.finish(resumed_from)


@dataclass(eq=False)
class _Run:
    """One run in one process: what stays, and `state`, which a checkpoint keeps."""

    accelerator: Any
    model: Any
    adapter: Adapter
    task: Task
    data: Encoded
    validation: Loader | None
    schedule: Schedule
    plain_optimizer: torch.optim.Optimizer
    optimizer: Any
    output: Path | None
    state: RunState

    def __post_init__(self) -> None:
        self.rates = [float(group["lr"]) for group in self.plain_optimizer.param_groups]
        settings = asdict(self.schedule.settings)
        for free in ("evaluate_every", "checkpoint_every"):
            del settings[free]
        processes = self.accelerator.num_processes
        self.sharded = holds_shards(self.adapter)
        self.identity = settings | {"processes": processes, "data": _digest(self.data)}
        self.identity |= {"sharded": True} if self.sharded else {}

    def resume(self, checkpoint: Path) -> int:
        """Take up the state of a checkpoint; returns the steps that had been made."""
        self.state, generators = load_checkpoint(
            checkpoint, self.adapter, self.plain_optimizer, self.identity, self.accelerator.scaler
        )
        generators[self.accelerator.process_index].restore(self.accelerator.device)
        return self.state.step

    def go(self, interruption: Interruption, on_progress: Callable[[Progress], None] | None) -> None:
        """Make every step that is left."""
        state, settings = self.state, self.schedule.settings
        start, earlier, first, examples = time.perf_counter(), state.seconds, state.step, 0
        for step in self.schedule.run(first):
            state.loss, stopped = self._step(step, interruption)
            state.step = step.number + 1
            examples += sum(map(len, step.batches))
            due = self.validation is not None and self.schedule.is_due(settings.evaluate_every, step)
            metrics = self._evaluate() if due else None
            elapsed = time.perf_counter() - start
            state.seconds = earlier + elapsed
            if stopped or self.schedule.is_due(settings.checkpoint_every, step):
                self._save()
            if on_progress is not None and self.accelerator.is_main_process:
                remaining = elapsed / (state.step - first) * (self.schedule.total_steps - state.step)
                memory = peak_bytes(self.accelerator.device)
                on_progress(
                    Progress(
                        state.step, self.schedule.total_steps, state.loss, state.seconds, remaining,
                        examples / elapsed, memory, metrics,
                    )
                )  # fmt: skip
            if stopped and state.step < self.schedule.total_steps:
                raise self._interrupted()

    def finish(self, resumed_from: int) -> TrainingResult:
        """Give the adapter its best state and write it; returns what the run gave."""
        state = self.state
        if state.best_step not in (0, state.step):
            with torch.no_grad():
                for name, tensor in _kept(self.adapter):
                    tensor.copy_(placed_like(state.best_tensors[name], tensor))
        if self.output is not None:
            save_adapter(self.adapter, self.output, training=False, write=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        peak, saved = peak_bytes(self.accelerator.device), state.best_step or state.step
        return TrainingResult(state.step, state.seconds, state.loss, peak, state.best, state.last, resumed_from, saved)

    def _step(self, step: Step, interruption: Interruption) -> tuple[float, bool]:
        """Make one optimizer step; returns its mean loss and whether any process was asked to stop."""
        shares = [self._share(rows) for rows in step.batches]
        (total,) = self._sum(sum(terms for _, terms in shares))
        loss = torch.zeros((), device=self.accelerator.device)
        for index, (batch, terms) in enumerate(shares):
            last = index == len(shares) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                loss += self._backward(batch, terms / total, 1 / len(shares))
        value, requests = self._sum(loss.item(), float(interruption.requested))
        self._check_finite("loss", value, step)
        factor = self.schedule.learning_rate_factor(step.number)
        for group, rate in zip(self.plain_optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        clip = self.schedule.settings.clip
        if clip is not None:
            norm = self.accelerator.clip_grad_norm_(list(self.adapter.parameters()), clip)
            if self.accelerator.scaler is None:  # which skips such a step and lowers its scale
                self._check_finite("norm of the gradient", float(norm), step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value, requests > 0

    def _share(self, rows: tuple[int, ...]) -> tuple[dict[str, Tensor], int]:
        """Return this process's part of a micro-batch and its loss terms; without a part, any row at no weight."""
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = self.data.collate(own or rows[:1])
        terms = self.task.loss_terms(batch["labels"]) if own else 0
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}, terms

    def _backward(self, batch: dict[str, Tensor], weight: float, share: float) -> Tensor:
        """Add a micro-batch's gradients; returns its part of the loss.

        `weight`: its share of the step's loss terms; `share`: that of the penalty, alike in every process.
        """
        # FSDP2 reduces what flows through the whole parameters of the forward: a penalty of the shards goes beside it.
        beside = self.adapter.penalty() if self.sharded else None
        loss: Tensor = self.model(**batch).loss
        penalty = None if self.sharded else self.adapter.penalty()
        # Gradients are averaged over processes, the step's loss is a sum over them.
        objective = loss * (weight * self.accelerator.num_processes)
        self.accelerator.backward(objective if penalty is None else objective + penalty * share)
        if beside is not None:
            self.accelerator.backward(beside * share)
        return loss.detach().float() * weight

    def _evaluate(self) -> Metrics:
        assert self.validation is not None
        metrics = self.task.evaluate(self.adapter.model, self.validation)
        if self.sharded:
            reshard(self.adapter.model)
        (state := self.state).last = metrics
        if state.best is None or metrics.is_better_than(state.best):
            state.best, state.best_step = metrics, state.step
            state.best_tensors = {name: whole(t.detach()).to("cpu", copy=True) for name, t in _kept(self.adapter)}
        return metrics

    def _save(self) -> None:
        if self.output is None:
            return
        states = [capture(self.accelerator.device)]
        if self.accelerator.num_processes > 1:
            states = require("accelerate.utils", "hf").gather_object(states)
        scaler, write = self.accelerator.scaler, self.accelerator.is_main_process
        save_checkpoint(
            self.output, self.adapter, self.plain_optimizer, self.state, states, self.identity, scaler, write
        )
        self.accelerator.wait_for_everyone()

    def _sum(self, *values: float) -> list[float]:
        """Return each value summed over the processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(summed, "sum").tolist()  # type: ignore[no-any-return]

    def _check_finite(self, what: str, value: float, step: Step) -> None:
        if not math.isfinite(value):
            saved = None if self.output is None else newest_checkpoint(self.output)
            kept = "No checkpoint was written." if saved is None else f"The last checkpoint is {saved}."
            raise TrainingError(
                f"the {what} of step {step.number + 1} of {self.schedule.total_steps} is {value}; the adapter was left "
                f"as it was before that step. {kept} Lower the learning rate, clip gradients, or train in float32."
            )

    def _interrupted(self) -> Interrupted:
        place = f"step {self.state.step} of {self.schedule.total_steps}"
        if self.output is None:
            return Interrupted(f"training was stopped after {place}. No output folder was given: nothing was saved.")
        return Interrupted(
            f"training was stopped after {place}. The checkpoint is {newest_checkpoint(self.output)}; go on with "
            f"resume=True and the same settings, data and output folder."
        )


def _checked_request(model: nn.Module, adapter: Adapter, output: Path | None, resume: bool) -> Path | None:
    """Stop where training would not do what was asked; returns the checkpoint to resume from."""
    if adapter.model is not model:
        raise TrainingError(f"adapter {adapter.name!r} is attached to another model object; pass that one.")
    if not (adapter.active and adapter.trainable) or adapter.merged:
        raise TrainingError(
            f"adapter {adapter.name!r} cannot be trained: active={adapter.active}, trainable={adapter.trainable}, "
            f"merged={adapter.merged}. Set active and trainable to True, and unmerge it."
        )
    if resume and output is None:
        raise SettingError("resume=True needs the output folder of the run to resume.")
    newest = None if output is None else newest_checkpoint(output)
    if resume and newest is None:
        raise SettingError(f"{output}: holds no checkpoint to resume from. Start the run without resume=True.")
    if newest is not None and not resume:
        raise SettingError(
            f"{output}: holds the checkpoint {newest.name} of an earlier run, which would be overwritten. Go on with "
            f"it (resume=True), choose another folder, or remove {newest.parent}."
        )
    return newest


def _loader(data: Encoded, settings: LoopSettings) -> Loader:
    return make_loader(data, settings.batch_size, seed=settings.seed, group_by_length=settings.group_by_length)


@contextlib.contextmanager
def _training(accelerator: Any, adapter: Adapter, wrapped: Any) -> Iterator[None]:
    """Hold the model in training mode; afterwards it is the user's own again, and the adapter free of the optimizer."""
    with keeping_modes(adapter.model):
        wrapped.train()
        try:
            yield
        finally:
            if adapter.binding is not None:
                adapter.binding.release()
            accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)


def _kept(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield what training may change: the tensors that neither a seed nor the base gives again."""
    return ((name, tensor) for name, tensor, spec in adapter.named_tensors() if spec.stored in ("always", "training"))


def _digest(data: Encoded) -> str:
    """Return the SHA-256 of the rows: lengths, token ids and labels."""
    labels = torch.cat([label.reshape(-1) for label in data.labels])
    digest = hashlib.sha256()
    for part in (torch.tensor(data.lengths), torch.cat(data.inputs), labels):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()
