"""The demo: its data, its report, its learning rates, and one contestant from training to use in a new process."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from trimtab.demo.contestants import CONTESTANTS
from trimtab.demo.data import messages
from trimtab.demo.page import Page, Result, headline, render
from trimtab.demo.picture import Point, draw
from trimtab.demo.run import _Clock, contestants_named, run_demo

ROOT = Path(__file__).parents[1]


def search_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_search", ROOT / "benchmarks" / "demo_search.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(name: str, accuracy: float, trainable: int, reference: bool = False) -> Result:
    low, high = accuracy - 0.03, accuracy + 0.03
    return Result(name, f"{name}()", 1e-3, accuracy, low, high, trainable, 30.0, 2**29, 2**20, "runs/x", reference)


RESULTS = (
    result("full fine-tuning", 0.60, 22_000_000, reference=True),
    result("linear probe", 0.40, 10_000, reference=True),
    result("LoRA", 0.62, 400_000),
    result("(IA)³ <b>", 0.55, 30_000),
)


def test_the_embedded_messages_are_what_the_docs_say() -> None:
    rows = messages()
    counts = Counter(row["split"] for row in rows)
    intents = Counter(row["intent"] for row in rows)
    assert len(intents) == 28
    assert set(intents.values()) == {56}
    assert counts == {"train": 728, "validation": 224, "test": 616}
    for split in counts:
        assert len({row["intent"] for row in rows if row["split"] == split}) == 28
    texts = [re.sub(r"[^a-z0-9 ]", "", row["text"].lower()).strip() for row in rows]
    assert len(set(texts)) == len(texts)


def test_at_least_six_methods_compete_with_two_references() -> None:
    assert sum(one.reference for one in CONTESTANTS) == 2
    assert sum(not one.reference for one in CONTESTANTS) >= 6
    assert len({one.key for one in CONTESTANTS}) == len(CONTESTANTS)


def test_every_learning_rate_is_the_one_the_search_found() -> None:
    search = search_module()
    found = json.loads(search.RESULTS.read_text())
    assert {one.key: one.lr for one in CONTESTANTS} == {one.key: search.best_rate(one, found) for one in CONTESTANTS}


def test_the_headline_names_best_method_full_tuning_and_probe() -> None:
    text = headline(RESULTS)
    assert text == (
        "LoRA reaches 62.0 % with 1.82% of the trainable numbers of full fine-tuning (60.0 %); "
        "a linear probe stays at 40.0 %."
    )


def test_the_page_is_self_contained_and_escapes_what_it_shows() -> None:
    page = Page("Title", "Task.", "Same steps.", RESULTS, (("where's <my> money", "refund_request"),), "LoRA", ("a",))
    html = render(page)
    assert not re.search(r"(src|href)\s*=|<script|url\(|@import", html)
    assert "<b>" not in html.replace("<b>refund_request</b>", "")
    assert "where&#x27;s &lt;my&gt; money" in html
    order = [html.rindex(f">{name}<") for name in ("LoRA", "full fine-tuning", "linear probe")]
    assert order == sorted(order)


def test_the_picture_keeps_names_apart_and_inside() -> None:
    points = [Point(f"method {i}", 400_000 + 9_000 * i, 0.60 + 0.002 * i, 0.57, 0.64) for i in range(7)]
    svg = draw(points)
    boxes = [
        (float(x), float(y), float(x) + 7.0 * len(name))
        for x, y, name in re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)">([^<]+)<', svg)
    ]
    assert len(boxes) == 7
    for i, (left, top, right) in enumerate(boxes):
        assert left >= 60
        assert right <= 860
        for other_left, other_top, other_right in boxes[:i]:
            apart = right <= other_left or other_right <= left or abs(top - other_top) >= 14
            assert apart, "two names lie on each other"


@pytest.mark.slow
def test_one_contestant_from_training_to_use_in_a_new_process(tmp_path: Path) -> None:
    stages, finished = [], []
    page = run_demo(tmp_path, contestants_named(["bitfit"]), 0.05, stages.append, finished.append)
    assert [r.name for r in page.results] == ["BitFit"]
    assert finished == list(page.results)
    assert stages[-1].step == stages[-1].total
    assert len(page.samples) == 5
    assert {label for _, label in page.samples} <= {row["intent"] for row in messages()}
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert page.results[0].file_bytes == (tmp_path / "bitfit" / "adapter.safetensors").stat().st_size


def test_the_time_left_follows_a_contestant_that_is_slower_than_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("trimtab.demo.run.time.monotonic", lambda: now)
    clock = _Clock(2)
    now = 10.0
    assert clock.remaining(0, 0.0) is None
    assert clock.remaining(0, 0.5) == 10.0 + 20.0
    clock.finished()
    now = 30.0
    assert clock.remaining(1, 0.5) == 20.0
    assert clock.remaining(1, 1.0) == 0.0
