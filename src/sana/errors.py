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


class BadData(InvalidInput):
    """Samples of a data set are missing or broken, or more of them than a run puts up with."""

    exit_code = 3


class MissingDependency(SanaError, ImportError):
    """An optional package that the requested feature needs is not installed."""

    exit_code = 2


class ModelNotFound(SanaError, OSError):
    """A model, or a file of it, is neither on disk nor reachable."""

    exit_code = 3


class CheckpointError(SanaError, ValueError):
    """Files are there, but their content is not a usable model."""

    exit_code = 3


class NotWritten(SanaError, OSError):
    """A file could not be written: the disk is full, read-only or broken; nothing was left behind."""


class OutOfMemory(SanaError, RuntimeError):
    """The device ran out of memory."""

    exit_code = 4


class NonFinite(SanaError, ArithmeticError):
    """A computation gave NaN or infinity; no picture is made from it."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `choices`, or an empty string when none is close.

    Upper and lower case are the same. Close is what the word begins, what a slip or two of the fingers make of it, what
    it ends, and what it is a longer part of.
    """
    known = {choice.lower().lstrip("-"): choice for choice in choices}  # hyphens would make all flags alike
    bare = word[:_LONGEST].lower().lstrip("-")
    part = bare.strip("_./ ")
    slips = {choice: _slips(bare, choice) for choice in known}
    slipped = sorted((choice for choice in known if slips[choice] <= max(1, len(bare) // 4)), key=lambda c: slips[c])
    close = slipped or difflib.get_close_matches(bare, known, n=1, cutoff=0.6)
    if len(part) >= 3:
        begun = [choice for choice in known if choice.startswith(part)]
        within = [choice for choice in known if choice.endswith(part) or (len(part) >= 5 and part in choice)]
        close = begun or close or within
    return f" Did you mean '{known[close[0]]}'?" if close and bare else ""


def _slips(word: str, choice: str) -> int:
    """Return how many letters are wrong, missing, too many or swapped with the next."""
    before: list[int] = []
    row = list(range(len(choice) + 1))
    for i, letter in enumerate(word):
        above, row_before, row = row, before, [i + 1]
        for j, other in enumerate(choice):
            cost = min(above[j] + (letter != other), above[j + 1] + 1, row[j] + 1)
            if i and j and letter == choice[j - 1] and word[i - 1] == other:
                cost = min(cost, row_before[j - 1] + 1)
            row.append(cost)
        before = above
    return row[-1]


_LONGEST = 100
"""Letters of a word that are compared; nobody mistypes more."""
