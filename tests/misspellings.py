"""Words misspelt in three ways (two neighbouring characters swapped, one dropped, one doubled), and what is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

import random_command_lines as lines
import trimtab as tt
from trimtab.cli.settings import make_method
from trimtab.method import find_method
from trimtab.structure import Structure
from trimtab.targets import ROLES, resolve
from trimtab.training.run_settings import make_run_settings, option_types


@dataclass(frozen=True)
class Told:
    """What was said about a misspelt word; None where it was not stopped."""

    word: str
    wrong: str
    text: str | None

    @property
    def helps(self) -> bool:
        """Whether the right word is shown as one that could be meant."""
        return self.text is not None and f"'{self.word}'" in self.text


def misspellings(word: str, every: bool = True) -> Iterator[str]:
    """Yield `word` misspelt at every place, or (unless `every`) in each of the three ways in its middle."""
    places = range(len(word)) if every else (len(word) // 2,)
    for place in places:
        swapped = word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]
        dropped = word[:place] + word[place + 1 :]
        doubled = word[:place] + word[place] + word[place:]
        yield from (wrong for wrong in dict.fromkeys((swapped, dropped, doubled)) if wrong not in ("", word))


def told_about(
    word: str, is_valid: Callable[[str], bool], use: Callable[[str], object], every: bool = True
) -> Iterator[Told]:
    """Yield what is said about each misspelling of a word that is not itself valid."""
    for wrong in misspellings(word, every):
        if not is_valid(wrong):
            try:
                use(wrong)
            except (tt.TrimtabError, AttributeError) as error:
                yield Told(word, wrong, str(error))
            else:
                yield Told(word, wrong, None)


def settings() -> Iterator[Told]:
    """Every setting of every method."""
    for cls in tt.methods().values():
        known = {entry.name for entry in dataclasses.fields(cls)}
        for word in known:
            yield from told_about(word, known.__contains__, lambda wrong, cls=cls: cls(**{wrong: 1}))


def methods() -> Iterator[Told]:
    """Every method, in Python and on the command line."""
    known = {name.lower() for name in tt.methods()}
    for word in tt.methods():
        for use in (find_method, lambda wrong: make_method(wrong, {})):
            yield from told_about(word, lambda wrong: wrong.lower() in known, use)


def public_names() -> Iterator[Told]:
    """Every name of the package."""
    for word in (*tt.__all__, *tt.methods()):
        is_valid = lambda wrong: wrong.startswith("_") or wrong in dir(tt) or wrong in vars(tt)  # noqa: E731
        yield from told_about(word, is_valid, lambda wrong: getattr(tt, wrong))


def run_options() -> Iterator[Told]:
    """Every option of a training run, as a run file names it."""
    known = option_types()
    for word in known:
        yield from told_about(word, known.__contains__, lambda wrong: make_run_settings(tt.LoRA(), {wrong: 1}))


def roles(model: nn.Module) -> Iterator[Told]:
    """Every role of the target language."""
    structure = Structure(model)
    for word in ROLES:
        yield from told_about(word, lambda wrong: _names(structure, wrong), lambda wrong: resolve(structure, wrong))


def modules(model: nn.Module, every: bool, step: int = 1) -> Iterator[Told]:
    """Every module of a model (or each `step`-th) by its whole name."""
    structure = Structure(model)
    for word in [path for path in structure.modules if path][::step]:
        is_valid, use = lambda wrong: _names(structure, wrong), lambda wrong: resolve(structure, wrong)
        yield from told_about(word, is_valid, use, every)


def _names(structure: Structure, wrong: str) -> bool:
    return wrong in ROLES or any(path == wrong or path.endswith(f".{wrong}") for path in structure.modules)


def options(command: str, every: bool) -> Iterator[Told]:
    """A command, and every long option of it."""

    def use(words: list[str]) -> None:
        ended = lines.run(words)
        if ended.status != 0:
            assert (ended.status, ended.out) == (2, "")
            raise tt.TrimtabError(ended.err)

    yield from told_about(command, lines.COMMANDS.__contains__, lambda wrong: use([wrong]), every)
    params = lines.COMMANDS[command].params
    known = {option for param in params for option in (*param.opts, *param.secondary_opts) if option.startswith("--")}
    for option in sorted(known):
        for told in told_about(
            option[2:], lambda wrong: f"--{wrong}" in known, lambda wrong: use([command, f"--{wrong}", "x"]), every
        ):
            yield dataclasses.replace(told, word=option)
