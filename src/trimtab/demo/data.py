"""The embedded messages: written for this project, 28 intents with near misses on purpose, fixed splits."""

from __future__ import annotations

import csv
import io
from importlib import resources
from pathlib import Path

from trimtab.adapter_file import write_atomically
from trimtab.demo.contestants import Contestant
from trimtab.training.run_settings import RunSettings
from trimtab.training.schedule import LoopSettings

SPLITS = ("train", "validation", "test")
BATCH, EPOCHS, MAX_LENGTH = 8, 3.0, 64


def messages() -> list[dict[str, str]]:
    """Return the rows with their `text`, `intent` and `split`."""
    text = resources.files("trimtab.demo").joinpath("support_messages.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def write_splits(folder: Path) -> None:
    """Write train.csv, validation.csv and test.csv, as a user's own data would look."""
    rows = messages()
    for split in SPLITS:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("text", "intent"))
        writer.writerows((row["text"], row["intent"]) for row in rows if row["split"] == split)
        write_atomically(folder / f"{split}.csv", stream.getvalue().encode())


def settings_for(one: Contestant, data: Path, lr: float, epochs: float = EPOCHS, seed: int = 0) -> RunSettings:
    """Return the run of one contestant on the split files in `data`; the same for all but method and rate."""
    loop = LoopSettings(lr=lr, epochs=epochs, batch_size=BATCH, seed=seed, group_by_length=True)
    return RunSettings(
        model="minilm",
        data=str(data / "train.csv"),
        validation=str(data / "validation.csv"),
        test=str(data / "test.csv"),
        method=one.method,
        loop=loop,
        columns={"text": "text", "label": "intent"},
        max_length=MAX_LENGTH,
    )
