"""What the command says: results on stdout, everything else on stderr, a bar only on a terminal."""

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from PIL import Image

_PLAIN = str.maketrans({"·": "-", "×": "x", "…": "...", "✓": "+", "✗": "x"})
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of text round, and make it read as something else."""
SHORTEST_SILENCE = 2.0
"""Seconds between two lines of progress where there is no bar."""
LONGEST_SILENCE = 60.0
"""Seconds after which a slow run says something."""
_LOG = logging.getLogger("sana")
_ADAPTERS = logging.getLogger("sana.engine.adapters")
_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers of libraries that transformers imports where they are installed, and that tell what they lack."""


class Terminal:
    """The two streams of the command, and what the flags make of them."""

    def __init__(
        self,
        *,
        json: bool = False,
        events: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        thumbnail: bool | None = None,
    ) -> None:
        self.json, self.events, self.quiet, self.verbose = json, events, quiet, verbose
        self.thumbnail = thumbnail
        """Whether pictures are shown; None: where the terminal can."""
        self.draft: dict[str, Any] = {}
        """The JSON document so far; printed with the error if the command fails."""
        self.warnings: list[str] = []
        self.introduced: set[str] = set()
        """Models whose terms were told."""
        self.progress: Progress | None = None
        self._is_done = False

    def result(self, line: str, *, colour: str = "") -> None:
        """Print a line of the result, unless the JSON document or an event will hold it.

        On a terminal that shows colours, the first character has the `colour`.
        """
        if self.progress is not None:
            self.progress.clear()
        if self.json or self.events:
            return
        if is_terminal(sys.stdout):
            line = printable(line)
            if colour and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
                line = f"\x1b[{_COLOURS[colour]}m{line[:1]}\x1b[0m{line[1:]}"
        _write(sys.stdout, line)

    def document(self, content: Mapping[str, Any]) -> None:
        """Print the JSON document if it was asked for; among events it is the last one, `done`."""
        if self.json:
            _write(sys.stdout, _json(content, indent=2))
        self.event("done", **content)

    def event(self, name: str, /, **facts: Any) -> None:
        """Print one line of JSON about what happens, if events were asked for; nothing follows `done` or `error`."""
        if self.events and not self._is_done:
            self._is_done = name in ("done", "error")
            _write(sys.stdout, _json({"event": name, **facts}))

    def show(self, image: "Image.Image") -> None:
        """Show a picture small, where the terminal can and the user did not ask for silence."""
        silent = self.quiet or self.json or self.events or bool(os.environ.get("NO_COLOR"))
        if self.thumbnail is False or silent or not is_terminal(sys.stderr):
            return
        from sana.apps.cli.thumbnail import protocol, thumbnail

        way = protocol(os.environ, sys.stderr.encoding or "")
        if way is None and self.thumbnail and _knows_unicode(sys.stderr):
            way = "truecolor"
        if way is not None:
            size = shutil.get_terminal_size()
            self._tell(thumbnail(image, way, size.columns, size.lines), raw=True)

    def say(self, line: str) -> None:
        """Tell the user something that is not the result."""
        if not self.quiet:
            self._tell(line)

    def warn(self, text: str) -> None:
        """Tell the user what may be wrong; the JSON document lists it."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.event("warning", message=text)
            self.say(f"warning: {text}")

    def error(self, text: str, code: int = 1) -> None:
        """Tell why it did not work; the JSON document, or the last event, says it too."""
        self._tell(f"sana: {text}")
        failure = {"message": text, "exit_code": code}
        if self.json:
            self.document({**self.draft, "error": failure})
        self.event("error", **failure, **self.draft)

    def explain(self, error: BaseException) -> None:
        """Show the traceback of an error if more was asked for."""
        if self.verbose:
            self._tell("".join(traceback.format_exception(error)).rstrip())

    def _tell(self, line: str, *, raw: bool = False) -> None:
        """Write to stderr; that nobody hears it is no reason to stop."""
        with contextlib.suppress(OSError, ValueError):
            if self.progress is not None:
                self.progress.clear()
            _write(sys.stderr, line if raw else printable(line))

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
            _ADAPTERS.setLevel(logging.INFO)  # how many layers an adapter matched is always told
            for name in () if self.verbose else _NOISY:
                logging.getLogger(name).setLevel(logging.ERROR)
            try:
                yield
            finally:
                _LOG.removeHandler(handler)
                _LOG.setLevel(level)
                _ADAPTERS.setLevel(logging.NOTSET)


class Progress:
    """A bar on a terminal; elsewhere a line at every tenth of the way, if that takes a while; with --quiet nothing."""

    def __init__(self, terminal: Terminal, total: int, done: int = 0, text: str = "") -> None:
        self.terminal, self.total, self.done = terminal, total, done
        self.bar: Any = None
        self._first = done
        self._is_due = False
        self._began = self._spoken = time.perf_counter()
        if not terminal.quiet and is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            form = "{percentage:3.0f} % |{bar:24}| {desc}"
            with self._unheard():
                self.bar = tqdm(total=total, initial=done, file=sys.stderr, leave=False, bar_format=form, **_width())
                self.bar.set_description_str(_shown(text))

    def __enter__(self) -> Self:
        self.terminal.progress = self
        return self

    def __exit__(self, *_: object) -> None:
        self.terminal.progress = None
        if self.bar is not None:
            with self._unheard():
                self.bar.close()

    def advance(self, text: str) -> None:
        """Count one step; `text` says which, and how it went."""
        self.move(self.done + 1, self.total, text)

    def move(self, done: int, total: int, text: str) -> None:
        """Say how far it is."""
        before, self.done, self.total = self.done, done, total
        if self.bar is not None:
            with self._unheard():
                self.bar.total = total
                self.bar.set_description_str(_shown(f"{text}{self._left()}"), refresh=False)
                self.bar.update(done - before)
            return
        now = time.perf_counter()
        self._is_due |= done * 10 // total > before * 10 // total
        silence = now - self._spoken
        if (self._is_due and silence >= SHORTEST_SILENCE) or silence > LONGEST_SILENCE:
            self._is_due, self._spoken = False, now
            self.terminal.say(f"{done * 100 // total:3d} % · {text}{self._left()}")

    def _left(self) -> str:
        elapsed = time.perf_counter() - self._began
        to_do = self.total - self.done
        return f" · {duration(elapsed / max(1, self.done - self._first) * to_do)} left" if to_do > 0 else ""

    def clear(self) -> None:
        """Take the bar off the screen; the next step draws it again."""
        if self.bar is not None:
            with self._unheard():
                self.bar.clear()

    @contextlib.contextmanager
    def _unheard(self) -> Iterator[None]:
        """Do without the bar when the terminal has gone: the work goes on."""
        try:
            yield
        except (OSError, ValueError):
            self.bar = None


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a person may read a stream; a closed one is None, or says that it is closed."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def listed(rows: Mapping[str, str | Sequence[str]]) -> list[str]:
    """Return names and values in two columns, wrapped to the terminal; what is empty is left out."""
    width = max(20, min(shutil.get_terminal_size().columns, 100) - 2)
    hang = " " * (max(map(len, rows)) + 4)
    lines = []
    for name, value in rows.items():
        for i, part in enumerate([value] if isinstance(value, str) else value):
            start = f"  {name if i == 0 else ''}".ljust(len(hang))
            lines += textwrap.wrap(
                part,
                width,
                initial_indent=start,
                subsequent_indent=hang,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def printable(text: str) -> str:
    """Return text from elsewhere without the characters that a terminal would obey."""
    return "".join(
        "\ufffd" if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or c in _BIDI else c for c in text
    )


def duration(seconds: float) -> str:
    """Return a length of time with the precision one wants to read."""
    for limit, unit, size in _UNITS:
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def silence_stdout() -> None:
    """Let what is still to be written to a stdout that is closed, or full, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be no real file, or none at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json(content: Mapping[str, Any], indent: int | None = None) -> str:
    """Return JSON that every stream and terminal takes: no lone surrogates, no control characters."""
    text = json.dumps(content, indent=indent, ensure_ascii=not _knows_unicode(sys.stdout), allow_nan=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _knows_unicode(stream: TextIO | None) -> bool:
    return (getattr(stream, "encoding", None) or "").lower().startswith("utf")


def _width() -> dict[str, Any]:
    """Return what tells a bar its width: the terminal, at every step, or once the environment if it does not know."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        known = 0
    return {"dynamic_ncols": True} if known else {"ncols": shutil.get_terminal_size().columns}


def _shown(text: str) -> str:
    """Return the text of a bar as the terminal can show it."""
    return printable(text if _knows_unicode(sys.stderr) else text.translate(_PLAIN))


def _write(stream: TextIO | None, line: str) -> None:
    """Write a line whatever the stream's encoding is; file names keep their very bytes."""
    if stream is None:  # it was closed before the program began
        return
    try:
        stream.write(f"{line}\n")
    except UnicodeEncodeError:
        plain = line.translate(_PLAIN)
        if stream is sys.stdout and hasattr(stream, "buffer"):
            stream.flush()
            stream.buffer.write(_path_bytes(plain) + b"\n")
        else:
            encoding = stream.encoding or "ascii"
            stream.write(plain.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _path_bytes(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # no file can have this name here
        return text.encode("ascii", "backslashreplace")


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


_COLOURS = {"green": 32, "yellow": 33, "red": 31}
_UNITS = ((60.0, "s", 1), (3600.0, "min", 60), (86400.0, "h", 3600))
