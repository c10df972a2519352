"""Flags with several words behind them, the last one optional: `--control canny edges.png 0.8`, `--pag`, `--pag 2`.

The words are joined into one text, quoted as a shell would have them: the same text stands for the value in a file of
settings, in a variable and in a line of prompts.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sana.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Words:
    """What stands behind a flag."""

    needed: int
    """Words that must follow."""
    what: str = ""
    """What they are, for the error when they are missing."""
    more: Callable[[str], bool] = lambda word: False
    """Tells whether one more word belongs to the flag."""
    choices: tuple[str, ...] = ()
    """What the first word may be, for a shell that completes it."""


def join(words: Sequence[str], takers: Mapping[str, Words]) -> list[str]:
    """Return a command line in which each of the flags has its value in one word, `--flag=TEXT`.

    Raises:
        InvalidInput: words are missing behind a flag.
    """
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        taker = takers.get(word)
        if taker is None:
            joined.append(word)
            continue
        values = rest[: taker.needed]
        if len(values) < taker.needed or any(_is_other_flag(value) for value in values):
            raise InvalidInput(f"{word} needs {taker.what}.")
        del rest[: taker.needed]
        if rest and taker.more(rest[0]):
            values.append(rest.pop(0))
        joined.append(f"{word}={shlex.join(values)}")
    return joined


def split(text: str) -> list[str]:
    """Return the words that `join` put into one text, or that a user wrote so.

    Raises:
        InvalidInput: with what follows the flag's name in the sentence.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        reason = str(error).lower()
        raise InvalidInput(f"cannot be read ({reason}): '{text[:40]}'. Put names with blanks in quotes.") from None


def looks_like_number(word: str) -> bool:
    """Tell whether a word has the letters of a number only, and no prompt is meant; its reader tells if it is one."""
    return re.fullmatch(r"[+-]?(\.?\d[\d.,e@+%-]*|nan|inf(inity)?)", word, re.IGNORECASE) is not None


def _is_other_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2
