"""One exception family: every message says what is wrong and what to do.

Each class also derives from the built-in exception that callers of comparable libraries expect
(`ValueError` for bad arguments, `OSError` for missing files), so existing `except` clauses keep working.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class SanaError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command returns for it."""

    exit_code: ClassVar[int] = 1


class InvalidInput(SanaError, ValueError):
    """An argument, setting or prompt that cannot be honoured."""

    exit_code = 2


class MissingDependency(SanaError, ImportError):
    """An optional package that the requested feature needs is not installed."""

    exit_code = 2


class ModelNotFound(SanaError, OSError):
    """A model, or a file of it, is neither on disk nor reachable."""

    exit_code = 3


class CheckpointError(SanaError, ValueError):
    """Files are there, but their content is not a usable model."""

    exit_code = 3


class OutOfMemory(SanaError, RuntimeError):
    """The device ran out of memory."""

    exit_code = 4


class NonFinite(SanaError, ArithmeticError):
    """A computation gave NaN or infinity; no picture is made from it."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `choices`, or an empty string when none is close."""
    close = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
