"""The fidelity page: every comparison of the golden tests with numbers that this project did not make.

    python benchmarks/fidelity.py            # run tests/golden and print the page
    python benchmarks/fidelity.py --write    # keep the errors and write docs/fidelity.md

The tests under tests/golden run with `torch.testing.assert_close` recorded: the largest difference as a share of the
largest expected number, for each test file and precision. Comparisons that allow more than 10⁻² are left out: they
are of averages over random draws, or of half precision. What differs from a paper or its code on purpose is read from
the method's own docstring.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest
import torch
from common import ROOT, commit
from reliability import cell
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.adapter_file import write_atomically
from trimtab.method import methods

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "fidelity.json", ROOT / "docs" / "fidelity.md"
GOLDEN = ROOT / "tests" / "golden"
PACKAGES = ("torch", "peft", "transformers")
ALLOWED = 1e-2
OF_OTHERS = re.compile(
    r"peft|authors|official|published|LyCORIS|not offered|no official code|the paper (?:draws|leaves)"
)
EXCHANGE = "test_peft_exchange"


class Recorder:
    """A pytest plugin: the errors of every comparison, and the methods attached, for each test file."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, float]] = defaultdict(dict)
        self.comparisons: Counter[str] = Counter()
        self.tests: Counter[str] = Counter()
        self.attached: dict[str, set[str]] = defaultdict(set)
        self.made_of: dict[str, set[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        file, compare, start = item.path.stem, torch.testing.assert_close, Adapter.__post_init__

        def recorded(actual: Any, expected: Any, **options: Any) -> None:
            compare(actual, expected, **options)
            if max(options.get("rtol") or 0.0, options.get("atol") or 0.0) <= ALLOWED:
                self._keep(file, actual, expected)

        def started(adapter: Adapter) -> None:
            start(adapter)
            name, parts = type(adapter.method).__name__, {type(part).__name__ for part in adapter.method.parts()}
            self.attached[file] |= {name, *parts}
            self.made_of.setdefault(name, set()).update(parts)

        with (
            mock.patch("torch.testing.assert_close", recorded),
            mock.patch.object(Adapter, "__post_init__", started),
        ):
            result = yield
        self.tests[file] += 1
        return result

    def _keep(self, file: str, actual: Any, expected: Any) -> None:
        if not isinstance(actual, Tensor) or not isinstance(expected, Tensor) or not actual.is_floating_point():
            return
        scale = float(expected.detach().double().abs().max()) if expected.numel() else 0.0
        if scale == 0.0:
            return
        precision = str(actual.dtype).removeprefix("torch.")
        error = float((actual.detach().double() - expected.detach().double()).abs().max()) / scale
        self.errors[file][precision] = max(error, self.errors[file].get(precision, 0.0))
        self.comparisons[file] += 1


def measured() -> dict[str, Any]:
    """Run the golden tests and return what was compared; raises SystemExit where one fails."""
    recorder = Recorder()
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(GOLDEN)], plugins=[recorder])
    if status != 0:
        raise SystemExit(f"the golden tests ended with {status}: nothing is written")
    files = {
        file: {
            "about": _about(file),
            "methods": _methods_of(file, recorder),
            "tests": recorder.tests[file],
            "comparisons": recorder.comparisons[file],
            "errors": recorder.errors[file],
        }
        for file in sorted(recorder.tests)
    }
    return {
        "date": str(date.today()),
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "files": files,
        "differences": {name: _differences(name) for name in sorted(methods())},
        "sources": _sources(),
    }


def _about(file: str) -> str:
    docstring = (GOLDEN / f"{file}.py").read_text(encoding="utf-8").split('"""')[1]
    return docstring.split("\n\n")[0].replace("\n", " ").strip()


def _named(file: str) -> str:
    return file.removeprefix("test_").removesuffix("_peft").replace("_", "")


def _methods_of(file: str, recorder: Recorder) -> list[str]:
    """Return the method that a file is named after, with those that are nothing but it under another name.

    For other files: all methods that they attached and that have no file of their own.
    """
    attached, own = recorder.attached[file], {_named(other) for other in recorder.attached}
    named = [name for name in attached if name.lower() == _named(file)]
    named = named or [name for name in attached if name.lower().startswith(_named(file))]
    if named:
        return sorted(name for name in attached if name in named or recorder.made_of.get(name, {name}) <= set(named))
    return sorted(name for name in attached if name.lower() not in own and name != "LoRA")


def _differences(name: str) -> list[str]:
    """Return the sentences of a method's docstring that speak of other code, or of what is left out."""
    text = " ".join((inspect.getdoc(methods()[name]) or "").split())
    sentences = re.split(r"(?<=[a-z0-9)`]{2}[.])\s+(?=[A-Z`])", text)
    return [sentence for sentence in sentences[1:] if OF_OTHERS.search(sentence)]


def _sources() -> dict[str, str]:
    """Return repository and commit of the stored figures, by the start of their names."""
    stored = json.loads((GOLDEN / "official_figures.json").read_text(encoding="utf-8"))
    return {name.split("_")[0]: f"{one['repository']} {one['commit'][:7]}" for name, one in stored.items()}


def page(results: dict[str, Any]) -> str:
    """Return the page."""
    files = {file: one for file, one in results["files"].items() if file != EXCHANGE}
    covered = {name for one in files.values() for name in one["methods"]}
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    lines = [
        "# Fidelity",
        "",
        "What every method was compared with, and how far it was from it. This page is written by",
        "`benchmarks/fidelity.py`; nothing in it is written by hand.",
        "",
        "An error is the largest difference as a share of the largest expected number, over the outputs, gradients,",
        "trained tensors and merged weights that the tests of a file compare. Figures of authors' code are stored with",
        "repository, commit, function and inputs in `tests/golden/official_figures.json`; huggingface/peft runs live.",
        "Comparisons that allow more than a hundredth (averages over random draws) are not counted. Claims of papers",
        "about quality are not measured here.",
        "",
        "Measured with: `python benchmarks/fidelity.py --write`",
        "",
        "| methods | compared with | comparisons | largest error, float64 | float32 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file, one in files.items():
        link = f"[{one['about'].rstrip('.')}](../tests/golden/{file}.py)"
        source = results["sources"].get(_named(file))
        cells = [_error(one["errors"], precision) for precision in ("float64", "float32")]
        told = link + (f" ({source})" if source else "")
        lines.append(f"| {', '.join(one['methods'])} | {told} | {one['comparisons']} | {' | '.join(cells)} |")
    rest = [name for name in results["differences"] if name not in covered]
    lines += ["", f"{results['date']}, commit {results['commit']}; {versions}.", "", "## Without figures of others", ""]
    lines += ["Tested against their formulas, written out in the tests, and against finite differences:", ""]
    lines += [f"{', '.join(rest)}.", "", "## Differences from papers and published code", ""]
    lines += ["What the documentation of each method says of them:", "", "<!-- not measured: from the docstrings -->"]
    lines += ["| method | differences |", "| --- | --- |"]
    for name, said in results["differences"].items():
        lines += [f"| {name} | {cell(' '.join(said))} |"] if said else []
    return "\n".join(lines) + "\n"


def _error(errors: dict[str, float], precision: str) -> str:
    return f"{errors[precision]:.0e}" if precision in errors else "–"


def main() -> int:
    """Measure, print, and write where asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the errors and write docs/fidelity.md")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    results = measured()
    print(page(results))
    if options.write:
        write_atomically(RESULTS, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
        write_atomically(PAGE, page(results).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
