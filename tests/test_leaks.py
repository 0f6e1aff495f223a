"""Nothing stays: any number of rounds of attaching, loading, saving, merging, routing, binding and generating."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import leaks
import trimtab as tt
from adapting import moved
from leaks import ACTIONS, METHODS, applies, excess, growth

QUICK = ["LoRA", "FullTuning", "ParallelAdapter", "PrefixTuning", "PromptTuning", "LadderSideTuning"]
PAIRS = [(action, method) for method in METHODS for action in ACTIONS if applies(action, method)]
MANY = 1000


@pytest.mark.parametrize("method", QUICK)
@pytest.mark.parametrize("action", leaks.ALONE)
def test_a_few_rounds_leave_nothing(action: str, method: str) -> None:
    assert excess(growth(action, method, rounds=10, traced=False), rounds=10) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("action", "method"), PAIRS, ids=[f"{action}-{method}" for action, method in PAIRS])
def test_rounds_leave_nothing(action: str, method: str) -> None:
    assert excess(growth(action, method, rounds=10, traced=False), rounds=10) == {}


@pytest.mark.slow
@pytest.mark.parametrize("action", leaks.ALONE)
def test_a_thousand_rounds_leave_nothing(action: str) -> None:
    assert excess(growth(action, "LoRA", MANY, traced=False), MANY) == {}


@pytest.fixture
def leaked() -> Iterator[list[object]]:
    kept: list[object] = []
    yield kept
    kept.clear()


@pytest.mark.parametrize("what", ["tensor", "hook", "class", "object", "file"])
def test_the_census_sees_what_stays(
    what: str, leaked: list[object], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    def leak(bench: leaks.Bench) -> None:
        if what == "tensor":
            leaked.append(torch.zeros(25))
        elif what == "hook":
            bench.entry.model.register_forward_hook(lambda *_: None)
        elif what == "class":
            leaked.append(type("Generated", (nn.Module,), {}))
        elif what == "object":
            leaked.append([leaked])
        else:
            leaked.append(stream := open(__file__, "rb"))  # noqa: SIM115 - left open on purpose
            request.addfinalizer(stream.close)

    monkeypatch.setitem(ACTIONS, "save", leak)
    found = excess(growth("save", "IA3", rounds=3, traced=False), rounds=3)
    name = {"tensor": "tensors", "hook": "hooks", "class": "classes", "object": "objects", "file": "files"}[what]
    assert found[name] == 3
    assert what != "tensor" or found["tensor_bytes"] == 300


def test_a_class_that_a_function_made_is_freed_with_its_models() -> None:
    def use() -> weakref.ref[type[nn.Module]]:
        class Local(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)

        model = Local()
        adapter = tt.attach(model, tt.LoRA(rank=2, targets="inner"))
        model(torch.randn(2, 4)).sum().backward()
        adapter.detach()
        return weakref.ref(Local)

    made = use()
    for _ in range(3):
        gc.collect()
    assert made() is None


def test_a_detached_model_is_freed_while_its_adapter_s_file_stays(tmp_path: object) -> None:
    """No cache of ours holds a model: dropping it frees it, whatever was done with it."""
    bench = leaks.Bench(leaks.ZOO["llama"](0, 0.0), METHODS["LoRA"], leaks.Path(str(tmp_path)))
    adapter = moved(bench.entry.model, bench.method, "kept")
    for action in ("save", "merge_unmerge", "bind_release", "route", "generate"):
        ACTIONS[action](bench)
    model = weakref.ref(bench.entry.model)
    del adapter, bench
    for _ in range(3):
        gc.collect()
    assert model() is None
