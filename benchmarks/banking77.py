"""LoRA against full fine-tuning and a linear probe on the 77 intents of Banking77, with a plain PyTorch loop.

    python benchmarks/banking77.py FOLDER --seeds 0 1 2 --write

FOLDER holds train.csv and test.csv (PolyAI's release, CC BY 4.0). Finished runs are kept in `--results` and not run
again. `--search` runs each method's learning rates on a validation split of the training data instead (one seed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

import trimtab as tt
from trimtab.adapter_file import write_atomically
from trimtab.training.batches import make_loader
from trimtab.training.data import read_table
from trimtab.training.models import load_model
from trimtab.training.splits import split_table
from trimtab.training.table import Table
from trimtab.training.tasks import make_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "banking77.json"
BATCH, EPOCHS, WARMUP, LENGTH = 32, 2, 0.06, 64
TRAINING_ROWS, TEST_ROWS = 10_003, 3_080


@dataclass(frozen=True)
class Run:
    """One way of tuning with its learning rate, and those that the search tries."""

    name: str
    method: tt.Method
    lr: float
    searched: tuple[float, ...]


def head(lr_scale: float) -> tt.Method:
    """Return full tuning of the fresh classifier, which needs a larger learning rate than what is pretrained."""
    return tt.FullTuning(targets="classifier", lr_scale=lr_scale)


RUNS = (
    Run("linear probe", tt.LinearProbe(targets="classifier"), 3e-1, (3e-2, 1e-1, 3e-1)),
    Run("LoRA r=8", tt.Compose(tt.LoRA(rank=8), head(10.0)), 4e-3, (2e-3, 4e-3, 8e-3)),
    Run(
        "full fine-tuning", tt.Compose(tt.FullTuning(targets="all - classifier"), head(20.0)), 4e-4, (1e-4, 2e-4, 4e-4)
    ),
)


def train_once(run: Run, lr: float, seed: int, train: Table, test: Table, fraction: float = 1.0) -> dict[str, float]:
    """Train for EPOCHS epochs (or a fraction of them) and return accuracy on `test` with its cost."""
    torch.manual_seed(seed)
    task = make_task("classification", train, {"text": "text", "label": "category"})
    loaded = load_model("minilm", task, seed)
    adapter = tt.attach(loaded.model, run.method, seed=seed)
    encoded = task.encode(train, loaded.tokenizer, LENGTH)
    loader = make_loader(encoded, BATCH, seed=seed, group_by_length=True)
    total = int(EPOCHS * len(loader) * fraction)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(lr=lr), fused=True)
    adapter.bind(optimizer, total_steps=total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, total))
    loaded.model.train()
    begin = time.perf_counter()
    for step, (_, batch) in enumerate(loader.run(EPOCHS)):
        if step == total:
            break
        loaded.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    metrics = task.evaluate(loaded.model, make_loader(task.encode(test, loaded.tokenizer, LENGTH), 64, shuffle=False))
    return {
        "accuracy": metrics.value,
        "seconds": seconds,
        "trainable": adapter.trainable_count,
        "steps": total,
        "lr": lr,
    }


def _linear(step: int, total: int) -> float:
    warm = max(1, int(WARMUP * total))
    return (step + 1) / warm if step < warm else max(0.0, (total - step) / max(1, total - warm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the table to docs/banking77.md")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    train, test = read_table(options.folder / "train.csv"), read_table(options.folder / "test.csv", split="test")
    if (len(train), len(test)) != (TRAINING_ROWS, TEST_ROWS):
        raise SystemExit(
            f"the release has {TRAINING_ROWS:,} and {TEST_ROWS:,} rows, found {len(train)} and {len(test)}"
        )
    if options.search:
        split = split_table(train, validation=0.1, seed=0, label="category")
        jobs = [
            (f"search/{run.name}/{lr}", run, lr, 0, split.train, split.validation, 0.3)
            for run in RUNS
            for lr in run.searched
        ]
    else:
        jobs = [
            (f"{run.name}/{run.lr}/{seed}", run, run.lr, seed, train, test, 1.0)
            for seed in options.seeds
            for run in RUNS
        ]
    for key, run, lr, seed, data, held_out, fraction in jobs:
        if key not in results:
            results[key] = train_once(run, lr, seed, data, held_out, fraction)
            write_atomically(options.results, (json.dumps(results, indent=1) + "\n").encode())
        print(key, results[key], flush=True)
    if options.write:
        write_atomically(ROOT / "docs" / "banking77.md", page(results).encode())


def page(results: dict[str, dict[str, float]]) -> str:
    """Return docs/banking77.md: mean accuracy over the seeds, its 95 % interval (normal, over seeds and test rows)."""
    seeds = sorted({int(key.rsplit("/", 1)[1]) for key in results if not key.startswith("search/")})
    lines = [
        "# Banking77: LoRA against full fine-tuning",
        "",
        f"MiniLM-L6 (22.7M parameters), 77 intents, {TRAINING_ROWS:,} training and {TEST_ROWS:,} test messages,",
        f"{EPOCHS} epochs, batch {BATCH}, AdamW, linear schedule, seeds {', '.join(map(str, seeds))}. The interval",
        "covers the sampling of the test messages and the spread over seeds. The learning rates come from `--search`:",
        f"equal budget for each, a validation split of the training data. Written on {date.today()}.",
        "",
        "Measured with: `python benchmarks/banking77.py FOLDER --seeds " + " ".join(map(str, seeds)) + " --write`",
        "",
        "| method | trainable | learning rate | accuracy | 95 % interval | each seed | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        found = [results[f"{run.name}/{run.lr}/{seed}"] for seed in seeds]
        values = [entry["accuracy"] for entry in found]
        mean = statistics.fmean(values)
        spread = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
        half = 1.96 * (spread + mean * (1 - mean) / TEST_ROWS) ** 0.5
        each = ", ".join(f"{100 * value:.1f}" for value in values)
        cost = statistics.fmean(entry["seconds"] for entry in found)
        lines.append(
            f"| {run.name} | {found[0]['trainable']:,} | {run.lr:g} | {100 * mean:.1f} | ±{100 * half:.1f} "
            f"| {each} | {cost:.0f} |"
        )
    lora, full = (statistics.fmean(results[f"{r.name}/{r.lr}/{s}"]["accuracy"] for s in seeds) for r in RUNS[1:])
    lines += ["", f"LoRA minus full fine-tuning: {100 * (lora - full):+.1f} points."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
