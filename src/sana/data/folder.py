"""A folder of pictures as a data set: captions in files beside them, in `metadata.jsonl`, or both.

Sub-folders belong to it; hidden files do not, and links to folders are not followed. The caption of `a.png` is the
whole text of `a.txt` or `a.caption`. `metadata.jsonl` names pictures under `file_name`, relative to itself, with their
captions as `texts` describes. A `meta_data.json` with `img_names` picks and orders the pictures of its folder, as the
original code wants it. The name of a folder such as `10_sks dog` tells how often its pictures are seen in an epoch,
and what they show where no caption does.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from sana.data.identity import identity_of
from sana.data.pictures import MAX_BYTES, picture_size, read_picture
from sana.data.samples import BadSample, Caption, Finding, Sample
from sana.data.texts import MAX_JSON, captions_of, json_lines, one_line, parse_json
from sana.errors import BadData, SanaError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TEXTS = (".txt", ".caption")
UNREAD = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jfif", ".jxl", ".psd", ".svg")
"""Suffixes of pictures that are not read, and told."""
RECORDS, NAMES = "metadata.jsonl", "meta_data.json"
_REPEATS = re.compile(r"(\d{1,3})_(.+)")


class _Entry(NamedTuple):
    """A picture of the folder, and where its captions are."""

    path: str
    texts: tuple[str, ...]
    captions: tuple[Caption, ...]
    repeats: int
    subject: str


@dataclass(kw_only=True)
class _Scan:
    """What lies in a folder."""

    pictures: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    records: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    captions: dict[str, tuple[Caption, ...]] = field(default_factory=dict)

    def tell(self, kind: str, place: str, text: str, line: int | None = None) -> None:
        """Note a finding."""
        self.findings.append(Finding(kind=kind, place=place, text=text, line=line))


class FolderSource:
    """The pictures below a folder, in the order of their names."""

    def __init__(self, folder: Path, *, prompt: str = "") -> None:
        """List the folder and read what names its pictures; no picture is opened.

        Args:
            prompt: caption of pictures that have none.

        Raises:
            BadData: a folder in it cannot be read.
        """
        self.folder, self.prompt, self._identities = folder, prompt, dict[bool, str]()
        scan = _scanned(folder)
        for name in scan.records:
            _read_records(folder, name, scan)
        for name in scan.names:
            _read_names(folder, name, scan)
        self._entries = list(_entries(scan))
        self.findings: tuple[Finding, ...] = tuple(scan.findings)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._entries)

    def sample(self, index: int) -> Sample:
        """Return a sample; the header of its picture and its text files are read. Raises BadSample."""
        entry = self._entries[index]
        captions = self._captions(entry)
        try:
            width, height = picture_size(self.folder / entry.path, "picture")
        except SanaError as error:
            raise BadSample(Finding(kind="unreadable", place=entry.path, text=str(error))) from None
        key = str(PurePosixPath(entry.path).with_suffix(""))
        return Sample(
            key=key, place=entry.path, width=width, height=height, captions=captions, repeats=entry.repeats
        )  # fmt: skip

    def picture(self, index: int) -> "Image":
        """Return a picture in RGB, upright. Raises BadSample."""
        path = self._entries[index].path
        try:
            return read_picture(self.folder / path, "picture")
        except SanaError as error:
            raise BadSample(Finding(kind="unreadable", place=path, text=str(error))) from None

    def encoded(self, index: int) -> tuple[bytes, str]:
        """Return a picture as it is stored, and the suffix of its format. Raises BadSample."""
        path = self._entries[index].path
        return _read(self.folder / path, path, MAX_BYTES), PurePosixPath(path).suffix.lower()

    def file(self, index: int) -> Path:
        """Return the path of a picture."""
        return self.folder / self._entries[index].path

    def identity(self, *, captions: bool = True) -> str:
        """Return the digest over names, captions, sizes and both ends of all files; see `Source`."""
        if captions not in self._identities:
            told = (lambda i: self._captions(self._entries[i])) if captions else None
            self._identities[captions] = identity_of(
                [entry.path for entry in self._entries], lambda i: self.file(i).open("rb"), told
            )
        return self._identities[captions]

    def _captions(self, entry: _Entry) -> tuple[Caption, ...]:
        captions = list(entry.captions)
        for name in entry.texts:
            text = one_line(_read(self.folder / name, name), name)
            if not text and not captions and not self.prompt:
                raise BadSample(
                    Finding(kind="empty-caption", place=name, text="The caption is empty. Write it.", line=1)
                )
            if text and text not in [caption.text for caption in captions]:
                captions.append(Caption(text=text))
        subject = self.prompt or entry.subject
        if not captions and subject:
            captions.append(Caption(text=subject))
        if not captions:
            stem = PurePosixPath(entry.path).with_suffix(".txt")
            text = f"The picture has no caption. Write it into {stem.name}, or name the picture in {RECORDS}."
            raise BadSample(Finding(kind="no-caption", place=entry.path, text=text))
        return tuple(captions)


def _scanned(folder: Path) -> _Scan:
    scan = _Scan()
    for here, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(here).relative_to(folder).as_posix()
        within = "" if base == "." else f"{base}/"
        for name in folders:
            if os.path.islink(os.path.join(here, name)):
                scan.tell("ignored", f"{within}{name}", "This link to a folder is not followed.")
        for name in sorted(files):
            if not name.startswith("."):
                _sort_in(scan, f"{within}{name}", os.path.join(here, name))
    return scan


def _refuse(error: OSError) -> None:
    raise BadData(f"The folder {error.filename} cannot be read ({error.strerror}).") from error


def _sort_in(scan: _Scan, name: str, path: str) -> None:
    """Note a file under what it is for."""
    suffix = PurePosixPath(name).suffix.lower()
    base = PurePosixPath(name).name
    is_wanted = suffix in PICTURES or suffix in TEXTS or base in (RECORDS, NAMES)
    if suffix in UNREAD:
        scan.tell("ignored", name, f"Pictures in {suffix[1:].upper()} are not read. Save it as PNG, JPEG or WebP.")
    if not is_wanted:
        return
    try:
        name.encode()
    except UnicodeEncodeError:
        scan.tell("bad-name", ascii(name)[1:-1], "The name of this file is not in UTF-8. Rename it.")
        return
    if not os.path.isfile(path):
        is_link = os.path.islink(path)
        text = "This is a link to nothing." if is_link else "This is no file but a device. Remove it."
        scan.tell("missing" if is_link else "bad-name", name, text)
    elif suffix in PICTURES:
        scan.pictures.append(name)
    elif suffix in TEXTS:
        scan.texts.add(name)
    else:
        (scan.records if base == RECORDS else scan.names).append(name)


def _read_records(folder: Path, name: str, scan: _Scan) -> None:
    """Add the captions of a `metadata.jsonl`."""
    known, base = set(scan.pictures), PurePosixPath(name).parent
    for line, record in json_lines(folder / name, name):
        if isinstance(record, Finding):
            scan.findings.append(record)
            continue
        told = record.get("file_name")
        picture = _inside(base, told)
        if picture is None:
            text = f"`file_name` must be a path below this folder but is {str(told)[:80]!r}."
            scan.tell("bad-name" if told else "bad-text", name, text, line)
        elif picture not in known:
            scan.tell("missing", name, f"There is no picture {str(told)[:80]}.", line)
        else:
            _add_captions(scan, picture, record, name, line)


def _add_captions(scan: _Scan, picture: str, record: Mapping[str, Any], name: str, line: int) -> None:
    try:
        captions = captions_of(record, name, line)
    except BadSample as error:
        scan.findings.append(error.finding)
        return
    if not captions and any(record.get(key) is not None for key in ("text", "caption", "prompt", "captions")):
        scan.tell("empty-caption", name, f"The caption of {picture} is empty. Write it.", line)
    scan.captions[picture] = scan.captions.get(picture, ()) + captions


def _read_names(folder: Path, name: str, scan: _Scan) -> None:
    """Keep of a folder the pictures that its `meta_data.json` names, in that order."""
    try:
        content = parse_json(_read(folder / name, name, MAX_JSON), name)
    except BadSample as error:
        scan.findings.append(error.finding)
        return
    names = content.get("img_names") if isinstance(content, dict) else None
    if not isinstance(names, list):
        scan.tell("bad-text", name, 'There is no list "img_names" in it. Add it, or remove the file.')
        return
    base = PurePosixPath(name).parent
    inside = [picture for picture in scan.pictures if PurePosixPath(picture).is_relative_to(base)]
    by_stem = {str(PurePosixPath(picture).with_suffix("")): picture for picture in reversed(inside)}
    known, kept = set(inside), dict[str, None]()
    for told in names:
        picture = _inside(base, told)
        found = picture if picture in known else by_stem.get(picture or "")
        if found is None:
            kind = "missing" if picture else "bad-name"
            scan.tell(kind, name, f"There is no picture {str(told)[:80]} below this folder.")
        else:
            kept[found] = None
    scan.pictures = [picture for picture in scan.pictures if picture not in known] + list(kept)


def _entries(scan: _Scan) -> Iterator[_Entry]:
    """Yield the pictures, of those with one name the first."""
    stems: dict[str, str] = {}
    for path in scan.pictures:
        pure = PurePosixPath(path)
        stem = str(pure.with_suffix(""))
        if stem in stems:
            scan.tell("bad-name", path, f"The name is that of {stems[stem]} but for the suffix. Rename one of them.")
            continue
        stems[stem] = path
        told = _REPEATS.fullmatch(pure.parts[0]) if len(pure.parts) > 1 else None
        yield _Entry(
            path=path,
            texts=tuple(stem + suffix for suffix in TEXTS if stem + suffix in scan.texts),
            captions=scan.captions.get(path, ()),
            repeats=max(1, int(told[1])) if told else 1,
            subject=told[2] if told else "",
        )
    for text in sorted(scan.texts):
        if str(PurePosixPath(text).with_suffix("")) not in stems:
            scan.tell("ignored", text, "There is no picture of this name beside the text.")


def _inside(base: PurePosixPath, told: object) -> str | None:
    """Return the path that a file tells of a picture, if it stays inside."""
    if not isinstance(told, str) or not told or "\\" in told or "\0" in told or told.startswith("/"):
        return None
    parts = [part for part in told.split("/") if part not in ("", ".")]
    return None if ".." in parts or not parts else str(base.joinpath(*parts))


def _read(path: Path, name: str, most: int = 2**20 + 1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        text = f"The file cannot be read ({error.strerror})."
        raise BadSample(Finding(kind="bad-text", place=name, text=text)) from None
