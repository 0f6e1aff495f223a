"""One short run of each method through the training loop and through the Trainer, and hashes of all that it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor

import trimtab as tt
import zoo
from trimtab.adapter_file import read_adapter_file
from trimtab.check import built_in_cases
from trimtab.contract.instances import small_instance
from trimtab.errors import AttachError, TargetError
from trimtab.interop.transformers import TrimtabTrainer
from trimtab.kinds.calibration import starts_from_data
from trimtab.method import methods
from trimtab.training.causal_lm import CausalLM
from trimtab.training.checkpoints import STATE_NAME, newest_checkpoint
from trimtab.training.classification import Classification
from trimtab.training.encoding import IGNORED, Encoded
from trimtab.training.loop import LoopSettings, Progress, TrainingResult, train

METHODS = sorted(methods())
STEPS = 6
CUTS = (1, 3, STEPS - 1)
SETTINGS = LoopSettings(
    lr=1e-2, steps=STEPS, batch_size=3, accumulation=2, warmup=0.3, checkpoint_every=1, evaluate_every=2
)
MODELS = {"llama": CausalLM(text="text"), "bert": Classification("text", "label", ("a", "b", "c"))}


@cache
def instance(name: str) -> tt.Method:
    return small_instance(methods()[name], built_in_cases())


@dataclass(frozen=True)
class Setup:
    """A method attached to a new small model, with the rows it learns from. `model`: its name in the zoo."""

    model: str
    adapter: tt.Adapter

    @property
    def task(self) -> Any:
        return MODELS[self.model]

    def rows(self, count: int, seed: int = 0) -> Encoded:
        """Rows of 3 to 9 random tokens with labels for the task."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
        inputs = tuple(torch.randint(3, zoo.VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths)
        skipped = torch.full((2,), IGNORED, dtype=torch.int32)
        labels = tuple(
            torch.cat([skipped, row[2:]]) if self.model == "llama" else row[0] % zoo.CLASSES for row in inputs
        )
        return Encoded("rows", inputs, labels, 16, 0, 9, 0, decode=lambda ids: [])


def set_up(name: str, dropout: float = 0.1) -> Setup:
    """Attach the small instance of a method to the first model that accepts it; without dropout, its own is 0 too."""
    reasons, method = [], instance(name)
    if dropout == 0.0 and "dropout" in {field.name for field in dataclasses.fields(method)}:
        method = replace(method, dropout=0.0)  # type: ignore[call-arg]
    for model in MODELS:
        entry = zoo.ZOO[model](3, dropout)
        data = tt.Batches([entry.inputs], lambda model, _, entry=entry: entry.loss(model))
        try:
            return Setup(model, tt.attach(entry.model, method, calibration=data if starts_from_data(method) else None))
        except (AttachError, TargetError) as error:
            reasons.append(f"{model}: {error}")
    raise AssertionError(f"no model accepts {name}: {'; '.join(reasons)}")


def fit(setup: Setup, settings: LoopSettings = SETTINGS, **others: Any) -> TrainingResult:
    """Train on 13 rows, evaluated on 5: the last micro-batch of an epoch holds one row."""
    model: Any = setup.adapter.model
    return train(model, setup.adapter, setup.task, setup.rows(13), setup.rows(5, seed=1), settings, **others)


def bits(tensors: dict[str, Any]) -> str:
    """Return a hash of every bit of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if isinstance(tensor, Tensor) else None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() if array is not None else b"")
        digest.update(array.numpy().tobytes() if array is not None else repr((name, tensor)).encode())
    return digest.hexdigest()


def adapter_bits(adapter: tt.Adapter) -> str:
    return bits({name: tensor for name, tensor, _ in adapter.named_tensors()})


def loop_state(output: Path) -> dict[str, str]:
    """Return hashes of all that a run of the loop has left: the adapter's file and every part of the last checkpoint.

    Only the seconds that it took are left out.
    """
    folder = newest_checkpoint(output)
    assert folder is not None
    with safetensors.safe_open(folder / STATE_NAME, framework="pt") as opened:
        header = json.loads(opened.metadata()["trimtab"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    header["run"].pop("seconds")
    parts = {
        part: bits({name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")})
        for part in ("optimizer", "random", "best")
    }
    described, trained = read_adapter_file(folder)
    final, kept = read_adapter_file(output)
    return parts | {
        "step": folder.name,
        "progress": json.dumps(header, sort_keys=True),
        "adapter and its schedule": bits(trained) + json.dumps(described, sort_keys=True),
        "final adapter": bits(kept) + json.dumps(final, sort_keys=True),
    }


def trainer_arguments(output: Path, **changed: Any) -> Any:
    chosen = {
        "output_dir": str(output), "max_steps": STEPS, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "warmup_steps": 2, "logging_steps": 1, "save_steps": 1, "report_to": [],
        "disable_tqdm": True, "remove_unused_columns": False, "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**chosen | changed)


def make_trainer(setup: Setup, args: Any, callbacks: Any = (), count: int = 13) -> Any:
    rows = setup.rows(count)
    numbers = [{"row": index} for index in range(len(rows))]
    trainer = TrimtabTrainer(
        setup.adapter.model, args, train_dataset=numbers, callbacks=list(callbacks),
        data_collator=lambda features: dict(rows.collate([feature["row"] for feature in features])),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trainer_state(folder: Path) -> dict[str, str]:
    """Return hashes of every part of a checkpoint that the Trainer has written, those of its own state among them."""
    described, trained = read_adapter_file(folder)
    loaded = {
        name: torch.load(folder / f"{name}.{ending}", weights_only=False)
        for name, ending in (("optimizer", "pt"), ("scheduler", "pt"), ("rng_state", "pth"))
    }
    history = json.loads((folder / "trainer_state.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in history["log_history"] if "loss" in entry]
    return {name: bits(_flat(value)) for name, value in loaded.items()} | {
        "adapter and its schedule": bits(trained) + json.dumps(described, sort_keys=True),
        "losses": str(losses),
        "step": str(history["global_step"]),
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = dict(enumerate(value)).items()
    else:
        return {prefix: value if isinstance(value, Tensor) else repr(value)}
    return {key: leaf for name, inner in items for key, leaf in _flat(inner, f"{prefix}/{name}").items()}


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return the names of the parts that are not the same."""
    return [part for part in found | expected if found.get(part) != expected.get(part)]


def loop_cuts(name: str, folder: Path) -> dict[int, list[str]]:
    """Return for each cut point what differs when the loop, stopped and resumed there, has ended.

    Compared are adapter, schedule, optimizer, generators, the best state and all figures.
    """

    def keep(progress: Progress) -> None:
        if progress.step in CUTS:
            shutil.copytree(folder / "whole/checkpoints", folder / f"cut-{progress.step}/checkpoints")

    whole = fit(set_up(name), output=folder / "whole", on_progress=keep)
    expected = loop_state(folder / "whole") | {"result": str((whole.best, whole.last, whole.final_loss))}
    found = {}
    for cut in CUTS:
        resumed = fit(set_up(name), output=folder / f"cut-{cut}", resume=True)
        assert resumed.resumed_from == cut
        result = {"result": str((resumed.best, resumed.last, resumed.final_loss))}
        found[cut] = differing(loop_state(folder / f"cut-{cut}") | result, expected)
    return found


def trainer_cuts(name: str, folder: Path) -> dict[int, list[str]]:
    """Return for each cut point what differs when the Trainer, resumed from there, has ended.

    Compared are adapter, schedule, optimizer, learning rates, generators and logged losses.
    """
    make_trainer(set_up(name), trainer_arguments(folder / "whole")).train()
    expected = trainer_state(folder / f"whole/checkpoint-{STEPS}")
    found = {}
    for cut in CUTS:
        shutil.copytree(folder / f"whole/checkpoint-{cut}", folder / f"cut-{cut}/checkpoint-{cut}")
        make_trainer(set_up(name), trainer_arguments(folder / f"cut-{cut}")).train(resume_from_checkpoint=True)
        found[cut] = differing(trainer_state(folder / f"cut-{cut}/checkpoint-{STEPS}"), expected)
    return found
