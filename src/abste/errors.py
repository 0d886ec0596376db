"""Errors that a user can act on. Each message is one sentence: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AbsteError(Exception):
    """Base of every error that abste raises on purpose; the command line prints its message without a traceback."""


class ConfigError(AbsteError, ValueError):
    """A wrong argument: an unknown name, a value out of range, a wrong type."""


class ConversionError(AbsteError, ValueError):
    """A model that cannot be binarised as asked."""


class FormatError(AbsteError, ValueError):
    """A file that is not an .abste file, is damaged, or is made for a newer reader."""


class DataError(AbsteError, ValueError):
    """A data set that is missing, truncated, or not what its name says."""


class RunError(AbsteError, RuntimeError):
    """A run directory that is missing, foreign, half finished, or already in use."""


class CheckpointError(RunError):
    """A checkpoint that is corrupt or belongs to another recipe."""


class NonFiniteLossError(AbsteError, ArithmeticError):
    """The loss became infinite or NaN during training."""


def nearest(name: object, choices: Iterable[str]) -> str:
    """The end of an "unknown name" message: the nearest known names, or all of them where none is near.

    >>> nearest("ab_tahn", ["ab_tanh", "ste"])
    "did you mean 'ab_tanh'?"
    """
    known = sorted(choices)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(repr(choice) for choice in close) + "?"
    return "known: " + ", ".join(known) + "."
