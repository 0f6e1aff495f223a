"""The training loop: its steps, exact resuming, checkpoints that survive a kill, the best state, refusals."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor

import trimtab as tt
import zoo
from trimtab.adapter_file import read_adapter_file
from trimtab.errors import AdapterFileError, SettingError, TrainingError
from trimtab.methods.weight.lora import LoRA
from trimtab.training.batches import Loader, make_loader
from trimtab.training.causal_lm import CausalLM
from trimtab.training.checkpoints import STATE_NAME, newest_checkpoint
from trimtab.training.classification import Classification
from trimtab.training.encoding import IGNORED, Encoded
from trimtab.training.errors import Interrupted
from trimtab.training.loop import LoopSettings, Progress, TrainingResult, train
from trimtab.training.metrics import Metrics

TEXTS = CausalLM(text="text")
CLASSES = Classification("text", "label", ("a", "b", "c"))


def make_rows(kind: str, count: int = 22, seed: int = 0) -> Encoded:
    """Rows of 3 to 9 random tokens; labels are the tokens after the first two ("text"), or classes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    inputs = tuple(torch.randint(3, zoo.VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths)
    labels = tuple(
        torch.cat([torch.full((2,), IGNORED, dtype=torch.int32), row[2:]]) if kind == "text" else row[0] % zoo.CLASSES
        for row in inputs
    )
    return Encoded("rows", inputs, labels, 16, 0, 9, 0, decode=lambda ids: [])


def make_adapter(dropout: float = 0.0, method: tt.Method | None = None, kind: str = "text") -> tt.Adapter:
    model = (zoo.llama if kind == "text" else zoo.bert)(seed=3, dropout=dropout).model
    return tt.attach(model, method or LoRA(rank=2))


def fit(adapter: tt.Adapter, settings: LoopSettings, *, rows: Encoded | None = None, **others: Any) -> TrainingResult:
    validation = others.pop("validation", None)
    return train(adapter.model, adapter, TEXTS, rows or make_rows("text"), validation, settings, **others)


def state_hash(adapter: tt.Adapter) -> str:
    """A hash of every bit of the adapter's tensors."""
    digest = hashlib.sha256()
    for name, tensor, _ in adapter.named_tensors():
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def written(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


SETTINGS = LoopSettings(lr=1e-2, steps=6, batch_size=4, warmup=0.3)


class Stop(BaseException):
    """Thrown by a test out of the loop, as a crash would; nothing that handles errors may handle it."""


def crash_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise Stop

    return on_progress


# ---------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_loop_makes_the_steps_that_a_loop_by_hand_makes(schedule: Any) -> None:
    rows = make_rows("text")
    settings = replace(SETTINGS, schedule=schedule, weight_decay=0.1, clip=0.5)
    adapter, by_hand = make_adapter(), make_adapter()
    losses: list[float] = []
    result = fit(adapter, settings, rows=rows, on_progress=lambda progress: losses.append(progress.loss))

    optimizer = torch.optim.AdamW(by_hand.parameter_groups(1e-2, 0.1), lr=1e-2)
    order = [batch for epoch in range(2) for batch in make_loader(rows, 4).order.batches(epoch)][:6]
    expected = []
    for index, batch in enumerate(order):
        loss = by_hand.model(**rows.collate(batch)).loss
        loss.backward()
        expected.append(loss.item())
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        share = (index - 2) / 4
        falling = {"linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share)), "constant": 1.0}[schedule]
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((index + 1) / 3 if index < 2 else falling)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == expected
    assert state_hash(adapter) == state_hash(by_hand)
    assert (result.steps, result.final_loss, result.resumed_from) == (6, expected[-1], 0)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_accumulated_micro_batches_count_by_their_tokens(kind: str) -> None:
    """Four unequal micro-batches give the step that all their rows in one batch give."""
    rows, task = make_rows(kind, count=14), TEXTS if kind == "text" else CLASSES
    losses: dict[int, list[float]] = {}
    tensors: dict[int, list[Tensor]] = {}
    for size, accumulation in ((4, 4), (14, 1)):
        adapter = make_adapter(kind=kind)
        settings = LoopSettings(lr=1e-2, epochs=3, batch_size=size, accumulation=accumulation)
        seen = losses.setdefault(size, [])
        train(adapter.model, adapter, task, rows, None, settings, on_progress=lambda p, seen=seen: seen.append(p.loss))
        tensors[size] = [tensor.detach().clone() for tensor in adapter.parameters()]
    assert len(losses[4]) == 3
    torch.testing.assert_close(losses[4], losses[14], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tensors[4], tensors[14], rtol=1e-3, atol=1e-5)


class Penalised(LoRA):
    """LoRA with the sum of squares of every A as its penalty."""

    def penalty(self, part: Any) -> Tensor:
        return torch.stack([(leaf.A**2).sum() for leaf in part.leaves]).sum()


def test_the_penalty_counts_once_whatever_the_accumulation() -> None:
    tensors = []
    for size, accumulation in ((4, 4), (14, 1)):
        adapter = make_adapter(method=Penalised(rank=2))
        fit(
            adapter,
            LoopSettings(lr=1e-2, steps=3, batch_size=size, accumulation=accumulation),
            rows=make_rows("text", 14),
        )
        tensors.append([tensor.detach().clone() for tensor in adapter.parameters()])
    torch.testing.assert_close(tensors[0], tensors[1], rtol=1e-3, atol=1e-5)
    plain = make_adapter()
    fit(plain, LoopSettings(lr=1e-2, steps=3, batch_size=14), rows=make_rows("text", 14))
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(plain.parameters(), tensors[1], strict=True))


def test_training_leaves_the_model_the_generators_and_the_optimizer_as_they_were() -> None:
    adapter = make_adapter(dropout=0.1)
    base = {name: tensor.clone() for name, tensor in adapter.model.named_parameters() if "trimtab" not in name}
    modes = [module.training for module in adapter.model.modules()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fit(adapter, SETTINGS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert [module.training for module in adapter.model.modules()] == modes
    assert adapter.binding is None
    assert all(torch.equal(dict(adapter.model.named_parameters())[name], tensor) for name, tensor in base.items())
    fit(adapter, SETTINGS)  # and it can be trained again
    assert adapter.steps == 6


def test_progress_tells_what_happened() -> None:
    told: list[Progress] = []
    result = fit(
        make_adapter(), replace(SETTINGS, evaluate_every=3), validation=make_rows("text", 5, 1), on_progress=told.append
    )
    assert [(p.step, p.total_steps) for p in told] == [(n, 6) for n in range(1, 7)]
    assert [p.metrics is not None for p in told] == [False, False, True, False, False, True]
    assert told[-1].remaining == 0
    assert told[0].remaining > 0
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(told))
    assert told[-1].examples_per_second > 0
    assert result.peak_bytes >= told[-1].peak_bytes > 10 * 2**20
    assert result.last == told[-1].metrics


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, stop: int) -> None:
    """Dropout, accumulation, evaluation and the optimizer's moments included; also the files are the same."""
    settings = LoopSettings(
        lr=1e-2, steps=7, batch_size=4, accumulation=2, checkpoint_every=1, evaluate_every=2, group_by_length=True
    )
    others: dict[str, Any] = {"validation": make_rows("text", 6, 1)}
    whole = make_adapter(dropout=0.2)
    expected = fit(whole, settings, output=tmp_path / "whole", **others)
    with pytest.raises(Stop):
        fit(make_adapter(dropout=0.2), settings, output=tmp_path / "cut", on_progress=crash_at(stop), **others)
    resumed = make_adapter(dropout=0.2)
    torch.manual_seed(99)
    result = fit(resumed, settings, output=tmp_path / "cut", resume=True, **others)
    assert state_hash(resumed) == state_hash(whole)
    assert result == replace(expected, resumed_from=stop, seconds=result.seconds, peak_bytes=result.peak_bytes)
    whole_files, cut_files = written(tmp_path / "whole"), written(tmp_path / "cut")
    assert whole_files.keys() == cut_files.keys()
    assert whole_files["adapter.safetensors"] == cut_files["adapter.safetensors"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_training_loop import *
def on_progress(progress):
    if progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
settings = LoopSettings(lr=1e-2, steps=7, batch_size=4, checkpoint_every=1)
fit(make_adapter(dropout=0.2), settings, output=Path(sys.argv[1]), on_progress=on_progress)
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program = KILLED.format(tests=str(Path(__file__).parent))
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        settings = LoopSettings(lr=1e-2, steps=7, batch_size=4, checkpoint_every=1)
        resumed, whole = make_adapter(dropout=0.2), make_adapter(dropout=0.2)
        assert fit(resumed, settings, output=tmp_path, resume=True).resumed_from == 4
        fit(whole, settings)
        assert state_hash(resumed) == state_hash(whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_a_checkpoint_cut_anywhere_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Every rename, read-back and flush of a file in turn dies; what is left resumes to the same bits."""
    settings = replace(SETTINGS, checkpoint_every=2)
    whole = make_adapter()
    fit(whole, settings)
    with pytest.raises(Stop):
        fit(make_adapter(), settings, output=tmp_path, on_progress=crash_at(2))

    calls = 0

    def dying(real: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= fails_at:
                raise Stop
            return real(*args)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying(os.replace))
        patched.setattr(os, "fsync", dying(os.fsync))
        with pytest.raises(Stop):
            fit(make_adapter(), settings, output=tmp_path, resume=True)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    resumed = make_adapter()
    assert fit(resumed, settings, output=tmp_path, resume=True).resumed_from in (2, 4)
    assert state_hash(resumed) == state_hash(whole)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_the_newest_checkpoint_is_whole_at_every_moment(tmp_path: Path) -> None:
    """Looks at the folder before and after each call that can change it: what a kill there would leave."""
    changing = {"mkdir", "open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "copyfile", "sendfile"}
    looks: list[str] = []

    def look(frame: Any, event: str, function: Any) -> None:
        if event.startswith("c_") and function.__name__ in changing:
            newest = newest_checkpoint(tmp_path)
            if newest is not None:
                read_adapter_file(newest)
                with safetensors.safe_open(newest / STATE_NAME, framework="pt") as state:
                    assert state.keys()
            looks.append("none" if newest is None else newest.name)

    sys.setprofile(look)
    try:
        fit(make_adapter(), replace(SETTINGS, steps=2, checkpoint_every=1), output=tmp_path)
    finally:
        sys.setprofile(None)
    # In order, and each seen more than once: the old one stays until the new one is there.
    assert [name for name, _ in itertools.groupby(looks)] == ["none", "step-00000001", "step-00000002"]
    assert all(looks.count(name) > 5 for name in set(looks))


def test_a_finished_run_resumes_to_its_own_result(tmp_path: Path) -> None:
    validation = make_rows("text", 6, 1)
    first = make_adapter()
    expected = fit(first, SETTINGS, output=tmp_path, validation=validation)
    again = make_adapter()
    result = fit(again, SETTINGS, output=tmp_path, validation=validation, resume=True)
    assert state_hash(again) == state_hash(first)
    assert replace(result, peak_bytes=0) == replace(expected, resumed_from=6, peak_bytes=0, seconds=result.seconds)
    loaded = tt.load(zoo.llama(seed=3).model, tmp_path)
    assert state_hash(loaded) == state_hash(first)


def test_checkpoints_hold_adapter_and_state_without_the_base_and_without_pickle(tmp_path: Path) -> None:
    adapter = make_adapter()
    fit(adapter, SETTINGS, output=tmp_path)
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    assert {file.name for file in folder.iterdir()} == {"adapter.safetensors", "README.md", STATE_NAME}
    for file in folder.glob("*.safetensors"):
        header = json.loads(file.read_bytes()[8:][: int.from_bytes(file.read_bytes()[:8], "little")])
        numbers = sum(math.prod(entry["shape"]) for name, entry in header.items() if name.startswith("optimizer/"))
        assert numbers in (0, 2 * adapter.trainable_count + len(list(adapter.parameters())))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(
            Interrupted, match=r"after step 3 of 6. The checkpoint is .*step-00000003; go on with resume=True"
        ):
            fit(make_adapter(dropout=0.2), SETTINGS, output=tmp_path, on_progress=press)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(Interrupted, match="No output folder was given: nothing was saved"):
            fit(make_adapter(), SETTINGS, on_progress=press)
    finally:
        signal.signal(signal.SIGINT, before)
    resumed, whole = make_adapter(dropout=0.2), make_adapter(dropout=0.2)
    fit(resumed, SETTINGS, output=tmp_path, resume=True)
    fit(whole, SETTINGS)
    assert state_hash(resumed) == state_hash(whole)


# ----------------------------------------------------------------------------------------------------------- validation


class Scripted(CausalLM):
    """A task whose validation losses are given, whatever the model."""

    losses: Iterator[float] = iter(())

    def evaluate(self, model: Any, loader: Loader) -> Metrics:
        return Metrics("loss", False, {"loss": next(type(self).losses)}, len(loader.encoded))


def test_the_state_that_was_best_is_restored_also_after_resuming(tmp_path: Path) -> None:
    rows, settings = make_rows("text"), replace(SETTINGS, evaluate_every=1, checkpoint_every=1)
    seen: dict[int, str] = {}

    def run(adapter: tt.Adapter, losses: list[float], on_progress: Callable[[Progress], None], **others: Any) -> Any:
        Scripted.losses = iter(losses)
        task = Scripted(text="text")
        return train(adapter.model, adapter, task, rows, rows, settings, on_progress=on_progress, **others)

    adapter = make_adapter()
    script = [3.0, 1.0, 2.0, 1.0, 4.0, 5.0]
    result = run(adapter, script, lambda p: seen.update({p.step: state_hash(adapter)}))
    assert len(set(seen.values())) == 6
    assert state_hash(adapter) == seen[2]
    assert (result.best.value, result.last.value) == (1.0, 5.0)
    with pytest.raises(Stop):
        run(make_adapter(), script, crash_at(4), output=tmp_path)
    resumed = make_adapter()
    result = run(resumed, script[4:], lambda p: None, output=tmp_path, resume=True)
    assert state_hash(resumed) == seen[2]
    assert (result.best.value, result.last.value) == (1.0, 5.0)
    assert state_hash(tt.load(zoo.llama(seed=3).model, tmp_path)) == seen[2]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_loss_that_is_not_a_number_stops_with_the_step_named(tmp_path: Path) -> None:
    adapter = make_adapter()
    states: dict[int, str] = {}

    def poison(progress: Progress) -> None:
        states[progress.step] = state_hash(adapter)
        if progress.step == 2:
            adapter.model.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"loss of step 3 of 6 is nan.*The last checkpoint is .*step-00000002"):
        fit(adapter, replace(SETTINGS, checkpoint_every=2), output=tmp_path, on_progress=poison)
    assert state_hash(adapter) == states[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": None}, "give either steps or epochs"),
        ({"epochs": 1.0}, "give either steps or epochs"),
        ({"lr": 0.0}, r"lr=0.0; it must be a number above 0"),
        ({"lr": math.nan}, r"lr=nan"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"warmup": 1.0}, "warmup=1.0; it is a share"),
        ({"schedule": "step"}, "choose one of linear, cosine, constant"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        replace(SETTINGS, **changed)


def test_another_run_is_neither_overwritten_nor_resumed(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds no checkpoint to resume from"):
        fit(make_adapter(), SETTINGS, output=tmp_path, resume=True)
    with pytest.raises(SettingError, match="needs the output folder"):
        fit(make_adapter(), SETTINGS, resume=True)
    fit(make_adapter(), SETTINGS, output=tmp_path)
    before = written(tmp_path)
    with pytest.raises(SettingError, match="step-00000006 of an earlier run, which would be overwritten"):
        fit(make_adapter(), SETTINGS, output=tmp_path)
    with pytest.raises(SettingError, match=r"another run \(lr: 0.01 then, 0.02 now\)"):
        fit(make_adapter(), replace(SETTINGS, lr=0.02), output=tmp_path, resume=True)
    with pytest.raises(SettingError, match=r"another run \(data: "):
        fit(make_adapter(), SETTINGS, rows=make_rows("text", seed=5), output=tmp_path, resume=True)
    with pytest.raises(AdapterFileError, match="its method is"):
        fit(make_adapter(method=LoRA(rank=3)), SETTINGS, output=tmp_path, resume=True)
    assert written(tmp_path) == before


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    fit(make_adapter(), SETTINGS, output=tmp_path)
    folder = newest_checkpoint(tmp_path)
    assert folder is not None
    file = folder / STATE_NAME
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(AdapterFileError, match="is not a readable training state"):
        fit(make_adapter(), SETTINGS, output=tmp_path, resume=True)


def test_an_adapter_that_cannot_train_is_refused() -> None:
    adapter, other = make_adapter(), make_adapter()
    with pytest.raises(TrainingError, match="attached to another model"):
        train(other.model, adapter, TEXTS, make_rows("text"), None, SETTINGS)
    for name in ("trainable", "active"):
        setattr(adapter, name, False)
        with pytest.raises(TrainingError, match=f"{name}=False"):
            fit(adapter, SETTINGS)
        setattr(adapter, name, True)
    fit(adapter, SETTINGS)
    adapter.merge()
    with pytest.raises(TrainingError, match="merged=True"):
        fit(adapter, SETTINGS)


# ---------------------------------------------------------------------------------------------------- several processes

DISTRIBUTED = """
import signal, sys
sys.path.insert(0, {tests!r})
import torch.distributed
from test_training_loop import *

def press(progress):
    if progress.step == 2:
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
output, dropout, mode = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
adapter = make_adapter(method=Penalised(rank=2), dropout=dropout)
try:
    result = fit(adapter, SHARED_SETTINGS, rows=make_rows("text", 13), output=output,
                 resume=mode == "resume", on_progress=press if mode == "stop" else None)
    words = f"finished {{state_hash(adapter)}} {{result.final_loss}}"
except Interrupted as error:
    words = f"interrupted {{error}}"
Path(sys.argv[4] + os.environ["RANK"]).write_text(words)
torch.distributed.destroy_process_group()
"""
# The last micro-batch of an epoch has one row: one process has nothing to do there.
SHARED_SETTINGS = LoopSettings(lr=1e-2, steps=5, batch_size=3, accumulation=2)


def run_two_processes(output: Path, dropout: float, mode: str) -> list[str]:
    """Returns the last words of both processes."""
    program = output.parent / "program.py"
    program.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = [str(output), str(dropout), mode, str(output.parent / f"{mode}-words-")]
    done = subprocess.run(
        command + arguments, capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [Path(arguments[-1] + rank).read_text() for rank in ("0", "1")]


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(tmp_path: Path) -> None:
    words = run_two_processes(tmp_path / "two", 0.0, "whole")
    assert words[0] == words[1]
    alone = make_adapter(method=Penalised(rank=2))
    result = fit(alone, SHARED_SETTINGS, rows=make_rows("text", 13))
    _, tensors = read_adapter_file(tmp_path / "two")
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-3, atol=1e-5)
    assert float(words[0].split()[-1]) == pytest.approx(result.final_loss, rel=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole = run_two_processes(tmp_path / "whole", 0.2, "whole")
    stopped = run_two_processes(tmp_path / "cut", 0.2, "stop")
    assert all("interrupted training was stopped after step 3 of 5" in words for words in stopped)
    assert run_two_processes(tmp_path / "cut", 0.2, "resume") == whole
    assert len(set(whole)) == 1
