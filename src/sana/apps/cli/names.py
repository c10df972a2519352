"""Names of the files that will be written: decided, and checked, before anything is drawn."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from sana.errors import InvalidInput

LONGEST_SLUG = 60
LONGEST_SLUG_BYTES = 160
"""File systems allow 255 bytes for a name; a Chinese character takes three."""


def slug(prompt: str) -> str:
    """Return the words of a prompt joined by hyphens: letters and digits of any script, emoji by their names."""
    parts = [_part(mark) for mark in unicodedata.normalize("NFC", prompt).lower()]
    words = "".join(parts).split()
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else _shortened(word)
        if len(longer) > LONGEST_SLUG or len(longer.encode()) > LONGEST_SLUG_BYTES:
            break
        name = longer
    return name or "picture"


def _part(mark: str) -> str:
    """Return what one character becomes: itself, a name, a gap between words, or nothing."""
    category = unicodedata.category(mark)
    if category[0] in "LN" or category in ("Mn", "Mc"):
        return "" if mark in _VARIATION_SELECTORS else mark
    if category == "So":
        return f" {unicodedata.name(mark, '').lower()} "
    return "" if category in ("Cf", "Sk") or mark in _APOSTROPHES else " "


def _shortened(word: str) -> str:
    short = word[:LONGEST_SLUG]
    while len(short.encode()) > LONGEST_SLUG_BYTES:
        short = short[:-1]
    return short


def plan_files(prompt: str, seeds: Sequence[int], output: str | None) -> list[Path]:
    """Return the path of each picture; with `output` a file, several pictures get their seeds into its name.

    Raises:
        InvalidInput: `output` is no name for a picture, or its folder is missing.
    """
    if output is None:
        return [Path(f"{slug(prompt)}-{seed}.png") for seed in seeds]
    path = Path(output).expanduser()
    if path.is_dir() or output.endswith(("/", os.sep)) or not path.suffix:
        return [path / f"{slug(prompt)}-{seed}.png" for seed in seeds]
    if path.suffix.lower() != ".png":
        raise InvalidInput(f"Pictures are written as PNG, not as {path.suffix}. Let -o end in .png, or name a folder.")
    if not path.parent.is_dir():
        raise InvalidInput(f"There is no folder {path.parent}. Create it first, or choose another -o.")
    return [path] if len(seeds) == 1 else [path.with_stem(f"{path.stem}-{seed}") for seed in seeds]


def check_files(files: Sequence[Path], *, force: bool) -> None:
    """Make the folder of the files, and refuse names that are taken.

    Raises:
        InvalidInput: a file exists already and `force` is off, or the folder cannot be written to.
    """
    folder = files[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"The folder {folder} cannot be made ({error.strerror}). Choose another -o.") from error
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"The folder {folder.absolute()} cannot be written to. Choose another with -o.")
    for file in files:
        if file.is_dir():
            raise InvalidInput(f"{file} is a folder. Choose another -o.")
        if file.exists() and not force:
            raise InvalidInput(f"{file} exists already. Add --force to overwrite it, or choose another --seed or -o.")


_VARIATION_SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
_APOSTROPHES = "'’"
