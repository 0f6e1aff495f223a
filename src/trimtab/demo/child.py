"""One contestant in a process of its own, so that its peak memory is its own; tells its progress in JSON lines.

python -m trimtab.demo.child KEY DATA_FOLDER RUN_FOLDER EPOCHS
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from trimtab.demo.contestants import contestant
from trimtab.demo.data import settings_for
from trimtab.errors import TrimtabError
from trimtab.training.progress import Progress
from trimtab.training.run import execute, prepare


def tell(kind: str, **facts: object) -> None:
    """Write one line for the parent."""
    print(json.dumps({"kind": kind, **facts}), flush=True)


def show(progress: Progress) -> None:
    """Tell one step."""
    tell("step", step=progress.step, total=progress.total_steps, loss=progress.loss, remaining=progress.remaining)


def main(arguments: list[str]) -> int:
    """Train one contestant; the last line is its report, or its error."""
    key, data, folder, epochs = arguments
    one = contestant(key)
    try:
        run = prepare(settings_for(one, Path(data), one.lr, float(epochs)))
        report = execute(run, Path(folder), overwrite=True, on_progress=show)
    except TrimtabError as error:
        tell("error", text=str(error))
        return 2
    tell("report", **dataclasses.asdict(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
