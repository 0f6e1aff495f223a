"""LN-tuning against huggingface/peft (LNTuningConfig), live: same norms, same numbers after training."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import trimtab
from zoo import ZOO

NORMS = {"bert": r".*LayerNorm", "llama": r".*norm", "gpt2": r".*ln_\w+", "t5": r".*layer_norm"}


def step(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("name", NORMS)
def test_training_follows_peft(name: str) -> None:
    entry = ZOO[name](0, 0.0)
    theirs = peft.get_peft_model(copy.deepcopy(entry.model), peft.LNTuningConfig(target_modules=NORMS[name]))
    theirs.eval()
    adapter = trimtab.attach(entry.model, trimtab.LNTuning())
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert adapter.trainable_count == sum(parameter.numel() for parameter in trained)

    expected, found = step(trained), step(list(adapter.parameters()))
    start = entry.output().detach()
    for _ in range(4):
        losses = entry.loss(theirs), entry.loss()
        for loss, optimizer in zip(losses, (expected, found), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    torch.testing.assert_close(entry.output(), entry.output(theirs), rtol=1e-4, atol=1e-4)
    assert (entry.output() - start).abs().max().item() > 1e-2

    tuned = {key: value for key, value in theirs.state_dict().items() if ".ln_tuning_layers." in key}
    for leaf in adapter.parts[0].leaves:
        suffix = f".{leaf.site.path}.ln_tuning_layers.default.{leaf.site.parameter}"
        (value,) = [value for key, value in tuned.items() if key.endswith(suffix)]
        torch.testing.assert_close(leaf.value, value, rtol=1e-4, atol=1e-5)
