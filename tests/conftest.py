"""Shared by all tests: the data folder beside the checkout, and what happens where it is absent."""

from __future__ import annotations

import signal
from collections.abc import Generator
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: tests interrupt commands
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data folder beside the checkout; a test that uses it is marked `shared`."""
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `shared` where the folder is absent; a test that uses the folder unmarked is an error."""
    for item in items:
        marked = item.get_closest_marker("shared") is not None
        if "shared" in getattr(item, "fixturenames", ()) and not marked:
            raise pytest.UsageError(f"{item.nodeid} uses the fixture `shared`: mark it with @pytest.mark.shared")
        if marked and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"needs the data folder {SHARED}, which is absent"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where the folder exists, a `shared` test that skips all the same fails: its data must not go missing unseen."""
    report = yield
    if report.skipped and SHARED.is_dir() and item.get_closest_marker("shared") is not None:
        report.outcome = "failed"
        report.longrepr = f"skipped although {SHARED} exists: {report.longrepr}"
    return report
