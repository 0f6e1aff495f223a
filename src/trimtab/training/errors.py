"""Errors of training: of its data, its models, and of a run that the user stopped."""

from __future__ import annotations

from trimtab.errors import TrimtabError


class DataError(TrimtabError):
    """Training data cannot be used as asked; names the file, the line, what was found and the way out."""


class ModelError(TrimtabError):
    """A model to train cannot be found, or does not hold what the task needs."""


class Interrupted(TrimtabError):
    """The user stopped a training run; says what was saved and how to go on."""
