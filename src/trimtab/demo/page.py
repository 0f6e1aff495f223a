"""The report of a comparison as one self-contained HTML page: no script, no font, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trimtab.demo.picture import Point, draw
from trimtab.planning import bytes_text


@dataclass(frozen=True)
class Result:
    """One trained method: test accuracy with its 95 % interval, size, cost and where it was saved."""

    name: str
    method: str
    lr: float
    accuracy: float
    low: float
    high: float
    trainable: int
    seconds: float
    peak_bytes: int
    file_bytes: int
    folder: str
    reference: bool

    def point(self) -> Point:
        """Return the method's place in the picture."""
        return Point(self.name, self.trainable, self.accuracy, self.low, self.high, self.reference)


@dataclass(frozen=True)
class Page:
    """What the report says: the task in words, the results, the samples classified by a saved adapter."""

    title: str
    task: str
    conditions: str
    results: tuple[Result, ...]
    samples: tuple[tuple[str, str], ...]
    sample_source: str
    commands: tuple[str, ...]


STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5b6775; --line: #d9dfe6; --paper: #ffffff;
        --method: #0b6e99; --reference: #b4541a; --band: #f4f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #33404d; --paper: #151b22; --method: #56b4dd;
          --reference: #f0955a; --band: #1c242d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4em; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .6em; }
p { margin: 0 0 .8em; } .lead { font-size: 1.1rem; } .soft { color: var(--soft); } .wide + .soft { margin-top: .8em; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg .tick, svg .axis { fill: var(--soft); } svg .grid { stroke: var(--line); stroke-width: 1; }
svg circle.method { fill: var(--method); } svg line.method { stroke: var(--method); }
svg circle.reference { fill: var(--reference); } svg line.reference { stroke: var(--reference); }
svg .bar { stroke-width: 1.6; opacity: .55; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem;
        font-variant-numeric: tabular-nums; }
th, td { padding: .42em .5em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; } tr.reference td:first-child { color: var(--reference); }
tbody tr:hover { background: var(--band); } .key { display: inline-block; width: .7em; height: .7em;
border-radius: 50%; margin: 0 .35em 0 .9em; } pre { background: var(--band); padding: .9em 1em; overflow-x: auto;
border-radius: 6px; font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


KEY = (
    '<p class="soft"><span class="key" style="background:var(--method)"></span>parameter-efficient methods'
    '<span class="key" style="background:var(--reference)"></span>references: linear probe, full fine-tuning</p>'
)


def render(page: Page) -> str:
    """Return the whole page."""
    body = [
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="lead">{escape(headline(page.results))}</p>',
        f"<p>{escape(page.task)}</p>",
        "<h2>Accuracy against size</h2>",
        draw([result.point() for result in page.results]),
        KEY,
        "<h2>All figures</h2>",
        _table(page.results),
        f'<p class="soft">{escape(page.conditions)}</p>',
        f"<h2>Used from its file, in a new process: {escape(page.sample_source)}</h2>",
        _samples(page.samples),
        "<h2>Use it yourself</h2>",
        "<pre>" + escape("\n".join(page.commands)) + "</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def headline(results: Sequence[Result]) -> str:
    """Return the comparison in one sentence: the best method beside full fine-tuning and the linear probe."""
    full = next((r for r in results if r.name == "full fine-tuning"), None)
    probe = next((r for r in results if r.name == "linear probe"), None)
    methods = [r for r in results if not r.reference]
    if full is None or probe is None or not methods:
        return f"{len(results)} ways of tuning, compared on the same steps."
    best = max(methods, key=lambda r: r.accuracy)
    return (
        f"{best.name} reaches {100 * best.accuracy:.1f} % with {best.trainable / full.trainable:.2%} of the trainable "
        f"numbers of full fine-tuning ({100 * full.accuracy:.1f} %); a linear probe stays at "
        f"{100 * probe.accuracy:.1f} %."
    )


def _table(results: Sequence[Result]) -> str:
    rows = []
    for r in sorted(results, key=lambda result: -result.accuracy):
        kind = ' class="reference"' if r.reference else ""
        cells = (
            f"{100 * r.accuracy:.1f} %",
            f"{100 * r.low:.1f} – {100 * r.high:.1f}",
            f"{r.trainable:,}",
            f"{r.seconds:.0f} s",
            bytes_text(r.peak_bytes),
            bytes_text(r.file_bytes),
            f"{r.lr:g}",
        )
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr{kind}><td title="{escape(r.method, quote=True)}">{escape(r.name)}</td>{line}</tr>')
    names = ("test accuracy", "95 % interval", "trainable", "training", "peak memory", "file", "learning rate")
    head = "<th>method</th>" + "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _samples(samples: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><td class="text">{escape(text)}</td><td class="text"><b>{escape(label)}</b></td></tr>'
        for text, label in samples
    )
    return f'<table><thead><tr><th>message</th><th class="text">intent</th></tr></thead><tbody>{rows}</tbody></table>'
