"""Captions and scores written beside pictures, in the form in which the readers find them.

In a folder they go into `metadata.jsonl`: into the line that names the picture, where there is one. Beside the tar
`s.tar` captions of the captioner `name` go into `s_name.json` as {key: {name: text}}, and their scores into
`s_name_clip_score.json` as {key: {name: score}}, as the original code has them. Files appear by one rename.
"""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sana.checkpoints.storage import publish
from sana.data.folder import RECORDS, FolderSource
from sana.data.open import open_source
from sana.data.samples import BadSample, Caption, Dataset, Finding
from sana.data.texts import MAIN, MAX_JSON, captions_of, json_lines, parse_json
from sana.data.webdataset import ShardSource
from sana.errors import BadData, InvalidInput

NONE = "[no caption yet]"
"""Stands for the caption of pictures that have none, which the readers refuse otherwise."""
SCORES = "_clip_score"
"""What the names of files of scores end in."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}")
_OF_CAPTIONS = (*MAIN, "captions", "score", "scores", "weight", "weights")


class Labels(Protocol):
    """The captions of a data set, which can be added to."""

    source: Dataset

    def put(self, index: int, captions: Sequence[Caption]) -> None:
        """Add captions to a sample, or put them in the place of those of the same name. Raises BadSample."""
        ...

    def save(self) -> list[Path]:
        """Write what was put since the last time, and return the files."""
        ...


def open_labels(path: str | Path) -> Labels:
    """Open a folder of pictures, a tar, or a folder of tars; pictures without captions belong to it.

    Raises:
        ModelNotFound, InvalidInput, BadData: see `open_source`; or a file of captions there cannot be added to.
    """
    source = open_source(path, prompt=NONE)
    if isinstance(source, FolderSource):
        return FolderLabels(source)
    assert isinstance(source, ShardSource)
    return ShardLabels(source)


def captions_in(labels: Labels, index: int) -> tuple[Caption, ...]:
    """Return the captions of a sample, which may have none. Raises BadSample."""
    return tuple(caption for caption in labels.source.sample(index).captions if caption.text != NONE)


def checked_name(name: str) -> str:
    """Return the name of a captioner, which becomes a part of names of files.

    Raises:
        InvalidInput: it cannot be one.
    """
    if not _NAME.fullmatch(name) or name == "prompt" or name.endswith(SCORES):
        told = f"has letters, digits, dots and hyphens, is not prompt and does not end in {SCORES}"
        raise InvalidInput(f"A captioner cannot be called {name[:60]!r}. Give a name that {told}.")
    return name


class FolderLabels:
    """Labels of a folder of pictures."""

    def __init__(self, source: FolderSource) -> None:
        """Read every `metadata.jsonl`.

        Raises:
            BadData: one names a picture twice, or two of them name one: it would not be clear where to write.
        """
        self.source: Dataset = source
        self._folder = source.folder
        self._lines: dict[Path, list[bytes]] = {}
        self._places: dict[Path, tuple[Path, int]] = {}
        for file in sorted(_record_files(self._folder)):
            self._read(file)
        self._touched: set[Path] = set()

    def _read(self, file: Path) -> None:
        self._lines[file] = io.BytesIO(file.read_bytes()).readlines()
        name = file.relative_to(self._folder).as_posix()
        for line, record in json_lines(file, name):
            told = None if isinstance(record, Finding) else record.get("file_name")
            if not isinstance(told, str) or not told:
                continue
            picture = file.parent / os.path.normpath(told)
            if picture in self._places:
                raise BadData(f"{name}:{line}: {told[:80]} is named twice in the metadata. Join its lines into one.")
            self._places[picture] = (file, line - 1)

    def put(self, index: int, captions: Sequence[Caption]) -> None:
        """See `Labels`."""
        sample = self.source.sample(index)
        picture = self._folder / sample.place
        if picture not in self._places:
            file = self._folder / RECORDS
            lines = self._lines.setdefault(file, [])
            if lines and not lines[-1].endswith(b"\n"):
                lines[-1] += b"\n"
            lines.append(b"{}\n")
            self._places[picture] = (file, len(lines) - 1)
        file, line = self._places[picture]
        text = self._lines[file][line].decode("utf-8-sig")
        record: dict[str, Any] = json.loads(text)
        held = [caption for caption in captions_of(record, sample.place) if caption.text]
        named = {"file_name": PurePosixPath(os.path.relpath(picture, file.parent)).as_posix(), **record}
        written = json.dumps({**_without_captions(named), **_told(record, _with(held, captions))}, ensure_ascii=False)
        self._lines[file][line] = written.encode() + b"\n"
        self._touched.add(file)

    def save(self) -> list[Path]:
        """See `Labels`. Errors: OSError naming the file."""
        files = sorted(self._touched)
        for file in files:
            _publish(file, b"".join(self._lines[file]))
        self._touched.clear()
        return files


class ShardLabels:
    """Labels of tars."""

    def __init__(self, source: ShardSource) -> None:
        """Nothing is read before something is put."""
        self.source: Dataset = source
        self._shards = source
        self._files: dict[Path, dict[str, Any]] = {}
        self._touched: set[Path] = set()

    def put(self, index: int, captions: Sequence[Caption]) -> None:
        """See `Labels`; of captions that are there already the scores are written. Raises BadSample."""
        sample = self.source.sample(index)
        tar, key = self._shards.shard(index)
        names = Counter(caption.name for caption in sample.captions)
        for caption in captions:
            if names[caption.name] > 1:
                text = f"Several of its captions are named {caption.name}, and scores beside a tar go by name."
                raise BadSample(Finding(kind="bad-text", place=sample.place, text=f"{text} Name them apart."))
            if (caption.name, caption.text) not in [(one.name, one.text) for one in sample.captions]:
                self._set(
                    tar.with_name(f"{tar.stem}_{checked_name(caption.name)}.json"), key, caption.name, caption.text
                )
            if caption.score is not None:
                name = caption.name if _NAME.fullmatch(caption.name) else "other"
                self._set(tar.with_name(f"{tar.stem}_{name}_clip_score.json"), key, caption.name, caption.score)

    def _set(self, file: Path, key: str, name: str, value: str | float) -> None:
        if file not in self._files:
            self._files[file] = _samples(file)
        own = self._files[file].setdefault(key, {})
        own[name] = value
        self._touched.add(file)

    def save(self) -> list[Path]:
        """See `Labels`. Errors: OSError naming the file."""
        files = sorted(self._touched)
        for file in files:
            content = json.dumps(dict(sorted(self._files[file].items())), ensure_ascii=False, indent=1)
            _publish(file, content.encode() + b"\n")
        self._touched.clear()
        return files


def _record_files(folder: Path) -> Iterable[Path]:
    """Yield the files that the reader of folders takes for records."""
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if RECORDS in files:
            yield Path(here) / RECORDS


def _samples(file: Path) -> dict[str, Any]:
    """Return what a file beside a tar holds. Errors: BadData, since writing it anew would lose what is in it."""
    try:
        content = parse_json(file.read_bytes()[:MAX_JSON], file.name) if file.is_file() else {}
    except BadSample as error:
        raise BadData(f"{error} Nothing can be added to it; mend or remove it.") from None
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise BadData(f"{file} is no object of objects, so nothing can be added to it. Mend or remove it.")
    return content


def _with(held: Sequence[Caption], new: Sequence[Caption]) -> list[Caption]:
    """Return the captions of a record after others were put."""
    found = list(held)
    for caption in new:
        same = [i for i, one in enumerate(found) if (one.name, one.text) == (caption.name, caption.text)]
        named = [i for i, one in enumerate(found) if one.name == caption.name != "prompt"]
        place = (same or named or [len(found)])[0]
        found[place : place + 1] = [caption]
    return found


def _without_captions(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _OF_CAPTIONS}


def _told(record: Mapping[str, Any], captions: Sequence[Caption]) -> dict[str, Any]:
    """Return captions as a record says them; the main one stays under the key that it had."""
    main = next((key for key in MAIN if record.get(key) is not None), None)
    is_main = bool(captions) and main is not None and captions[0].text == " ".join(str(record[main]).split())
    told: dict[str, Any] = {}
    if is_main and main is not None:
        told = {main: record[main], **_numbers(captions[0])}
    rest = captions[1:] if is_main else captions
    if rest:
        told["captions"] = [{"text": one.text, "name": one.name, **_numbers(one)} for one in rest]
    return told


def _numbers(caption: Caption) -> dict[str, float]:
    weight = {} if caption.weight == 1 else {"weight": caption.weight}
    return weight if caption.score is None else {**weight, "score": caption.score}


def _publish(file: Path, content: bytes) -> None:
    publish(file, lambda beside: beside.write_bytes(content))
