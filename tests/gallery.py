"""The page of pains, made from the tests that answer them: `python tests/gallery.py` writes docs/pains.md.

A test of the gallery is named after a thread, and its docstring says: the number of the pain and the pain itself; what
Trimtab does; `Threads:` and every thread that the test answers.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "pains.md"
PAINS = range(1, 31)
_DOCSTRING = re.compile(r"(?P<number>\d+)\. (?P<pain>.+?)\n\n(?P<answer>.+)\nThreads: (?P<threads>.+)", re.DOTALL)
HEAD = """# Pains

What users of other libraries reported, and what Trimtab does there. Every line is a regression test that does what the
users of the thread did. This page is written by `python tests/gallery.py` from the tests' own words.

<!-- not measured: the numbers are those of the pains and of the threads -->
| | Pain | What Trimtab does | Threads | Test |
|---:|---|---|---|---|
"""


@dataclass(frozen=True)
class Entry:
    """One test of the gallery."""

    number: int
    pain: str
    answer: str
    threads: tuple[str, ...]
    test: str

    def row(self) -> str:
        """The entry as a row of the page's table."""
        file, name = self.test.split("::")
        threads = ", ".join(self.threads)
        return f"| {self.number} | {self.pain} | {self.answer} | {threads} | [`{name}`](../tests/{file}) |"

    def is_named_after_a_thread(self) -> bool:
        """Whether the test's name begins with one of its threads."""
        name = self.test.split("::")[1].removeprefix("test_")
        starts = (thread.lower().replace("-", "_").replace("#", "_") for thread in self.threads)
        return any(name.startswith(start + "_") for start in starts)


def entry_of(file: Path, function: ast.FunctionDef) -> Entry:
    """Return what a test says about itself; raises ValueError where it does not say it in the form above."""
    found = _DOCSTRING.fullmatch(ast.get_docstring(function) or "")
    if found is None:
        raise ValueError(f"{file.name}::{function.name} does not name its pain, the answer and the threads.")
    pain, answer = (" ".join(found[part].split()) for part in ("pain", "answer"))
    threads = tuple(found["threads"].replace("\n", " ").replace(",", " ").split())
    return Entry(int(found["number"]), pain, answer, threads, f"{file.name}::{function.name}")


def entries() -> list[Entry]:
    """Return the gallery, by the pains' numbers."""
    files = sorted(TESTS.glob("test_gallery_of_pains_*.py"))
    tests = [(file, node) for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    found = [
        entry_of(file, node)
        for file, node in tests
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return sorted(found, key=lambda entry: entry.number)


def page() -> str:
    """Return the text of docs/pains.md."""
    return HEAD + "\n".join(entry.row() for entry in entries()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
