"""Two processes against one: every method with DistributedDataParallel and FSDP2, the Trainer, the sampler.

`rows(full=True)` runs every method and writes what it found into the table of docs/distributed.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from reliability_parts import Row
from trimtab.adapter_file import write_atomically

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import distributed_runs as runs  # noqa: E402
import warm  # noqa: E402
from method_runs import METHODS, set_up  # noqa: E402

QUICK_METHODS = ("LoRA", "AdaLoRA", "LadderSideTuning")
DOCUMENT = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- table of methods: begin -->\n", "<!-- table of methods: end -->\n"
Pairs = Mapping[str, tuple[runs.Found, runs.Found]]


def rows(full: bool) -> list[Row]:
    """Return what two processes gave; `full`: every method, written into docs/distributed.md too."""
    names = METHODS if full else list(QUICK_METHODS)
    found = {way: runs.compared(names, way) for way in runs.WAYS}
    if full:
        write_table(found)
    return [_way(way, pairs) for way, pairs in found.items()] + [_sampler(), _trainer()]


def write_table(found: Mapping[str, Pairs]) -> None:
    """Put the table of methods into the document, in the place of the old one."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = ["| method | model | DDP | FSDP2 |", "|---|---|---|---|"]
    for name in sorted(found["DDP"]):
        cells = [_cell(*found[way][name], way) for way in ("DDP", "FSDP2")]
        lines.append(f"| {name} | {set_up(name).model} | {' | '.join(cells)} |")
    write_atomically(DOCUMENT, (before + BEGIN + "\n".join(lines) + "\n" + END + after).encode())


def _cell(alone: runs.Found, two: runs.Found, way: str) -> str:
    if two.refusal:
        return f"refused: {two.refusal}"
    wrong = runs.problems(alone, two, way)
    return "; ".join(wrong) if wrong else f"yes, losses within {runs.apart(two.losses, alone.losses):.0e}"


def _way(way: str, pairs: Pairs) -> Row:
    wrong = {name: text for name, pair in pairs.items() if (text := runs.problems(*pair, way))}
    refused = [name for name, (_, two) in pairs.items() if two.refusal]
    trained = [pair for pair in pairs.values() if not pair[1].refusal]
    losses = max(runs.apart(two.losses, alone.losses) for alone, two in trained)
    figures = max(runs.apart(two.figures, alone.figures) for alone, two in trained)
    told = (
        f"{len(trained) - len(wrong)} of {len(pairs)} methods; losses within {losses:.1e}, figures within "
        f"{figures:.1e}; refused with a reason: {', '.join(refused) or 'none'}"
    )
    asked = (
        f"losses and figures of one process within {runs.TOLERANCE:.0e}, or {runs.AMPLIFICATION} times the rounding of "
        f"one process; one gathered file that one process can load, resumed to the same bits"
    )
    return Row(
        f"Two processes with {way}, same global batch",
        asked,
        told + "".join(f"; {w}" for w in wrong.items()),
        not wrong,
    )


def _sampler() -> Row:
    seen = warm.together(runs.rows_seen)
    alike = sorted(seen[0] + seen[1]) == sorted(runs.all_rows())
    told = f"{len(seen[0])} and {len(seen[1])} rows, {'each once' if alike else 'not each once'}"
    return Row("Rows of an epoch over two processes", "each of 13 rows once", told, alike and all(seen))


def _trainer() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        losses, _ = warm.call(runs.train_with_trainer, "AdaLoRA", f"{folder}/one", 6, None)
        two = warm.together(runs.train_with_trainer, "AdaLoRA", f"{folder}/two", 3, None)
        resumed = warm.together(runs.train_with_trainer, "AdaLoRA", f"{folder}/two", 3, 3)
    apart = runs.apart(two[0][0], losses)
    told = f"losses within {apart:.1e}; resumed run {'equal' if resumed == two else 'not equal'}"
    holds = apart <= runs.TOLERANCE and resumed == two and two[0] == two[1]
    asked = f"losses of one process within {runs.TOLERANCE:.0e}, resumed to the same bits"
    return Row("TrimtabTrainer in two processes (DDP)", asked, told, holds)
