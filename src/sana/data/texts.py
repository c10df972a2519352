"""Captions as files hold them: plain text, lines of JSON, and what a record of JSON says of a picture's captions.

A record has its main caption under `prompt`, `text` or `caption`; others under `captions`, a list of texts or of
{"text", "name", "weight", "score"}, or an object name -> text. `score` and `weight` belong to the main caption;
`scores` and `weights` are lists beside `captions`, or objects name -> number.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sana.data.samples import BadSample, Caption, Finding

MAX_TEXT = 2**20
"""Bytes of the longest text or line that is read."""
MAX_JSON = 2**28
"""Bytes of the largest file of JSON beside a shard."""
MAIN = ("prompt", "text", "caption")


def one_line(data: bytes, place: str) -> str:
    """Return a text with every run of white space made one space. Raises BadSample."""
    if len(data) > MAX_TEXT:
        raise _bad(place, f"has more than {MAX_TEXT >> 10} kB, which no caption has. Shorten it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _bad(place, "is not in UTF-8. Save it anew in that encoding.", line) from None
    if "\0" in text:
        raise _bad(place, "holds zero bytes, so it is no text.", text[: text.index("\0")].count("\n") + 1)
    return " ".join(text.split())


def parse_json(data: bytes, place: str, line: int | None = None) -> Any:
    """Return what JSON says; NaN and infinities are refused. Raises BadSample with the line."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _bad(place, "is not in UTF-8. Save it anew in that encoding.", line or _line(data, error.start)) from None
    except json.JSONDecodeError as error:
        raise _bad(place, f"is not valid JSON ({error.msg}). Mend it.", line or error.lineno) from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:80]
        raise _bad(place, f"is not valid JSON ({reason}). Mend it.", line) from None


def json_lines(path: Path, place: str) -> Iterator[tuple[int, dict[str, Any] | Finding]]:
    """Yield each line that is not blank: its number, and its object or what is wrong with it."""
    with path.open("rb") as file:
        for number, data in enumerate(_lines(file), 1):
            if not data.strip():
                continue
            if len(data) > MAX_TEXT:
                yield number, _bad(place, f"has more than {MAX_TEXT >> 10} kB. Shorten the line.", number).finding
                continue
            try:
                value = parse_json(data, place, number)
            except BadSample as error:
                yield number, error.finding
                continue
            if isinstance(value, dict):
                yield number, value
            else:
                yield number, _bad(place, "holds no JSON object, which stands in {braces}.", number).finding


def captions_of(record: Mapping[str, Any], place: str, line: int | None = None) -> tuple[Caption, ...]:
    """Return the captions of a record, those that are empty left out. Raises BadSample."""
    found: list[Caption] = []
    main = next((key for key in MAIN if record.get(key) is not None), None)
    if main is not None:
        given = {"text": record[main], "score": record.get("score"), "weight": record.get("weight")}
        found.append(_caption(given, "prompt", place, line))
    others = record.get("captions") or ()
    if isinstance(others, Mapping):
        found += [_caption(value, name, place, line) for name, value in others.items()]
    elif isinstance(others, Sequence) and not isinstance(others, str):
        found += [_caption(value, "prompt", place, line) for value in others]
    else:
        raise _bad(place, "has `captions` that are neither a list nor an object.", line)
    for field in ("score", "weight"):
        found = _told_apart(found, record.get(f"{field}s"), field, 0 if main is None else 1, place, line)
    return tuple(caption for caption in found if caption.text)


def number(value: Any, what: str, place: str, line: int | None = None) -> float:
    """Return a number of at least 0, which published files also write as a text. Raises BadSample."""
    try:
        told = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        told = math.nan
    if not 0 <= told < math.inf:
        raise _bad(place, f"has a {what} that is no number of at least 0: {str(value)[:40]!r}.", line)
    return told


def _caption(value: Any, name: str, place: str, line: int | None) -> Caption:
    given = value if isinstance(value, Mapping) else {"text": value}
    text = given.get("text", given.get("caption"))
    if not isinstance(text, str):
        raise _bad(place, f"has a caption that is no text: {str(text)[:40]!r}.", line)
    told = given.get("name", name)
    score, weight = given.get("score"), given.get("weight")
    return Caption(
        text=" ".join(text.split()),
        name=told if isinstance(told, str) else name,
        score=None if score is None else number(score, "score", place, line),
        weight=1.0 if weight is None else number(weight, "weight", place, line),
    )


def _told_apart(
    captions: list[Caption], values: Any, field: str, before: int, place: str, line: int | None
) -> list[Caption]:
    """Return the captions with the scores, or the weights, that stand beside them."""
    if values is None:
        return captions
    by_place: dict[int, Any] = {}
    if isinstance(values, Mapping):
        by_place = {i: values[one.name] for i, one in enumerate(captions) if one.name in values}
    elif isinstance(values, list) and len(values) == len(captions) - before:
        by_place = dict(enumerate(values, before))
    elif isinstance(values, list) and len(values) == len(captions):
        by_place = dict(enumerate(values))
    else:
        raise _bad(place, f"has `{field}s` that do not fit its {len(captions)} captions.", line)
    told = {i: None if value is None else number(value, field, place, line) for i, value in by_place.items()}
    return [replaced(one, field, told.get(i)) for i, one in enumerate(captions)]


def replaced(caption: Caption, field: str, value: float | None) -> Caption:
    """Return a caption with another score or weight; None leaves it as it is."""
    if value is None:
        return caption
    weight, score = (value, caption.score) if field == "weight" else (caption.weight, value)
    return Caption(text=caption.text, name=caption.name, weight=weight, score=score)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, of over-long ones the beginning: a file without line ends must not fill the memory."""
    while data := file.readline(MAX_TEXT + 1):
        whole = data
        while len(data) > MAX_TEXT and not data.endswith(b"\n"):
            data = file.readline(MAX_TEXT + 1)
        yield whole


def _line(data: bytes, place: int) -> int:
    return data[:place].count(b"\n") + 1


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _bad(place: str, text: str, line: int | None = None) -> BadSample:
    return BadSample(Finding(kind="bad-text", place=place, text=text, line=line))
