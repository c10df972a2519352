"""Files of prompts: lines of text, or records (JSON lines, JSON, CSV) whose fields are those of a request."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.apps.cli.arguments import Option
from sana.apps.cli.settings import decoded, from_text, from_value, read_text
from sana.errors import InvalidInput, did_you_mean

MOST_BYTES = 16_000_000
MOST_PROMPTS = 100_000
"""Sets of prompts that models are measured with have 30,000."""
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One prompt of a file, and the settings that stand with it."""

    place: str
    """File and line, for messages."""
    values: Mapping[str, Any]
    """By field name, `prompt` among them, as the flags' readers return them."""
    name: str = ""
    """What its pictures are to be called, or empty."""


def read_prompts(source: str, keys: Mapping[str, Option]) -> list[Entry]:
    """Return the prompts of a file, or with `-` of stdin, where lines of text and lines of JSON are both understood.

    Args:
        keys: what an entry may set.

    Raises:
        InvalidInput: naming file and line.
    """
    name, read, text = _opened(source)
    entries: list[Entry] = []
    for place, values in read(text, name):
        if len(entries) == MOST_PROMPTS:
            raise InvalidInput(f"{name} has more than {MOST_PROMPTS} prompts. Split it.")
        checked = _checked(place, values, keys, from_text if read is _csv else from_value)
        called = str(checked.pop("name", ""))
        entries.append(Entry(place=place, values=checked, name=called))
    if not entries:
        raise InvalidInput(f"{name} holds no prompt. Write one into each line.")
    return entries


def _opened(source: str) -> tuple[str, "_Reader", str]:
    """Return the name for messages, the reader that fits and the text."""
    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidInput("There is nothing to read on stdin. Pipe prompts into the command, or name a file.")
        text = decoded(sys.stdin.buffer.read(MOST_BYTES + 1), "stdin", MOST_BYTES)
        return "stdin", _lines, text
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower()) if path.suffix else _lines
    if reader is None:
        raise InvalidInput(f"Prompts are read from {', '.join(_READERS)} files or - for stdin, not from {source}.")
    return source, reader, read_text(path, MOST_BYTES)


def _lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read what does not say what it is: JSON lines if all lines look like objects, else text."""
    lines = [line for line in text.splitlines() if line.strip()]
    records = bool(lines) and all(line.lstrip().startswith("{") for line in lines)
    yield from (_json_lines if records else _plain)(text, name)


def _plain(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{name}, line {number}", {"prompt": line.strip()}


def _json_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{name}, line {number}"
            yield place, _record(place, _parsed(place, line))


def _json(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    content = _parsed(name, text)
    if isinstance(content, dict):
        yield from _named_records(content, name)
        return
    if not isinstance(content, list):
        raise InvalidInput(f"{name} must hold a list of prompts: texts, or objects with a `prompt`.")
    for number, value in enumerate(content, start=1):
        place = f"{name}, entry {number}"
        yield place, _record(place, value)


def _named_records(content: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read an object of records, whose keys are the names of the pictures."""
    if isinstance(content.get("prompt"), str):
        raise InvalidInput(f"{name} must hold a list of prompts, or an object of them by name: put [] around it.")
    for key, value in content.items():
        place = f"{name}, entry '{key[:40]}'"
        record = _record(place, value)
        record.pop("category", None)  # the published prompt sets of this form sort their prompts by it
        yield place, {"name": key, **record}


def _csv(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        if "prompt" not in header or len(set(header)) < len(header):
            text = "the first row must name the columns, each once, with commas between them, `prompt` among them"
            raise InvalidInput(f"{name}, line 1: {text}.")
        for row in rows:
            place = f"{name}, line {rows.line_num}"
            if len(row) > len(header):
                raise InvalidInput(f"{place}: there are {len(row)} cells but {len(header)} columns. Quote commas.")
            filled = {column: cell for column, cell in zip(header, row, strict=False) if cell.strip()}
            if filled:
                yield place, filled
    except csv.Error as error:
        raise InvalidInput(f"{name}, line {rows.line_num}: this is no CSV ({error}). Mend it.") from None


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _without_doubles(place, pairs))
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{place}: this is no JSON ({error}). Mend it.") from None
    except InvalidInput:  # a ValueError too
        raise
    except (RecursionError, ValueError):
        raise InvalidInput(f"{place}: this JSON is too deep or its numbers too long. Mend it.") from None


def _without_doubles(place: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that stands in an object twice, of which JSON would keep the last alone."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"{place}: '{twice[:40]}' is there twice. Rename one of them.")
    return found


def _record(place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise InvalidInput(f"{place}: an entry is a text or an object with a `prompt`, not {repr(value)[:40]}.")
    return {name: given for name, given in value.items() if given is not None}


def _checked(
    place: str, values: Mapping[str, Any], keys: Mapping[str, Option], read: Callable[[Option, Any], Any]
) -> dict[str, Any]:
    if "prompt" not in values:
        raise InvalidInput(f"{place}: there is no `prompt`. Add one.")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in keys:
            known = did_you_mean(name, keys) or f" Known: {', '.join(keys)}."
            raise InvalidInput(f"{place}: there is no field '{name[:40]}'.{known}")
        try:
            checked[name] = read(keys[name], value)
        except InvalidInput as error:
            raise InvalidInput(f"{place}: {name} {error}") from None
    return checked


_Reader = Callable[[str, str], Iterator[tuple[str, dict[str, Any]]]]
_READERS: dict[str, _Reader] = {".txt": _plain, ".jsonl": _json_lines, ".json": _json, ".csv": _csv}
"""By the end of the name; one without, such as a pipe's, is read as stdin is."""
