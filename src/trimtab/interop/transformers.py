"""Training an attached model with transformers' Trainer: adapter-only checkpoints, schedules that bind themselves."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

from torch import nn

from trimtab.adapter import Adapter
from trimtab.adapter_file import FILE_NAME
from trimtab.attach import adapters
from trimtab.errors import TrainingError
from trimtab.extras import require
from trimtab.storage import refill
from trimtab.training.processes import processes_started

_transformers: Any = require("transformers", "hf")
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# What Trainer writes for a resume, in place and one after the other, beside the generators of each process.
_RESUMABLE = (FILE_NAME, "optimizer.pt", "scheduler.pt", "trainer_state.json")


class AdapterTraining:
    """What any subclass of transformers' Trainer needs to train an adapter: put it in front of that class.

    `class MyTrainer(AdapterTraining, SFTTrainer): ...`. The optimizer is made from the adapter's own parameter groups
    and bound to it; its penalty is part of the training loss; checkpoints are the adapter's file with the state of
    its schedule, and resuming from one gives the bits of the unbroken run. The model has one trainable adapter.
    """

    args: Any
    model: Any
    optimizer: Any
    state: Any
    control: Any

    # The arguments are those of the Trainer class that stands behind this one, whichever it is.
    def __init__(self, model: Any = None, *arguments: Any, **options: Any) -> None:
        if model is not None or options.get("model_init") is None:
            trained_adapter(model)
        super().__init__(model, *arguments, **options)  # type: ignore[call-arg]
        _refuse_unfit(self)

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        return trained_adapter(self.model)

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **options: Any) -> Any:
        """Train as the class behind does; True resumes from the newest checkpoint that is complete."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest_complete(Path(self.args.output_dir))
        elif resume_from_checkpoint:
            _check_complete(Path(resume_from_checkpoint))
        else:
            resume_from_checkpoint = None
        for adapter in adapters(self.model).values():
            adapter.steps = 0
        try:
            return super().train(resume_from_checkpoint, *arguments, **options)  # type: ignore[misc]
        finally:
            for adapter in adapters(self.model).values():
                release(adapter)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer that the arguments name, with the adapter's own learning rates and decays."""
        if self.optimizer is None:
            trainer: Any = self
            chosen = trainer.optimizer_cls_and_kwargs
            kind, options = chosen or trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
            if {"params", "model", "optimizer_dict"} & set(options) or not isinstance(kind, type):
                raise TrainingError(
                    f"optim={self.args.optim!r} chooses its parameters itself; use another (adamw_torch)."
                )
            groups = self.adapter.parameter_groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)  # type: ignore[misc]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the learning-rate schedule, and bind the adapter now that optimizer and number of steps are known."""
        bind(self.adapter, optimizer or self.optimizer, num_training_steps, "loss")
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the class behind, in training with the adapter's penalty, once for each optimizer step."""
        trainer: Any = super()
        result = trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty = self.adapter.penalty() if model.training else None
        if penalty is None:
            return result
        share = penalty / self._micro_batches() if self._loss_is_scaled(num_items_in_batch) else penalty
        return (result[0] + share, result[1]) if return_outputs else result + share

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter's file (and the tokenizer), never the base; a checkpoint's holds the schedule's state."""
        trainer: Any = self
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            self.adapter.save(folder, training=_internal_call)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Adapter", revision=self.args.hub_revision)

    def _micro_batches(self) -> int:
        trainer: Any = self
        return int(trainer.current_gradient_accumulation_steps)

    def _loss_is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether Trainer takes the loss as it is, rather than dividing it by the number of micro-batches."""
        trainer: Any = self
        if trainer.loss_is_scaled_for_ga is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_items) or trainer.compute_loss_func is not None

    def _run_epoch(self, **options: Any) -> None:
        """A resumed run that is complete is done; the class behind would train one more step."""
        trainer: Any = super()
        if self.state.global_step < self.state.max_steps:
            trainer._run_epoch(**options)
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        refill(self.adapter, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        refill(self.adapter, self.state.best_model_checkpoint)


class TrimtabTrainer(AdapterTraining, _transformers.Trainer):
    """transformers' Trainer for a model with an attached adapter; the arguments are the same."""


class TrimtabCallback(_transformers.TrainerCallback):
    """For people who keep their own Trainer: binds the adapter, and saves it after every epoch and at the end.

    Needs save_strategy="no", since Trainer itself would write the whole model; for checkpoints that resume, and for
    adapters with own learning rates, use TrimtabTrainer. `output`: folder of the adapter; None: the output_dir.
    Penalties act at the optimizer's step, after any clipping.
    """

    def __init__(self, output: str | Path | None = None) -> None:
        self.output = output

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Bind the adapter to the optimizer; raises TrainingError where Trainer would do something else."""
        adapter = trained_adapter(objects["model"])
        if str(args.save_strategy.value) != "no":
            raise TrainingError(
                f"save_strategy={args.save_strategy.value!r}: Trainer's own checkpoints hold the whole base and cannot "
                f"be resumed with an adapter. Use TrimtabTrainer, or save_strategy='no' with this callback."
            )
        adapter.steps = 0
        bind(adapter, objects["optimizer"], state.max_steps, "step")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save the adapter."""
        if state.is_world_process_zero:
            trained_adapter(objects["model"]).save(self.output or args.output_dir)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Save the adapter and free it of the optimizer."""
        self.on_epoch_end(args, state, control, **objects)
        release(trained_adapter(objects["model"]))


def trained_adapter(model: Any) -> Adapter:
    """Return the one adapter of `model` that is to be trained; raises TrainingError where Trainer cannot train it."""
    found = adapters(model) if isinstance(model, nn.Module) else {}
    trained = [adapter for adapter in found.values() if adapter.trainable and adapter.active]
    if len(trained) != 1:
        raise TrainingError(
            f"Trainer trains one adapter, and this model has {len(trained)} that are trainable and active (attached: "
            f"{', '.join(found) or 'none'}). Call attach(model, method) first, or set adapter.trainable on one alone."
        )
    if _is_quantized(model):
        raise TrainingError(
            "transformers' Trainer does not accept adapters inside a quantised model. Train it with "
            "trimtab.training.loop.train, which does."
        )
    return trained[0]


def bind(adapter: Adapter, optimizer: Any, total_steps: int, penalty: Literal["step", "loss"]) -> None:
    """Bind an adapter to the optimizer of a new run, whatever an earlier run left."""
    release(adapter)
    adapter.bind(optimizer, total_steps, penalty)


def release(adapter: Adapter) -> None:
    """Free an adapter of its optimizer, if it is bound to one."""
    if adapter.binding is not None:
        adapter.binding.release()


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False))  # transformers' own mark, absent from plain modules


def _refuse_unfit(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise TrainingError("an adapter cannot be trained under DataParallel; start the script with torchrun instead.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise TrainingError(
            "Trainer's checkpoints do not gather adapters from FSDP or DeepSpeed. Use torchrun (DDP) without them, or "
            "trimtab.training.loop.train, which gathers from FSDP2."
        )
    if processes_started() != trainer.args.world_size:
        raise TrainingError(
            f"{processes_started()} processes were started together, but Trainer sees {trainer.args.world_size}: each "
            f"would train alone and overwrite what the others write. On a machine without a GPU, pass use_cpu=True."
        )


def _missing(checkpoint: Path) -> list[str]:
    count = processes_started()
    generators = ["rng_state.pth"] if count == 1 else [f"rng_state_{index}.pth" for index in range(count)]
    return [name for name in (*_RESUMABLE, *generators) if not _is_whole(checkpoint / name)]


def _is_whole(file: Path) -> bool:
    """Whether a file is there and was written to its end: a process that was killed leaves part of one."""
    if not file.is_file():
        return False
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return False
    return file.suffix not in (".pt", ".pth") or zipfile.is_zipfile(file)


def _check_complete(checkpoint: Path) -> None:
    missing = _missing(checkpoint)
    if missing:
        raise TrainingError(
            f"{checkpoint}: lacks {', '.join(missing)}, without which the run would go on differently. Resume from "
            f"another checkpoint; those made with save_only_model=True cannot be resumed."
        )


def _newest_complete(output: Path) -> str:
    found = [(int(match[1]), path) for path in output.glob("*") if (match := _CHECKPOINT.match(path.name))]
    complete = [(step, path) for step, path in found if not _missing(path)]
    if not complete:
        raise TrainingError(f"{output}: holds no complete checkpoint to resume from ({len(found)} incomplete).")
    return str(max(complete)[1])
