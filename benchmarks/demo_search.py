"""The learning rates of the demo: three for each contestant, equal steps, chosen on the validation messages.

    python benchmarks/demo_search.py --write

Finished runs are kept in `--results` and not run again. The chosen rate is the one with the highest validation
accuracy (the lower rate where two are equal); test messages are never looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from datetime import date
from pathlib import Path

from trimtab.adapter_file import encode_method, write_atomically
from trimtab.demo.contestants import CONTESTANTS, Contestant
from trimtab.demo.data import BATCH, EPOCHS, settings_for, write_splits
from trimtab.training.run import execute, prepare

RESULTS = Path(__file__).parent / "results" / "demo_search.json"


def key_of(one: Contestant, lr: float) -> str:
    """Return the key of one run: a change of the method's settings makes it a new run."""
    return f"{one.key} {lr:g} {json.dumps(encode_method(one.method), sort_keys=True)}"


def search_once(one: Contestant, lr: float) -> dict[str, float]:
    """Train one contestant at one rate and return its best validation accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        write_splits(Path(folder))
        settings = dataclasses.replace(settings_for(one, Path(folder), lr), test="0")
        report = execute(prepare(settings), Path(folder) / "run", on_progress=None)
    assert report.metrics is not None
    return {"accuracy": report.metrics.value, "seconds": report.seconds, "steps": report.steps}


def best_rate(one: Contestant, results: dict[str, dict[str, float]]) -> float | None:
    """Return the rate the rule chooses, or None while runs are missing."""
    if any(key_of(one, lr) not in results for lr in one.searched):
        return None
    return max(one.searched, key=lambda lr: (results[key_of(one, lr)]["accuracy"], -lr))


def page(results: dict[str, dict[str, float]]) -> str:
    """Return docs/demo_search.md."""
    lines = [
        "# The demo's learning rates",
        "",
        f"Three rates for each contestant, {EPOCHS:g} epochs of batch {BATCH}, one seed; validation",
        f"accuracy in percent, chosen rate in bold. Written on {date.today()}.",
        "",
        "Measured with: `python benchmarks/demo_search.py --write`",
        "",
        "| contestant | rates and validation accuracy |",
        "|---|---|",
    ]
    for one in CONTESTANTS:
        chosen = best_rate(one, results)
        cells = []
        for lr in one.searched:
            found = results.get(key_of(one, lr))
            text = f"{lr:g}: " + ("not run" if found is None else f"{100 * found['accuracy']:.1f}")
            cells.append(f"**{text}**" if lr == chosen else text)
        lines.append(f"| {one.name} | {' · '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", help="keys of contestants")
    parser.add_argument("--write", action="store_true", help="write docs/demo_search.md")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    for one in CONTESTANTS:
        for lr in one.searched:
            if key_of(one, lr) in results or (options.only and one.key not in options.only):
                continue
            results[key_of(one, lr)] = search_once(one, lr)
            write_atomically(options.results, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
            print(one.key, lr, results[key_of(one, lr)], flush=True)
    if options.write:
        write_atomically(Path(__file__).parents[1] / "docs" / "demo_search.md", page(results).encode())


if __name__ == "__main__":
    main()
