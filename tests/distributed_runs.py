"""Runs of every method in several processes: what each process of a group does, and how far it is from one process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import method_runs
import trimtab as tt
import warm
import zoo
from method_runs import Setup, adapter_bits, fit, loop_state, make_trainer, set_up, trainer_arguments
from trimtab.training.batches import make_loader
from trimtab.training.encoding import Encoded
from trimtab.training.loop import LoopSettings, train
from trimtab.training.seq2seq import Seq2Seq

WAYS: Mapping[str, Mapping[str, str]] = {
    "DDP": {},
    "FSDP2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
}
BLOCKS = {"llama": "LlamaDecoderLayer", "bert": "BertLayer"}
TOLERANCE = 1e-6
"""Losses and figures may differ by this share: sums of float32 numbers in another order."""
AMPLIFICATION = 4
"""Or by so many times what one process differs by when it sums the same rows in another order."""
SETTINGS = replace(method_runs.SETTINGS, steps=4)
ROWS = SETTINGS.batch_size * SETTINGS.accumulation
OTHER_ORDERS = [replace(SETTINGS, batch_size=size, accumulation=ROWS // size) for size in (ROWS, 2, 1)]
CUT = 2


@dataclass(frozen=True)
class Found:
    """What one process has found in a run: losses of the steps (main process only), figures, and the run resumed.

    `best`: figures of the state that is kept; `loaded`: those of a plain model into which the saved file was loaded.
    `refusal`: the error that stopped it, empty otherwise. `sharded`: share of the model's numbers in shards.
    `rounding`: how far one process alone gets from itself by summing in other orders.
    """

    losses: tuple[float, ...] = ()
    figures: tuple[float, ...] = ()
    best: tuple[float, ...] = ()
    loaded: tuple[float, ...] = ()
    resumed_alike: bool = False
    sharded: float = 0.0
    rounding: float = 0.0
    refusal: str = ""


def run_methods(names: Sequence[str], folder: str) -> dict[str, Found]:
    """Train each method in this process, with others where there are any; only the main process may write."""
    forbidden = mock.Mock(side_effect=AssertionError("a process other than the main one writes"))
    places = ("trimtab.adapter_file.write_atomically", "trimtab.training.checkpoints.write_atomically")
    patches = [] if _rank() == 0 else [mock.patch(place, forbidden) for place in places]
    for patch in patches:
        patch.start()
    return {name: _run(name, Path(folder, name)) for name in names}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _run(name: str, folder: Path) -> Found:
    losses: list[float] = []

    def on_progress(progress: Any) -> None:
        losses.append(progress.loss)
        if progress.step == CUT:
            shutil.copytree(folder / "whole/checkpoints", folder / "cut/checkpoints")

    try:
        setup = set_up(name, dropout=0.0)
        result = fit(setup, SETTINGS, output=folder / "whole", on_progress=on_progress)
        sharded = _sharded_share(setup.adapter.model)
        again = fit(set_up(name, dropout=0.0), SETTINGS, output=folder / "cut", resume=True)
    except tt.TrimtabError as error:
        return Found(refusal=str(error))
    assert result.last is not None
    assert result.best is not None
    figures = tuple(result.last.values.values())
    alike = again.resumed_from == CUT and loop_state(folder / "whole") == loop_state(folder / "cut")
    return Found(
        losses=tuple(losses),
        figures=figures,
        best=tuple(result.best.values.values()),
        loaded=_figures_of_file(setup, folder / "whole"),
        resumed_alike=alike,
        sharded=sharded,
        rounding=0.0 if "RANK" in os.environ else _rounding(name, folder, losses, figures),
    )


def _rounding(name: str, folder: Path, losses: Sequence[float], figures: Sequence[float]) -> float:
    found = []
    for settings in OTHER_ORDERS:
        others: list[float] = []
        result = fit(
            set_up(name, dropout=0.0),
            settings,
            output=folder / f"micro-batches of {settings.batch_size}",
            on_progress=lambda progress, kept=others: kept.append(progress.loss),
        )
        assert result.last is not None
        found += [apart(others, losses), apart(tuple(result.last.values.values()), figures)]
    return max(found)


def _figures_of_file(setup: Setup, folder: Path) -> tuple[float, ...]:
    model = zoo.ZOO[setup.model](3, 0.0).model
    tt.load(model, folder)
    loader = make_loader(setup.rows(5, seed=1), SETTINGS.batch_size, shuffle=False)
    return tuple(setup.task.evaluate(model, loader).values.values())


def _sharded_share(model: torch.nn.Module) -> float:
    sizes = [(type(p).__name__ == "DTensor", p.numel()) for p in model.parameters()]
    return sum(size for is_sharded, size in sizes if is_sharded) / sum(size for _, size in sizes)


def compared(names: Sequence[str], way: str) -> dict[str, tuple[Found, Found]]:
    """Return for each method what one process and what the main one of two has found; raises where one hangs."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: pair for model in BLOCKS for name, pair in _compared(names, way, model, folder).items()}


def _compared(names: Sequence[str], way: str, model: str, folder: str) -> dict[str, tuple[Found, Found]]:
    """Compare the methods that train `model`: accelerate keeps the classes to shard for the life of a process."""
    chosen = [name for name in names if set_up(name).model == model]
    seconds = max(warm.SECONDS, 6.0 * len(chosen))
    environment = {**WAYS[way], "FSDP_TRANSFORMER_CLS_TO_WRAP": BLOCKS[model]}
    if not chosen:
        return {}
    alone = _alone(tuple(chosen), seconds)
    main, other = warm.together(run_methods, chosen, f"{folder}/two", environment=environment, seconds=seconds)
    for name in chosen:
        assert (main[name].figures, main[name].refusal) == (other[name].figures, other[name].refusal)
    return {name: (alone[name], main[name]) for name in chosen}


@cache
def _alone(names: tuple[str, ...], seconds: float) -> dict[str, Found]:
    """Return what one process has found; both ways are compared with it."""
    with tempfile.TemporaryDirectory() as folder:
        return warm.together(run_methods, names, folder, world=1, seconds=seconds)[0]


def apart(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest difference as a share of the expected number."""
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))


def problems(alone: Found, two: Found, way: str) -> list[str]:
    """Return what of two processes is not as in one, within float32 rounding; a refusal is none."""
    if two.refusal:
        return []
    allowed = max(TOLERANCE, AMPLIFICATION * alone.rounding)
    losses, figures = apart(two.losses, alone.losses), apart(two.figures, alone.figures)
    checks = {
        f"losses differ by {losses:.1e}, allowed {allowed:.1e}": losses <= allowed,
        f"figures differ by {figures:.1e}, allowed {allowed:.1e}": figures <= allowed,
        f"the saved file gives {two.loaded}, not {two.best}": apart(two.loaded, two.best) <= TOLERANCE,
        "the resumed run ends in other bits": two.resumed_alike,
        f"{two.sharded:.0%} of the model is sharded": (two.sharded == 1.0) == (way == "FSDP2"),
    }
    return [text for text, holds in checks.items() if not holds]


# Other scripts that are started in a group of processes


def rows_seen() -> list[tuple[int, ...]]:
    """Return the labels of every row that this process takes a loss of in one epoch."""
    setup = set_up("LoRA", dropout=0.0)
    seen: list[tuple[int, ...]] = []
    plain = type(setup.task).loss_terms

    def loss_terms(task: Any, labels: torch.Tensor) -> int:
        seen.extend(tuple(row[row >= 0].tolist()) for row in labels)
        return plain(task, labels)

    rows = setup.rows(13)
    with mock.patch.object(type(setup.task), "loss_terms", loss_terms):
        train(setup.adapter.model, setup.adapter, setup.task, rows, None, LoopSettings(1e-2, epochs=1, batch_size=3))
    return seen


def all_rows() -> list[tuple[int, ...]]:
    rows = set_up("LoRA").rows(13)
    return [tuple(label[label >= 0].tolist()) for label in rows.labels]


def sequences() -> tuple[float, ...]:
    """Train a model from source to target; returns its last loss, and the figures, those of generated texts last."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randint(3, zoo.VOCABULARY, (3 + n % 4,), generator=generator) for n in range(13))
    target = torch.tensor([5, 1])
    rows = Encoded(
        "rows", tuple(row.int() for row in inputs), (target.int(),) * 13, 16, 0, 9, 0, references=("5",) * 13,
        decode=lambda ids: ["5" if 5 in row else "" for row in ids.tolist()],
    )  # fmt: skip
    adapter = tt.attach(zoo.t5(3, 0.0).model, tt.LoRA(rank=2))
    settings = LoopSettings(3e-2, steps=12, batch_size=3, evaluate_every=12)
    result = train(adapter.model, adapter, Seq2Seq("source", "target"), rows, rows, settings)
    assert result.last is not None
    return result.final_loss, *result.last.values.values()


def train_differently() -> None:
    """Start a run in which this process holds an adapter of another seed than the first."""
    setup = set_up("LoRA")
    adapter = tt.attach(setup.adapter.model, tt.LoRA(rank=2), name="other", seed=_rank())
    setup.adapter.trainable = False
    fit(Setup(setup.model, adapter))


def train_with_trainer(name: str, folder: str, batch: int, cut: int | None) -> tuple[list[float], str]:
    """Train 12 rows with the Trainer; returns its losses, and a hash of the adapter. `cut`: resume from there."""
    setup = set_up(name, dropout=0.0)
    args = trainer_arguments(
        Path(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=1, max_grad_norm=0.0
    )
    trainer = make_trainer(setup, args, count=12)
    trainer.train(resume_from_checkpoint=None if cut is None else str(Path(folder, f"checkpoint-{cut}")))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, adapter_bits(setup.adapter)


# The command line


def make_inputs(folder: Path) -> None:
    """Write a tiny model without dropout, its tokenizer and data."""
    from test_cli import ROWS, make_bert, save_model, write_csv

    model = make_bert()
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    save_model(folder / "model", model)
    write_csv(folder / "data.csv", ("text", "label"), ROWS * 5)


def command_line(*arguments: str, status: int = 0) -> None:
    """Run `trimtab train` here; raises SystemExit with what it said where it ends with another status."""
    from trimtab.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        found = main(["train", *arguments])
    if found != status:
        raise SystemExit(said.getvalue())


def stopped_command_line(step: int, *arguments: str) -> None:
    """Run `trimtab train` here, where the main process gets a Ctrl-C in a step; all have to stop after the same one."""
    from test_cli import interrupting

    told = interrupting(step if _rank() == 0 else -1)
    with mock.patch("trimtab.cli.train.shown_progress", return_value=told):
        command_line(*arguments, status=130)
