"""What the command says: results on stdout, everything else on stderr, a bar only on a terminal."""

import contextlib
import json
import logging
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Self, TextIO

_PLAIN = str.maketrans({"·": "-", "×": "x", "…": "..."})
LONGEST_SILENCE = 60.0
"""Seconds after which a slow run says something."""
_LOG = logging.getLogger("sana")


class Terminal:
    """The two streams of the command, and what the flags make of them."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json, self.quiet, self.verbose = json, quiet, verbose
        self.draft: dict[str, Any] = {}
        """The JSON document so far; printed with the error if the command fails."""
        self.warnings: list[str] = []
        self.progress: Progress | None = None

    def result(self, line: str) -> None:
        """Print a line of the result, unless the JSON document will hold it."""
        if self.progress is not None:
            self.progress.clear()
        if not self.json:
            _write(sys.stdout, line)

    def document(self, content: Mapping[str, Any]) -> None:
        """Print the JSON document if it was asked for."""
        if self.json:
            unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            _write(sys.stdout, json.dumps(content, indent=2, ensure_ascii=not unicode, allow_nan=False))

    def say(self, line: str) -> None:
        """Tell the user something that is not the result."""
        if not self.quiet:
            self._tell(line)

    def warn(self, text: str) -> None:
        """Tell the user what may be wrong; the JSON document lists it."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}")

    def error(self, text: str) -> None:
        """Tell why it did not work."""
        self._tell(f"sana: {text}")

    def _tell(self, line: str) -> None:
        if self.progress is not None:
            self.progress.clear()
        _write(sys.stderr, line)

    def count(self, total: int, done: int = 0, text: str = "") -> "Progress":
        """Return the progress of a run of `total` steps, for a `with` block; `text` is what a bar says at first."""
        return Progress(self, total, done, text)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Pass on Python's warnings and the package's log, each warning once, for the length of a `with` block."""
        handler = _Relay(self)
        level = _LOG.level
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: self.warn(str(message))
            _LOG.addHandler(handler)
            _LOG.setLevel(logging.INFO if self.verbose else logging.WARNING)
            try:
                yield
            finally:
                _LOG.removeHandler(handler)
                _LOG.setLevel(level)


class Progress:
    """A bar on a terminal; elsewhere a line at every tenth of the way, or after a minute; with --quiet nothing."""

    def __init__(self, terminal: Terminal, total: int, done: int = 0, text: str = "") -> None:
        self.terminal, self.total, self.done = terminal, total, done
        self.bar: Any = None
        self._first = done
        self._began = self._spoken = time.perf_counter()
        if not terminal.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            form = "{percentage:3.0f} % |{bar:24}| {desc}"
            self.bar = tqdm(total=total, initial=done, file=sys.stderr, leave=False, bar_format=form)
            self.bar.set_description_str(text)

    def __enter__(self) -> Self:
        self.terminal.progress = self
        return self

    def __exit__(self, *_: object) -> None:
        self.terminal.progress = None
        if self.bar is not None:
            self.bar.close()

    def advance(self, text: str) -> None:
        """Count one step; `text` says which, and how it went."""
        self.move(self.done + 1, self.total, text)

    def move(self, done: int, total: int, text: str) -> None:
        """Say how far it is."""
        before, self.done, self.total = self.done, done, total
        if self.bar is not None:
            self.bar.total = total
            self.bar.set_description_str(f"{text}{self._left()}", refresh=False)
            self.bar.update(done - before)
            return
        now = time.perf_counter()
        if done * 10 // total > before * 10 // total or now - self._spoken > LONGEST_SILENCE:
            self._spoken = now
            self.terminal.say(f"{done * 100 // total:3d} % · {text}{self._left()}")

    def _left(self) -> str:
        elapsed = time.perf_counter() - self._began
        to_do = self.total - self.done
        return f" · {duration(elapsed / (self.done - self._first) * to_do)} left" if to_do else ""

    def clear(self) -> None:
        """Take the bar off the screen; the next step draws it again."""
        if self.bar is not None:
            self.bar.clear()


def printable(text: str) -> str:
    """Return text from elsewhere without the control characters that a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


def duration(seconds: float) -> str:
    """Return a length of time with the precision one wants to read."""
    for limit, unit, size in _UNITS:
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _write(stream: TextIO, line: str) -> None:
    """Write a line whatever the stream's encoding is; file names keep their very bytes."""
    try:
        stream.write(f"{line}\n")
    except UnicodeEncodeError:
        plain = line.translate(_PLAIN)
        if stream is sys.stdout and hasattr(stream, "buffer"):
            stream.flush()
            stream.buffer.write(os.fsencode(plain) + b"\n")
        else:
            encoding = stream.encoding or "ascii"
            stream.write(plain.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


class _Relay(logging.Handler):
    """Hands the package's log records to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.terminal.warn(record.getMessage())
        else:
            self.terminal.say(record.getMessage())


_UNITS = ((60.0, "s", 1), (3600.0, "min", 60), (86400.0, "h", 3600))
