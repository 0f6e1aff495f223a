"""Two processes compute what one computes: DistributedDataParallel and FSDP2, the loop, the Trainer, the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepspeed_runs
import distributed_runs as runs
import trimtab as tt
import warm
import zoo
from method_runs import METHODS, loop_state
from trimtab.errors import SettingError, TrainingError
from trimtab.interop.transformers import _refuse_unfit
from trimtab.training.processes import Processes, _check_sharding, current_processes, make_accelerator

# What cannot work, and why; everything else has to.
REFUSED = {("LadderSideTuning", "FSDP2"): "is sharded by itself"}


def expect_alike(names: list[str], way: str) -> None:
    found = runs.compared(names, way)
    assert {name: text for name, pair in found.items() if (text := runs.problems(*pair, way))} == {}
    refused = {name: two.refusal for name, (_, two) in found.items() if two.refusal}
    expected = {name: reason for (name, where), reason in REFUSED.items() if where == way and name in names}
    assert refused.keys() == expected.keys()
    assert all(expected[name] in text for name, text in refused.items())


@pytest.mark.parametrize("way", runs.WAYS)
def test_two_processes_compute_what_one_computes(way: str) -> None:
    expect_alike(["LoRA"], way)


@pytest.mark.slow
@pytest.mark.parametrize("way", runs.WAYS)
def test_every_method_in_two_processes(way: str) -> None:
    """Losses, figures, the gathered file, and a resumed run in the same bits; or the refusal that is known."""
    expect_alike(METHODS, way)


@pytest.mark.parametrize(("items", "count"), [(7, 3), (6, 2), (1, 2), (2, 4)])
def test_work_is_spread_evenly_and_gathered_in_order(items: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[list[int]] = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: shares.append(own[0]) or shares)
    calls: list[list[int]] = []
    for index in range(count):
        calls.append([])
        gathered = []
        try:
            gathered = Processes(index, count).spread(lambda n, seen=calls[-1]: seen.append(n) or n * n, range(items))
        except IndexError:
            assert index < count - 1, "only the last one finds every share"
    assert gathered == [n * n for n in range(items)]
    assert {len(seen) for seen in calls} == {-(-items // count)}
    assert {n for seen in calls for n in seen} == set(range(items))


@pytest.mark.slow
def test_each_row_is_seen_once_in_an_epoch() -> None:
    seen = warm.together(runs.rows_seen)
    assert all(seen)
    assert sorted(seen[0] + seen[1]) == sorted(runs.all_rows())
    with pytest.raises(AssertionError, match="process 1 holds another model or adapter than process 0"):
        warm.together(runs.train_differently)


@pytest.mark.slow
def test_the_trainer_in_two_processes(tmp_path: Path) -> None:
    """With a penalty, a schedule, and a run that goes on from a checkpoint of both."""
    alone = warm.call(runs.train_with_trainer, "AdaLoRA", str(tmp_path / "one"), 6, None)
    two = warm.together(runs.train_with_trainer, "AdaLoRA", str(tmp_path / "two"), 3, None)
    resumed = warm.together(runs.train_with_trainer, "AdaLoRA", str(tmp_path / "two"), 3, 3)
    assert two[0] == two[1]
    assert runs.apart(two[0][0], alone[0]) <= runs.TOLERANCE
    assert resumed == two
    assert sorted(path.name for path in (tmp_path / "two/checkpoint-6").iterdir()) == [
        "README.md", "adapter.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt",
        "trainer_state.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_generated_texts_are_gathered_too() -> None:
    alone = runs.sequences()
    assert warm.together(runs.sequences) == [pytest.approx(alone, rel=runs.TOLERANCE)] * 2
    assert alone[-1] > 0
    with pytest.raises(AssertionError, match="they would wait for each other forever"):
        warm.together(runs.sequences, environment=runs.WAYS["FSDP2"])


# The commands

LAUNCHERS: dict[str, list[str]] = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", "--use_fsdp", "--fsdp_version=2", "--fsdp_transformer_layer_cls_to_wrap=BertLayer",
    ],
}  # fmt: skip


def launched(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    port = ["--main_process_port", str(warm.free_port())] if "accelerate" in launcher[0] else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", *launcher, *port, "-m", "trimtab.cli", "train", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.mark.slow
def test_the_command_line_runs_unchanged_under_launchers(tmp_path: Path) -> None:
    runs.make_inputs(tmp_path)
    options = [
        str(tmp_path / "model"), str(tmp_path / "data.csv"), "--method", "AdaLoRA", "--steps", "6", "--batch-size", "4",
        "--evaluate-every", "3", "--checkpoint-every", "2", "--validation", "0.3", "--test", "0.2",
    ]  # fmt: skip
    warm.call(runs.command_line, *options, "--output", str(tmp_path / "alone"))
    for name, launcher in LAUNCHERS.items():
        ended = launched(launcher, *options, "--output", str(tmp_path / name))
        assert ended.stdout.count("result") == ended.stdout.count("trained ") == 1
        assert [ended.stderr.count(f"step {step}/6") for step in (1, 3, 6)] == [1, 1, 1]
        compare_reports(tmp_path / name, tmp_path / "alone")
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "README.md", "adapter.safetensors", "checkpoints", "run.json",
        ]  # fmt: skip


def compare_reports(found: Path, expected: Path) -> None:
    reports = [json.loads((folder / "run.json").read_text())["report"] for folder in (found, expected)]
    values = [[r["final_loss"], *r["metrics"]["values"].values(), *r["baseline"]["values"].values()] for r in reports]
    assert runs.apart(*values) <= runs.TOLERANCE
    assert reports[0]["evaluated_on"] == "test"


@pytest.mark.slow
def test_the_command_line_resumes_in_two_processes(tmp_path: Path) -> None:
    runs.make_inputs(tmp_path)
    options = (
        str(tmp_path / "model"), str(tmp_path / "data.csv"), "--method", "AdaLoRA", "--set", "dropout=0.1", "--steps",
        "6", "--batch-size", "4", "--checkpoint-every", "2", "--output",
    )  # fmt: skip
    warm.together(runs.command_line, *options, str(tmp_path / "whole"))
    warm.together(runs.stopped_command_line, 3, *options, str(tmp_path / "cut"))
    assert json.loads((tmp_path / "cut/run.json").read_text())["report"] is None
    warm.together(runs.command_line, "--resume", "--output", str(tmp_path / "cut"))
    assert loop_state(tmp_path / "cut") == loop_state(tmp_path / "whole")


# Refusals


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ({"fsdp_version": 1}, r"fsdp_version=1, which flattens the adapter.*Use fsdp_version=2"),
        ({"activation_checkpointing": True}, r"wraps the blocks that carry the adapter. Call model.gradient_checkp"),
    ],
)
def test_settings_of_fsdp_that_change_the_result_are_refused(plugin: dict[str, Any], message: str) -> None:
    settings = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": True} | plugin
    with pytest.raises(SettingError, match=message):
        _check_sharding(SimpleNamespace(**settings), "classification")


def test_processes_that_would_train_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = SimpleNamespace(process_index=0, num_processes=1)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)
    with pytest.raises(TrainingError, match="2 processes were started together, but accelerate joins 1"):
        current_processes()
    args = SimpleNamespace(n_gpu=0, world_size=1)
    with pytest.raises(TrainingError, match=r"2 processes were started together, but Trainer sees 1.*use_cpu=True"):
        _refuse_unfit(SimpleNamespace(args=args, is_fsdp_enabled=False, is_deepspeed_enabled=False))


def test_the_loop_refuses_deepspeed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = SimpleNamespace(value="DEEPSPEED")
    monkeypatch.setattr("accelerate.Accelerator", lambda cpu: SimpleNamespace(distributed_type=kind))
    with pytest.raises(SettingError, match=r"does not train with DEEPSPEED\. DeepSpeed keeps gradients and steps to"):
        make_accelerator("classification")


# DeepSpeed, where it is installed


@pytest.mark.slow
def test_a_schedule_that_deepspeed_would_never_run_stops(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; docs/distributed.md says how to use it")
    with pytest.raises(AssertionError, match="the schedule of AdaLoRA would never run"):
        warm.together(
            deepspeed_runs.losses_of, 2, "AdaLoRA", str(tmp_path), environment={"DS_ACCELERATOR": "cpu"}, seconds=600
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loop_of_ones_own_with_deepspeed(stage: int, tmp_path: Path) -> None:
    """Its losses are those of one process, and so is the file; stage 3 leaves nothing to save, which is refused."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; docs/distributed.md says how to use it")
    alone, setup = deepspeed_runs.losses_alone("LoRA", 2)
    # On CPUs it compiles its communication the first time, which takes minutes.
    found = warm.together(
        deepspeed_runs.losses_of, stage, "LoRA", str(tmp_path), environment={"DS_ACCELERATOR": "cpu"}, seconds=600
    )
    for (losses, said), expected in zip(found, alone, strict=True):
        assert runs.apart(losses, expected) <= runs.TOLERANCE
        assert ("is empty: another library holds its numbers (DeepSpeed ZeRO stage 3)" in said) == (stage == 3), said
        assert bool(said) == (stage == 3)
    if stage == 3:
        return
    loaded = tt.load(zoo.ZOO[setup.model](3, 0.0).model, tmp_path / "0")
    for one, two in zip(loaded.parameters(), setup.adapter.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), two.detach(), rtol=1e-3, atol=1e-5)
