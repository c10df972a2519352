"""What a batch has done so far: one line of JSON for each picture, on the disk before the next one is told.

A line that was cut short, as by a loss of power, is passed over; the picture it was about is on the disk, or is drawn
again. Nothing in it names the user: files are relative to the folder of the manifest, prompts are not repeated.
"""

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana.apps.cli.notation import TEXTS
from sana.apps.cli.values import Shape

NAME = "manifest"
LONGEST_ERROR = 400


class Manifest:
    """The file that a run of `sana batch` writes into; it is made with the first line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures: list[dict[str, Any]] = []
        """What failed in this run."""

    def done(self, file: Path, seed: int, seconds: float, place: str, settings: str) -> None:
        """Note a picture that is on the disk.

        Raises:
            OSError: the line could not be written.
        """
        entry = {"state": "done", "file": file.name, "seed": seed, "line": place, "settings": settings}
        self._append({**entry, "seconds": round(seconds, 3)})

    def failed(self, files: Mapping[int, Path], error: str, place: str, settings: str) -> None:
        """Note pictures, by their seeds, that could not be drawn; a later run tries them again. Raises OSError."""
        for seed, file in files.items():
            entry = {"state": "failed", "file": file.name, "seed": seed, "line": place, "settings": settings}
            self.failures.append({"file": str(file), "seed": seed, "line": place, "error": error})
            self._append({**entry, "error": error[:LONGEST_ERROR]})

    def _append(self, entry: Mapping[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({**entry, "time": now}, ensure_ascii=True) + "\n"
        existed = self.path.exists()
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
                file.write(b"\n")  # the line before was cut short
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        if not existed:
            _sync_folder(self.path.parent)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a manifest; lines that are no entries are passed over, a file that is not there is empty."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("file"), str) and "state" in entry:
                    yield entry


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return file -> the last entry about it, of all the manifests of a folder: each shard has its own."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{NAME}*.jsonl")) if folder.is_dir() else ():
        found.update({entry["file"]: entry for entry in read(path)})
    return found


def digest(values: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Return 16 digits that differ wherever settings differ."""
    plain = {name: _plain(value) for name, value in values.items() if name not in without}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if type(value) in TEXTS:
        return TEXTS[type(value)](value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Shape | Path) else value


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return bytes(file.read(1))


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
