"""transformers' Trainer and TRL's SFTTrainer with an attached model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

import trimtab as tt
import zoo
from test_training_loop import Penalised, make_adapter, make_rows, state_hash
from trimtab.errors import AttachError, TrainingError
from trimtab.interop.transformers import TrimtabCallback, TrimtabTrainer, _check_complete, _newest_complete
from trimtab.interop.trl import TrimtabSFTTrainer
from trimtab.methods.weight.adalora import AdaLoRA
from trimtab.methods.weight.lora import LoRA

ROWS = make_rows("text", 12)


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, features: list[dict[str, int]]) -> dict[str, Tensor]:
        batch = ROWS.collate([feature["row"] for feature in features])
        self.batches.append(batch)
        return dict(batch)


def arguments(output: Path, **changed: Any) -> Any:
    chosen = {
        "output_dir": str(output), "max_steps": 6, "per_device_train_batch_size": 3, "learning_rate": 1e-2,
        "warmup_steps": 2, "logging_steps": 1, "save_steps": 2, "report_to": [], "disable_tqdm": True,
        "remove_unused_columns": False, "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return transformers.TrainingArguments(**chosen | changed)


def make_trainer(adapter: tt.Adapter, args: Any, kind: Any = TrimtabTrainer, **others: Any) -> Any:
    rows = [{"row": index} for index in range(len(ROWS))]
    trainer = kind(adapter.model, args, data_collator=Recorder(), train_dataset=rows, eval_dataset=rows[:4], **others)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_makes_the_steps_that_a_loop_by_hand_makes(tmp_path: Path, accumulation: int) -> None:
    """With LoRA+'s two learning rates and a penalty, which counts once for each optimizer step."""
    method = Penalised(rank=2, b_lr_ratio=4.0)
    adapter, by_hand = make_adapter(method=method), make_adapter(method=method)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, weight_decay=0.1)
    trainer = make_trainer(adapter, args)
    trainer.train()

    optimizer = torch.optim.AdamW(by_hand.parameter_groups(1e-2, 0.1))
    assert len({group["lr"] for group in optimizer.param_groups}) == 2
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 6)
    batches, expected = trainer.data_collator.batches[: 6 * accumulation], []  # the loader prepares one more
    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        terms = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in group]
        losses = [by_hand.model(**batch).loss * n / sum(terms) for batch, n in zip(group, terms, strict=True)]
        penalty = by_hand.penalty()
        assert penalty is not None
        loss = torch.stack(losses).sum() + penalty
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.testing.assert_close(losses_of(trainer), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(adapter.parameters()), list(by_hand.parameters()), rtol=1e-3, atol=1e-5)
    assert adapter.binding is None
    assert adapter.steps == 6


def adalora() -> tt.Method:
    """A method with a schedule, a penalty, and state that only training checkpoints hold."""
    return AdaLoRA(rank=2, initial_rank=3, warmup_steps=1, final_steps=2, interval=1)


def lora() -> tt.Method:
    return LoRA(rank=2)


@pytest.mark.parametrize("method", [lora, adalora])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, method: Callable[[], tt.Method]) -> None:
    whole = make_adapter(0.2, method())
    make_trainer(whole, arguments(tmp_path / "whole")).train()
    cut = make_adapter(0.2, method())
    stopping = make_trainer(cut, arguments(tmp_path / "cut"), callbacks=[StopAfter(4)])
    stopping.train()
    assert state_hash(cut) != state_hash(whole)
    # A process that dies while a checkpoint is being written leaves one without a state: the one before is taken.
    (tmp_path / "cut" / "checkpoint-5").mkdir()
    make_adapter().save(tmp_path / "cut" / "checkpoint-5", training=True)
    for resume in (True, str(tmp_path / "cut" / "checkpoint-2")):
        resumed = make_adapter(0.2, method())
        trainer = make_trainer(resumed, arguments(tmp_path / "cut"))
        trainer.train(resume_from_checkpoint=resume)
        assert state_hash(resumed) == state_hash(whole)
        assert trainer.state.global_step == resumed.steps == 6
        for newer in (tmp_path / "cut").glob("checkpoint-6/trainer_state.json"):
            newer.unlink()


def test_a_complete_run_that_is_resumed_makes_no_other_step(tmp_path: Path) -> None:
    """The arguments' batch leaves the last epoch unfinished: transformers alone would go on in it."""
    make_trainer(make_adapter(0.2, adalora()), arguments(tmp_path)).train()
    resumed = make_adapter(0.2, adalora())
    trainer = make_trainer(resumed, arguments(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == resumed.steps == 6
    assert state_hash(resumed) == state_hash(tt.load(zoo.llama(seed=3).model, tmp_path / "checkpoint-6"))


class StopAfter(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_an_incomplete_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    adapter = make_adapter()
    trainer = make_trainer(adapter, arguments(tmp_path, max_steps=4, save_only_model=True))
    trainer.train()
    before = state_hash(adapter)
    with pytest.raises(TrainingError, match=r"checkpoint-4: lacks optimizer.pt, scheduler.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(TrainingError, match=r"holds no complete checkpoint to resume from \(2 incomplete\)"):
        trainer.train(resume_from_checkpoint=True)
    assert state_hash(adapter) == before


@pytest.mark.parametrize("name", ["trainer_state.json", "rng_state.pth", "optimizer.pt"])
def test_a_file_that_was_cut_makes_its_checkpoint_incomplete(name: str, tmp_path: Path) -> None:
    """Trainer writes in place: a kill may leave any part of a file."""
    make_trainer(make_adapter(), arguments(tmp_path, max_steps=4)).train()
    whole = (tmp_path / "checkpoint-4" / name).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        (tmp_path / "checkpoint-4" / name).write_bytes(whole[:size])
        with pytest.raises(TrainingError, match=rf"checkpoint-4: lacks {name}, without which"):
            _check_complete(tmp_path / "checkpoint-4")
    assert _newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")


def test_checkpoints_hold_no_base_weights(tmp_path: Path) -> None:
    adapter = make_adapter()
    trainer = make_trainer(adapter, arguments(tmp_path))
    trainer.train()
    trainer.save_model()
    base = sum(p.numel() * p.element_size() for n, p in adapter.model.named_parameters() if "trimtab" not in n)
    assert {file.name for file in (tmp_path / "checkpoint-6").iterdir()} == {
        "adapter.safetensors", "README.md", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    weights = tmp_path / "checkpoint-6" / "adapter.safetensors"
    assert weights.stat().st_size < 4 * adapter.trainable_count + 12_000 < base
    loaded = tt.load(zoo.llama(seed=3).model, tmp_path)
    assert state_hash(loaded) == state_hash(adapter)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    adapter = make_adapter()
    args = arguments(
        tmp_path, learning_rate=0.3, max_steps=8, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer = make_trainer(adapter, args)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-8", "the last state is the best: choose a learning rate at which it is not"
    assert state_hash(adapter) == state_hash(tt.load(zoo.llama(seed=3).model, best))
    assert state_hash(adapter) != state_hash(tt.load(zoo.llama(seed=3).model, tmp_path / "checkpoint-8"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_evaluation_loss_is_without_the_penalty(tmp_path: Path) -> None:
    plain, penalised = make_adapter(), make_adapter(method=Penalised(rank=2))
    found = [make_trainer(a, arguments(tmp_path)).evaluate()["eval_loss"] for a in (plain, penalised)]
    assert found[0] == found[1]


def test_the_callback_binds_any_trainer_and_saves_the_adapter(tmp_path: Path) -> None:
    own, ours = make_adapter(method=adalora()), make_adapter(method=adalora())
    args = arguments(tmp_path / "own", save_strategy="no", max_grad_norm=0.0)
    make_trainer(own, args, transformers.Trainer, callbacks=[TrimtabCallback()]).train()
    make_trainer(ours, arguments(tmp_path / "ours", max_grad_norm=0.0)).train()
    torch.testing.assert_close(list(own.parameters()), list(ours.parameters()), rtol=1e-4, atol=1e-6)
    saved = tt.load(zoo.llama(seed=3).model, tmp_path / "own")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), own.parameters(), strict=True))
    assert (own.binding, own.steps) == (None, 6)
    with pytest.raises(TrainingError, match="save_strategy='steps': Trainer's own checkpoints hold the whole base"):
        make_trainer(own, arguments(tmp_path), transformers.Trainer, callbacks=[TrimtabCallback()]).train()


def test_a_plain_trainer_never_saves_a_model_that_would_reload_as_its_base(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="a plain reload would silently be the base model"):
        make_trainer(make_adapter(), arguments(tmp_path), transformers.Trainer).train()


def test_what_trainer_cannot_train_is_refused_first(tmp_path: Path) -> None:
    adapter = make_adapter()
    with pytest.raises(TrainingError, match=r"has 0 that are trainable and active \(attached: none\)"):
        TrimtabTrainer(zoo.llama().model, arguments(tmp_path))
    second = tt.attach(adapter.model, LoRA(rank=1), name="second")
    with pytest.raises(TrainingError, match=r"has 2 that are trainable and active \(attached: default, second\)"):
        make_trainer(adapter, arguments(tmp_path))
    second.trainable = False
    before = values_of(second)
    make_trainer(adapter, arguments(tmp_path, save_strategy="no")).train()
    assert all(torch.equal(a, b) for a, b in zip(before, values_of(second), strict=True))
    with pytest.raises(TrainingError, match="chooses its parameters itself"):
        make_trainer(adapter, arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": []})).train()
    adapter.model.is_quantized = True
    with pytest.raises(TrainingError, match=r"does not accept adapters inside a quantised model.*training.loop.train"):
        make_trainer(adapter, arguments(tmp_path))


def values_of(adapter: tt.Adapter) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in adapter.parameters()]


def word_tokenizer() -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, zoo.VOCABULARY)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def fine_tuned_with_trl(cls: Any, adapter: tt.Adapter, output: Path, **settings: Any) -> Any:
    texts = [" ".join(f"w{token}" for token in row.tolist()) for row in ROWS.inputs]
    args = pytest.importorskip("trl").SFTConfig(
        output_dir=str(output), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, max_length=16, save_steps=4, bf16=False, dataloader_pin_memory=False,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"text": texts})
    trainer = cls(model=adapter.model, args=args, train_dataset=rows, processing_class=word_tokenizer())
    trainer.train()
    return trainer


def test_trl_s_own_trainer_trains_and_refuses_to_save(tmp_path: Path) -> None:
    trl, adapter = pytest.importorskip("trl"), make_adapter(method=tt.LoRA(rank=2))
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    fine_tuned_with_trl(trl.SFTTrainer, adapter, tmp_path, save_strategy="no")
    assert not any(torch.equal(old, new) for old, new in zip(before, adapter.parameters(), strict=True))
    with pytest.raises(tt.AttachError, match="save_pretrained was asked for a model with the attached adapter"):
        fine_tuned_with_trl(trl.SFTTrainer, adapter, tmp_path)


def test_trl_fine_tunes_an_attached_model(tmp_path: Path) -> None:
    adapter = make_adapter(method=adalora())
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    trainer = fine_tuned_with_trl(TrimtabSFTTrainer, adapter, tmp_path)
    assert trainer.state.global_step == adapter.steps == 4
    after = dict(adapter.named_parameters())
    assert not any(torch.equal(before[name], after[name]) for name in after if not name.endswith("/E"))  # may be pruned
    assert state_hash(tt.load(zoo.llama(seed=3).model, tmp_path / "checkpoint-4")) == state_hash(adapter)
    assert "model.safetensors" not in os.listdir(tmp_path / "checkpoint-4")
