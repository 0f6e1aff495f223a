"""The reliability report: every part under `reliability_parts` measures, and docs/reliability.md shows all of it.

    python benchmarks/reliability.py                          # every part, small
    python benchmarks/reliability.py --full --part crash --write

`--write` keeps a part's rows, with date, commit and versions, in benchmarks/results/reliability.json and writes the
page from all that is kept there, so that parts can run at different times. Ends with status 1 if a row does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import platform
import sys
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import Any

from common import ROOT, commit, processor
from reliability_parts import Row

from trimtab.adapter_file import write_atomically

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
PARTS = sorted(path.stem for path in (ROOT / "benchmarks" / "reliability_parts").glob("[a-z]*.py"))
PACKAGES = ("torch", "safetensors", "transformers")


def measured(part: str, full: bool) -> dict[str, Any]:
    """Run one part and return its rows with the conditions they were measured under."""
    module = importlib.import_module(f"reliability_parts.{part}")
    start = time.monotonic()
    rows: list[Row] = module.rows(full)
    return {
        "date": str(date.today()),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "processor": processor(),
        "size": "full" if full else "small",
        "seconds": round(time.monotonic() - start),
        "about": inspect.getdoc(module),
        "rows": [asdict(row) for row in rows],
    }


def page(results: dict[str, Any]) -> str:
    """Return the page: a verdict for each row, what falls short first of all."""
    rows = [(part, row) for part in PARTS if part in results for row in results[part]["rows"]]
    short = [f"- {part}: {row['what']}; the figures are below" for part, row in rows if not row["holds"]]
    short += [f"- {part}: not measured yet" for part in PARTS if part not in results]
    short += [
        f"- {part}: measured at small size only" for part in PARTS if results.get(part, {}).get("size") == "small"
    ]
    lines = [
        "# Reliability",
        "",
        "What is promised about damaged files, killed processes, odd settings and long runs, and what was measured.",
        "This page is written by `benchmarks/reliability.py`; nothing in it is written by hand.",
        "",
        f"{sum(row['holds'] for _, row in rows)} of {len(rows)} rows hold."
        + (" What falls short:" if short else " Nothing falls short."),
        *(["", *short] if short else []),
    ]
    for part in PARTS:
        if part in results:
            lines += ["", *section(part, results[part])]
    return "\n".join(lines) + "\n"


def section(part: str, result: dict[str, Any]) -> list[str]:
    """Return the lines of one part: what it does, its rows, the conditions."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(result["versions"].items()))
    full = " --full" if result["size"] == "full" else ""
    title, _, about = result["about"].partition("\n\n")
    conditions = f"{result['date']}, commit {result['commit']}, {result['size']} size, {result['seconds']} s"
    return [
        f"## {part.replace('_', ' ').capitalize()}",
        "",
        title,
        *(["", about] if about else []),
        "",
        f"Measured with: `python benchmarks/reliability.py --part {part}{full} --write`",
        "",
        "| what | asked | measured | verdict |",
        "| --- | --- | --- | --- |",
        *(f"| {cell(r['what'])} | {cell(r['asked'])} | {cell(r['measured'])} | {verdict(r)} |" for r in result["rows"]),
        "",
        f"{conditions}; {versions}; {result['processor']}.",
    ]


def cell(text: str) -> str:
    """Return a text as one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def verdict(row: dict[str, Any]) -> str:
    """Return the last cell of a row."""
    return "holds" if row["holds"] else "**falls short**"


def main() -> int:
    """Measure, print, and write where asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this part only (may be repeated)")
    parser.add_argument("--full", action="store_true", help="the sizes of the long run")
    parser.add_argument("--write", action="store_true", help="keep the rows and write docs/reliability.md")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))  # parts may use the models of the tests
    holds = True
    for part in options.part or PARTS:
        result = measured(part, options.full)
        print("\n".join(section(part, result)), flush=True)
        holds = holds and all(row["holds"] for row in result["rows"])
        if options.write:
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            results[part] = result
            write_atomically(RESULTS, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
            write_atomically(PAGE, page(results).encode())
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
