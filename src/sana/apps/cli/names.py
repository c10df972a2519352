"""Names of the files that will be written: decided, and checked, before anything is drawn."""

import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from sana.apps.cli.output import Terminal, printable
from sana.errors import InvalidInput

LONGEST_SLUG = 60
LONGEST_SLUG_BYTES = 160
"""File systems allow 255 bytes for a name; a Chinese character takes three."""
LONGEST_VALUE = 24
LONGEST_STEM_BYTES = 200
STDOUT = "-"
"""As a name, the standard output."""


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


def safe_name(wish: str) -> str:
    """Return a name that somebody chose as a file can have it on every system; what cannot stay becomes a hyphen."""
    kept = (mark if mark in "-_.+ " or unicodedata.category(mark)[0] in "LNM" else "-" for mark in wish)
    name = unicodedata.normalize("NFC", "".join(kept)).strip(" .") or "picture"
    while len(name.encode()) > LONGEST_SLUG_BYTES:
        name = name[:-1]
    name = name.rstrip(" .")
    return f"{name}-" if name.split(".")[0].upper() in _RESERVED else name


def plan_files(
    prompt: str,
    seeds: Sequence[int],
    output: str | None,
    *,
    name: str = "",
    values: Sequence[str] = (),
    number: str = "",
) -> list[Path]:
    """Return the path of each picture; with `output` a file, several pictures get their seeds into its name.

    Args:
        name: what the pictures are called in a folder, instead of by their prompt.
        values: what a sweep sets for these pictures, as words; they go into the name, numbers with their points.
        number: tells the prompts apart where `output` is a file for several.

    Raises:
        InvalidInput: `output` is no name for a picture, or its folder is missing.
    """
    middle = [value if _NUMBER.fullmatch(value) else slug(value)[:LONGEST_VALUE] for value in values]
    if output == STDOUT:
        return [Path(STDOUT)] * len(seeds)
    if output is not None and not is_folder(output):
        path = Path(output).expanduser()
        _check_file_name(path)
        ends = ([str(seed)] if len(seeds) > 1 else [] for seed in seeds)
        return [path.with_stem("-".join([path.stem, *filter(None, [number]), *middle, *end])) for end in ends]
    folder = Path(output).expanduser() if output is not None else Path()
    name = safe_name(name) if name else slug(prompt)
    while middle and len("-".join([name, *middle]).encode()) > LONGEST_STEM_BYTES and len(name) > 1:
        name = name[:-1]
    return [folder / f"{'-'.join([name.rstrip('-'), *middle, str(seed)])}.png" for seed in seeds]


def is_folder(output: str) -> bool:
    """Tell whether `output` names a folder, there already or not, rather than a file."""
    path = Path(output).expanduser()
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"{printable(output[:40])} is no name for a file ({reason}). Choose another -o.") from None
    return path.is_dir() or output.endswith(("/", os.sep)) or not path.suffix


def _check_file_name(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InvalidInput(f"Pictures are written as PNG, not as {path.suffix}. Let -o end in .png, or name a folder.")
    if not path.parent.is_dir():
        raise InvalidInput(f"There is no folder {path.parent}. Create it first, or choose another -o.")


def distinct(files: Sequence[Path]) -> list[Path]:
    """Return the paths with numbers behind those that would be used twice."""
    taken: dict[Path, None] = {}
    for file in files:
        tried, number = file, 2
        while tried in taken:
            tried, number = file.with_stem(f"{file.stem}-{number}"), number + 1
        taken[tried] = None
    return list(taken)


def check_files(files: Sequence[Path], *, force: bool, make: bool = True) -> None:
    """Make the folder of the files, and refuse names that are taken.

    Args:
        force: existing files are fine.
        make: off, the folder is not made, and a missing one is fine.

    Raises:
        InvalidInput: a file exists already and `force` is off, or the folder cannot be written to.
    """
    folder = files[0].parent
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is there, but is no folder. Choose another -o.")
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        existing = folder.is_dir()
    except OSError as error:
        raise InvalidInput(f"The folder {folder} cannot be made ({error.strerror}). Choose another -o.") from error
    if existing and not os.access(folder, os.W_OK):
        raise InvalidInput(f"The folder {folder.absolute()} cannot be written to. Choose another with -o.")
    for file in files:
        try:
            kind = file.lstat().st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidInput(f"{file} is no name for a file ({error.strerror}). Choose another -o.") from error
        if file.is_dir():
            raise InvalidInput(f"{file} is a folder. Choose another -o.")
        if not stat.S_ISREG(kind) and not stat.S_ISLNK(kind):
            raise InvalidInput(f"{file} is no ordinary file. Choose another -o.")
        if not force:
            raise InvalidInput(f"{file} exists already. Add --force to overwrite it, or choose another --seed or -o.")


def tell_place(folder: Path, what: str, terminal: Terminal) -> None:
    """Say where `what` goes when a folder is a link, and warn when every user of the computer may replace files there.

    Of a folder that is not there yet nothing is said.
    """
    if folder.is_symlink():
        terminal.say(f"{folder} is a link; {what} to {folder.resolve()}.")
    if open_to_all(folder):
        terminal.warn(f"Every user of this computer can replace files in {folder.absolute()}.")


def open_to_all(folder: Path) -> bool:
    """Tell whether every user of the computer may replace files in a folder."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return os.name == "posix" and bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


_RESERVED = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))})
"""Names that Windows keeps for devices."""
_VARIATION_SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
_APOSTROPHES = "'’"
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,12})?")
