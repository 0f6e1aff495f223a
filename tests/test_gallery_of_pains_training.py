"""Gallery of pains, 1 to 11: adapters attached to the wrong thing or to nothing, and training that trains nothing.

Each test does what the users of the thread in its name did; `tests/gallery.py` makes docs/pains.md from these tests.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from adapting import moved, same_state, state
from zoo import ZOO, ZooModel


def refuses(model: nn.Module, method: tt.Method, message: str) -> None:
    """The refusal has this text and leaves the model without adapters and as it was."""
    before = state(model)
    with pytest.raises(tt.TargetError, match=message):
        tt.attach(model, method)
    assert tt.adapters(model) == {}
    assert same_state(model, before)


def train(entry: ZooModel, adapter: tt.Adapter, steps: int = 3, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=lr))
    adapter.bind(optimizer, total_steps=steps)
    for _ in range(steps):
        entry.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter.binding is not None
    adapter.binding.release()


# Attached to the wrong thing, or to nothing


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_proj", "k_porj"),
            r"no module or role is called 'k_porj'\. Did you mean 'model\.layers\.0\.self_attn\.k_pr",
        ),
        ("q_proj | lm_haed", r"no module or role is called 'lm_haed'\. Did you mean 'lm_head' or 'head'\?"),
        ("q_proj - v_prj", r"no module or role is called 'v_prj'\. Did you mean"),
        ("q_proj[0:100]", r"the model has the blocks 0 to 1, not 0 to 99\."),
    ],
    ids=["one-of-two", "whole-module", "exclusion", "layer-numbers"],
)
def test_peft_1959_a_misspelt_target_beside_a_right_one_stops(targets: str | tuple[str, ...], message: str) -> None:
    """1. A wrong target name, exclusion or layer number is accepted when another one matches.

    Every clause must match; the error names the clause, the nearest real names and the command that lists targets.
    Threads: peft#1959
    """
    refuses(ZOO["llama"](0, 0.0).model, tt.LoRA(rank=2, targets=targets), message)


def test_peft_1206_a_name_of_another_architecture_shows_what_there_is() -> None:
    """2. "Target modules not found", with no hint what exists.

    The error shows the model's own nearest names; default targets are found from structure, in any model.
    Threads: peft#1206, LlamaFactory#3597, LMFlow#125, StableLM#98, AutoGPTQ#667
    """
    message = r"called 'c_atn'\. Did you mean 'transformer\.h\.0\.attn\.c_attn' or .*"
    refuses(ZOO["gpt2"](0, 0.0).model, tt.LoRA(rank=2, targets=("c_atn", "c_proj")), message)
    for name in ZOO.keys() - {"cnn"}:  # which has convolutions only
        assert tt.plan(ZOO[name](0, 0.0).model, tt.LoRA(rank=2)).trainable > 0


def test_unsloth_6936_the_plan_shows_that_experts_are_not_reached() -> None:
    """3. Experts held as raw parameters are never reached, while the log says that LoRA is on.

    Targets are parameters; `plan` shows by share of weight what is not reached, and the role "experts" reaches them.
    Threads: unsloth#6936, unsloth#11014, peft#3009, peft#2527, peft#2545
    """
    entry = ZOO["mixtral"](0, 0.0)
    shares = {row.group: row.share for row in tt.plan(entry.model, tt.LoRA(rank=2)).coverage}
    assert (shares["attention"], shares["experts"]) == (1.0, 0.0)
    method = tt.LoRA(rank=2, targets="all-linear | experts")
    assert {row.group: row.share for row in tt.plan(entry.model, method).coverage}["experts"] == 1.0
    adapter = tt.attach(entry.model, method)
    before = {name: tensor.detach().clone() for name, tensor in adapter.named_parameters()}
    train(entry, adapter)
    experts = [name for name in before if "experts" in name]
    assert len(experts) == 8  # two blocks, two stacked weights, A and B
    assert all(not torch.equal(before[name], tensor) for name, tensor in adapter.named_parameters())


def test_unsloth_9331_embedding_and_head_stay_in_the_targets() -> None:
    """4. `embed_tokens` and `lm_head` are dropped from the targets without a word.

    The list of targets is obeyed or refused, never edited: both places have tensors, and both train.
    Threads: unsloth#9331
    """
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, tt.LoRA(rank=2, targets=("q_proj", "embed_tokens", "lm_head")))
    places = {str(site) for part in adapter.parts for site in part.sites}
    assert {"model.embed_tokens:weight", "lm_head:weight"} <= places
    before = {name: tensor.detach().clone() for name, tensor in adapter.named_parameters()}
    train(entry, adapter)
    assert all(not torch.equal(before[name], tensor) for name, tensor in adapter.named_parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_axolotl_3806_dropout_does_not_leave_the_fused_path(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """5. The fast path is off, and nobody says so: with dropout, for an unlike layout, in a new version.

    The fused function is taken by structure alone, also with dropout: no adapted linear map is called beside it.
    Threads: axolotl#3806, unsloth#5865, unsloth#803, unsloth#2369
    """
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, tt.LoRA(rank=2, dropout=dropout))
    entry.model.train()
    called: list[nn.Module] = []
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append(self) or plain(self, x))
    fused: list[int] = []
    original = tt.LoRA.fused
    monkeypatch.setattr(tt.LoRA, "fused", lambda self, leaf, x: fused.append(1) or original(self, leaf, x))
    entry.loss().backward()
    targets = {id(leaf.target) for leaf in adapter.leaves()}
    assert len(fused) == len(targets) == 14
    assert not targets & {id(module) for module in called}


class UnlikeProjections(nn.Module):
    """Attention whose query, key and value have sizes of their own, and a normalised head of raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.to_query, self.to_key, self.to_value = nn.Linear(8, 12), nn.Linear(10, 12), nn.Linear(6, 4)
        self.classes = nn.Parameter(torch.randn(5, 4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.to_query(query), self.to_key(key), self.to_value(value))
        return mixed @ F.normalize(self.classes, dim=1).T


def test_peft_761_any_module_that_owns_a_weight_is_reached() -> None:
    """6. Only standard layers can have an adapter.

    The unit is a weight and its linear map: unlike projections and a head of raw parameters train like any other.
    Threads: peft#761, Baichuan2#340, LyCORIS#181
    """
    torch.manual_seed(0)
    model = UnlikeProjections()
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 10), torch.randn(2, 5, 6)
    base = model(*inputs).detach()
    adapter = tt.attach(model, tt.LoRA(rank=2, targets=("to_query", "to_key", "to_value", ":classes")))
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    adapter.bind(optimizer)  # stops where a tensor gets no gradient
    for _ in range(3):
        (model(*inputs) - base - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model(*inputs).detach()
    assert not torch.allclose(found, base, atol=1e-4)
    adapter.merge()
    torch.testing.assert_close(model(*inputs), found, rtol=1e-4, atol=1e-5)


# Trains nothing, or trains the wrong part


class CheckpointedBlocks(nn.Module):
    """Blocks under reentrant checkpointing, which passes no gradient to a segment whose inputs need none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x.tanh(), use_reentrant=True)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_peft_137_gradient_checkpointing_that_cuts_the_gradient_stops() -> None:
    """7. Gradient checkpointing with frozen inputs: adapters get no gradient, every `lora_B` is zero after a full run.

    After two steps every tensor must have received a gradient; the error names those without, and the remedy.
    Threads: peft#137, transformers#42489, transformers#26334, open-unlearning#178
    """
    model = CheckpointedBlocks()
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="blocks.*"))
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    adapter.bind(optimizer)
    loss = model(torch.randn(2, 8)).square().mean()
    assert not loss.requires_grad  # the whole model is cut off here
    optimizer.step()
    message = r"no gradient has reached '0/blocks\.0:weight/A'.*\(6 of 6 tensors\).*\(use use_reentrant=False\)"
    with pytest.raises(tt.TrainingError, match=message):
        optimizer.step()


def test_peft_432_the_schedule_of_adalora_cannot_be_forgotten() -> None:
    """8. AdaLoRA's `update_and_allocate` must be called by hand; without it the rank stays at its start.

    The schedule hangs on the optimizer's step; training an adapter that was never bound stops at the second step.
    Threads: peft#432, peft#1801, peft#1327
    """
    method = tt.AdaLoRA(rank=2, initial_rank=4, warmup_steps=1, final_steps=1, interval=1)
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, method)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=1e-2))
    entry.loss().backward()
    optimizer.step()
    with pytest.raises(tt.TrainingError, match=r"the schedule of AdaLoRA would never run\. Call adapter\.bind\("):
        entry.loss()
    entry = ZOO["llama"](0, 0.0)
    adapter = tt.attach(entry.model, method)
    train(entry, adapter, steps=6)
    values = [tensor for name, tensor in adapter.named_parameters() if name.endswith("/Lambda")]
    assert sum(int((value != 0).sum()) for value in values) == 2 * len(values)


def test_peft_3580_what_trains_and_what_acts_are_two_switches(tmp_path: Path) -> None:
    """9. Trainable and active are one switch: a second adapter never trains, loading one unfreezes the other.

    Two independent states; loading, switching or freezing one adapter never moves another one.
    Threads: peft#3580, peft#1374, peft#2759, peft#1303, peft#3487
    """
    entry = ZOO["llama"](0, 0.0)
    first = moved(entry.model, tt.LoRA(rank=2), "first")
    file = first.save(tmp_path / "first.safetensors")
    first.trainable = False
    second = tt.load(entry.model, file, name="second", trainable=True)
    assert (first.trainable, first.active) == (False, True)
    assert (second.trainable, second.active) == (True, True)
    with_both, frozen = entry.output(), [parameter.detach().clone() for parameter in first.parameters()]
    second.active = False
    assert (second.trainable, first.active) == (True, True)
    assert not torch.equal(entry.output(), with_both)
    second.active = True
    train(entry, second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), frozen, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(second.parameters(), frozen, strict=True))
    facts = {adapter.name: (adapter.report().trainable, adapter.report().active) for adapter in (first, second)}
    assert facts == {"first": (False, True), "second": (True, True)}


def test_diffusers_8871_adapters_of_a_half_precision_base_can_be_unscaled() -> None:
    """10. "Attempting to unscale FP16 gradients": the adapter took the base's half precision.

    An adapter's numbers are float32 whatever the base, so a gradient scaler works; `dtype` is the one override.
    Threads: diffusers#8871, transformers#30559, textgen#3240, CogVideo#775
    """
    entry = ZOO["llama"](0, 0.0)
    entry.model.half()
    adapter = tt.attach(entry.model, tt.LoRA(rank=2))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    optimizer, scaler = (
        torch.optim.AdamW(adapter.parameter_groups(lr=1e-2)),
        torch.amp.GradScaler("cpu", init_scale=256),
    )
    adapter.bind(optimizer)
    first = entry.loss().item()
    for _ in range(5):
        scaler.scale(entry.loss()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert adapter.steps >= 3
    assert entry.loss().item() < first
    other = tt.attach(entry.model, tt.LoRA(rank=2), "half", dtype=torch.float16)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float16}


def test_soup_354_the_start_depends_on_the_seed_alone() -> None:
    """11. The seed does not reach the adapter's start: it is set after the adapter exists, or a head differs each time.

    `seed=` of `attach` alone decides the start, whatever torch's generator did before, and leaves that generator alone.
    Threads: Soup#354, peft#2171
    """
    base = ZOO["bert"](0, 0.0).model
    method, starts = tt.Compose(tt.LoRA(rank=2), tt.FullTuning(targets="head")), []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        model = copy.deepcopy(base)
        torch.manual_seed(global_seed)
        expected = torch.get_rng_state()
        adapter = tt.attach(model, method, seed=seed)
        assert torch.equal(torch.get_rng_state(), expected)
        starts.append([tensor.detach().clone() for _, tensor, _ in adapter.named_tensors()])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))


def test_peft_2438_a_loaded_adapter_has_no_dropout(tmp_path: Path) -> None:
    """11. Dropout is alive at inference, so that every answer differs.

    An adapter that is loaded for use is in evaluation mode and frozen, also in a model that is in training mode.
    Threads: peft#2438, unsloth#279
    """
    entry = ZOO["llama"](0, 0.0)
    entry.model.train()
    adapter = moved(entry.model, tt.LoRA(rank=2, dropout=0.5))
    assert not torch.equal(entry.output(), entry.output())
    adapter.save(tmp_path)
    adapter.detach()
    loaded = tt.load(entry.model, tmp_path)
    assert torch.equal(entry.output(), entry.output())
    assert not loaded.trainable
