"""Gallery of pains, 29 and 30: living with other tools.

Each test does what the users of the thread in its name did; `tests/gallery.py` makes docs/pains.md from these tests.
"""

from __future__ import annotations

import copy
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from adapting import moved, same_state, state
from test_gallery_of_pains_files import rewrite_header
from trimtab.interop.peft import export_lora, import_adapter
from zoo import ZOO, ZooModel

NEAR = {"rtol": 1e-4, "atol": 1e-5}
LORA = tt.LoRA(rank=2)


def kind(method: tt.Method) -> str:
    return type(method).__name__


def test_peft_2295_detaching_gives_the_very_same_model_back() -> None:
    """29. The base is changed in place, and twice if called twice.

    The model stays the user's object; a second attach of the same name is refused; detaching restores every module,
    class, value and `requires_grad`.
    Threads: peft#2295, peft#940, peft#3470
    """
    entry = ZOO["bert"](0, 0.0)
    entry.model.bert.embeddings.requires_grad_(False)
    modules = {path: (module, type(module)) for path, module in entry.model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in entry.model.named_parameters()}
    before, base = state(entry.model), entry.output()
    adapter = moved(entry.model, tt.Compose(LORA, tt.BitFit()))
    with pytest.raises(tt.AttachError, match="an adapter named 'default' is attached already; choose another"):
        tt.attach(entry.model, LORA)
    assert not torch.equal(entry.output(), base)
    adapter.detach()
    assert {path: (module, type(module)) for path, module in entry.model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in entry.model.named_parameters()} == wanted
    assert same_state(entry.model, before)
    assert torch.equal(entry.output(), base)


@pytest.mark.parametrize("method", [tt.PrefixTuning(length=3), tt.PromptTuning(length=3)], ids=["prefix", "prompt"])
def test_peft_1962_prompts_do_not_depend_on_cache_classes(method: tt.Method) -> None:
    """29. Prompt methods break with each release of transformers, which changes its caches.

    Prefixes enter at the attention call and prompts at the embedding: every cache, and none, generates the same.
    Threads: peft#1962, peft#2043, peft#2131, peft#869
    """
    entry = ZOO["llama"](0, 0.0)
    moved(entry.model, method)
    ids = entry.inputs["input_ids"][:1]
    options: list[dict[str, Any]] = [{"use_cache": False}, {}, {"cache_implementation": "static"}]
    texts = [entry.model.generate(ids, max_new_tokens=5, do_sample=False, **option) for option in options]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_adapters_558_the_core_pins_no_version_of_transformers() -> None:
    """29. A library that pins transformers, or excludes its releases by number.

    The core needs torch and safetensors only; transformers is an extra with a range of major versions, none left out.
    Threads: adapters#558, adapters#91, wtpsplit#124
    """
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert names == {"torch", "safetensors"}
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    ranges = [requirement for requirement in extras if requirement.startswith("transformers")]
    assert ranges
    assert not any(mark in requirement for requirement in ranges for mark in ("==", "!=", "~="))


@pytest.mark.parametrize(
    "method", [LORA, tt.DoRA(rank=2), tt.ParallelAdapter(bottleneck=4)], ids=lambda m: type(m).__name__
)
def test_peft_804_a_mixed_batch_gives_each_row_its_own_adapter(method: tt.Method) -> None:
    """30. Batches of several adapters are slow, or not possible (DoRA); a mistyped name falls back to the base.

    `route` runs the base once for all rows and every method by rows; an unknown name is refused with the nearest.
    Threads: peft#804, peft#759, peft#2089, peft#2090
    """
    entry = ZOO["llama"](0, 0.0)
    base = entry.output()
    alone = {}
    for seed, name in enumerate(("billing", "returns")):
        own = method if method.promises().additive else tt.DoRA(rank=2, targets=f"all-linear[{seed}:{seed + 1}]")
        adapter = moved(entry.model, own, name, seed)
        adapter.active = False
    for name, adapter in tt.adapters(entry.model).items():
        adapter.active = True
        alone[name] = entry.output()
        adapter.active = False
    for adapter in tt.adapters(entry.model).values():
        adapter.active = True
    with tt.route(entry.model, ["billing", None, "returns"]):
        routed = entry.output()
    for row, expected in enumerate((alone["billing"], base, alone["returns"])):
        torch.testing.assert_close(routed[row], expected[row], **NEAR)
    with pytest.raises(tt.AttachError, match=r"there is no adapter 'biling'\. Did you mean 'billing'\?"):
        tt.route(entry.model, ["biling", None, "returns"])


def test_peft_3085_nothing_in_a_file_names_code(tmp_path: Path) -> None:
    """30. A configuration can import any module.

    A file names methods of the catalogue and their settings; nothing in it is imported or run, ours or peft's.
    Threads: peft#3085
    """
    (tmp_path / "hostile.py").write_text("raise SystemExit('this ran')\n")
    file = moved(ZOO["llama"](0, 0.0).model, LORA).save(tmp_path / "ours")
    for name in ("hostile.Payload", "os.system", "builtins.eval"):
        rewrite_header(file, method={"name": name, "settings": {}})
        with pytest.raises(tt.AdapterFileError, match=f"there is no method '{name}'"):
            tt.load(ZOO["llama"](0, 0.0).model, file)
    export_lora(moved(ZOO["llama"](0, 0.0).model, LORA), tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    hostile = {"auto_mapping": {"base_model_class": "Payload", "parent_library": "hostile"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | hostile))
    sys.path.insert(0, str(tmp_path))
    try:
        import_adapter(ZOO["llama"](0, 0.0).model, tmp_path / "peft")
    finally:
        sys.path.remove(str(tmp_path))
    assert "hostile" not in sys.modules


@pytest.mark.parametrize("method", [tt.DoRA(rank=2), tt.PaCA(rank=2)], ids=kind)
def test_unsloth_1385_any_weight_method_can_be_served_as_a_lora(method: tt.Method, tmp_path: Path) -> None:
    """30. Serving engines take LoRA only.

    The change of any weight method is exported as a plain LoRA of a given rank, with its error stated.
    Threads: unsloth#1385, pyreft#36
    """
    entry = ZOO["llama"](0, 0.0)
    base = copy.deepcopy(entry.model)
    moved(entry.model, method)
    receipt = export_lora(tt.adapters(entry.model)["default"], tmp_path, rank=16)
    served = import_adapter(base, tmp_path)
    assert receipt.rank == 16
    difference = float((entry.output(served.model) - entry.output()).detach().abs().max())
    assert (receipt.relative_error < 1e-5) == (difference < 1e-3)
    exact = export_lora(tt.adapters(entry.model)["default"], tmp_path / "exact", rank=32)
    assert exact.relative_error < 1e-5 <= max(receipt.relative_error, 1e-5)


class Unmapped(nn.Module):
    """A model that no table of architectures knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.classes = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = x + checkpoint(stage, x, use_reentrant=False)
        return self.classes(x)


def test_pyvene_242_and_pyreft_80_checkpointing_and_unmapped_models_work() -> None:
    """30. Hooks and checkpointing exclude each other; a model that is in no table cannot be tuned.

    Places are found from structure, and a recomputed forward runs through the adapters as the first did.
    Threads: pyvene#242, pyreft#80
    """
    torch.manual_seed(0)
    model, x = Unmapped(), torch.randn(4, 8)
    adapter = tt.attach(model, tt.LoRA(rank=2, targets="all-linear | head"))
    optimizer = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    adapter.bind(optimizer)  # stops where a tensor gets no gradient
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(adapter.leaves()) == 5
    assert losses[-1] < losses[0]


def test_adapters_17_a_trained_head_is_part_of_the_file(tmp_path: Path) -> None:
    """30. The head is lost on load.

    A head that is trained belongs to the adapter: it is saved with it, loaded with it, and detached with it.
    Threads: adapters#17, adapters#35, adapters#421
    """
    entry: ZooModel = ZOO["bert"](0, 0.0)
    base = entry.output()
    adapter = moved(entry.model, tt.Compose(LORA, tt.FullTuning(targets="head")))
    trained = entry.output()
    adapter.save(tmp_path)
    adapter.detach()
    assert torch.equal(entry.output(), base)
    tt.load(entry.model, tmp_path)
    assert torch.equal(entry.output(), trained)
