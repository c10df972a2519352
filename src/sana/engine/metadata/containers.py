"""The texts in a PNG, JPEG or WebP file, found without decoding a pixel and within fixed limits of memory and time.

Formats: PNG specification (tEXt, zTXt, iTXt, eXIf), JPEG segments APP1 and COM, RIFF chunks EXIF and XMP of WebP.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sana.engine.metadata.exif import read_exif
from sana.errors import InvalidInput

MAX_TEXT = 4 * 2**20
"""Longest text that is read, in bytes; graphs of nodes reach a megabyte."""
MAX_TEXTS = 100
"""Texts that are looked at in one file; real ones have a handful."""
MAX_TOTAL = 16 * 2**20
"""Characters that are kept of one file."""
MAX_PIECES = 200_000
"""Pieces of a file that are looked at: a PNG of a gigabyte has fewer."""

XMP_KEY = "XML:com.adobe.xmp"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\x00"


@dataclass(kw_only=True)
class Carried:
    """What a file carries besides its pixels."""

    texts: dict[str, str] = field(default_factory=dict)
    """Texts by key, the first of each key."""
    exif: dict[str, str] = field(default_factory=dict)
    """The texts of the EXIF tags that programs use: see `exif.TAGS`."""
    remarks: list[str] = field(default_factory=list)
    """What was left unread, and why."""
    seen: int = 0
    """Texts that were met."""
    room: int = MAX_TOTAL
    """Characters that may still be kept."""

    def is_full(self) -> bool:
        """Count one more text, and tell whether it is one too many."""
        self.seen += 1
        return self.seen > MAX_TEXTS or self.room <= 0

    @property
    def comment(self) -> str:
        """The text that formats without keys have: the EXIF user comment, or else the comment of a JPEG."""
        return self.exif.get("UserComment") or self.texts.get("Comment", "")

    def add(self, key: str, text: str) -> None:
        """Keep a text, unless the key is known already."""
        self.room -= len(text)
        self.texts.setdefault(key, clean(text))

    def add_exif(self, data: bytes) -> None:
        """Keep the texts of an EXIF block."""
        found = read_exif(data)
        self.room -= sum(map(len, found.values()))
        self.exif |= {tag: clean(text) for tag, text in found.items() if tag not in self.exif}

    def leave(self, what: str) -> None:
        """Note that a text was not read."""
        self.remarks.append(f"{what} is longer than {MAX_TEXT >> 20} MB and was not read.")


def read_container(path: Path) -> Carried:
    """Read the texts of a picture file; damage ends the reading, and what was found before it stays.

    Raises:
        InvalidInput: there is no such file, or it is no PNG, JPEG or WebP.
    """
    if not os.path.exists(path):  # says so of impossible names too
        raise InvalidInput(f"There is no file {path}. Check the name.")
    if not path.is_file():  # a pipe would be waited for without end
        raise InvalidInput(f"{path} is no file. Give a picture.")
    carried = Carried()
    try:
        with path.open("rb") as file:
            head = file.read(12)
            for is_format, read in _FORMATS:
                if is_format(head):
                    read(file, carried)
                    return carried
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    raise InvalidInput(f"{path} cannot be read as a picture. Give a PNG, JPEG or WebP file.")


def clean(text: str) -> str:
    """Return the text without what no encoder takes: lone surrogates and NUL become the replacement character."""
    return _UNENCODABLE.sub("\ufffd", text)


def _read_png(file: BinaryIO, carried: Carried) -> None:
    file.seek(len(PNG_SIGNATURE))
    for kind, length in _pieces(file, ">I4s"):
        if kind == b"IEND":
            return
        if kind not in _PNG_TEXTS:
            continue
        if length > MAX_TEXT:
            carried.leave(f"A text ({kind.decode()})")
            continue
        data = file.read(length)
        if len(data) < length or carried.is_full():
            return
        _PNG_TEXTS[kind](data, carried)


def _plain_text(data: bytes, carried: Carried) -> None:
    key, _, text = data.partition(b"\x00")
    carried.add(key.decode("latin-1"), _from_latin_or_utf8(text))


def _packed_text(data: bytes, carried: Carried) -> None:
    key, _, rest = data.partition(b"\x00")
    name = key.decode("latin-1")
    text = _unpacked(rest[1:], name, carried)
    if text is not None:
        carried.add(name, _from_latin_or_utf8(text))


def _international_text(data: bytes, carried: Carried) -> None:
    key, _, rest = data.partition(b"\x00")
    name, packed = key.decode("latin-1"), rest[:1] == b"\x01"
    text: bytes | None = rest[2:].partition(b"\x00")[2].partition(b"\x00")[2]  # behind language and translated key
    if packed and text is not None:
        text = _unpacked(text, name, carried)
    if text is not None:
        carried.add(name, text.decode("utf-8", "replace"))


def _unpacked(data: bytes, name: str, carried: Carried) -> bytes | None:
    """Return the decompressed text, or None if it is damaged or a bomb."""
    machine = zlib.decompressobj()
    try:
        text = machine.decompress(data, MAX_TEXT)
    except zlib.error:
        return None
    if machine.unconsumed_tail:
        carried.leave(f"The text '{name}'")
        return None
    return text


def _from_latin_or_utf8(text: bytes) -> str:
    """Decode a text that should be Latin-1 and that some programs write as UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _read_jpeg(file: BinaryIO, carried: Carried) -> None:
    file.seek(2)
    for _ in range(MAX_PIECES):
        head = file.read(2)
        while head == b"\xff\xff":  # fill bytes
            head = head[1:] + file.read(1)
        length = int.from_bytes(file.read(2), "big")
        if head[:1] != b"\xff" or head[1:] in (b"\xda", b"\xd9") or length < 2:
            return
        if head[1] not in (0xE1, 0xFE):
            file.seek(length - 2, os.SEEK_CUR)
            continue
        data = file.read(length - 2)
        if carried.is_full():
            return
        if head[1] == 0xFE:
            carried.add("Comment", _from_latin_or_utf8(data))
        elif data.startswith(_XMP_HEAD):
            carried.add(XMP_KEY, data.removeprefix(_XMP_HEAD).decode("utf-8", "replace"))
        else:
            carried.add_exif(data)


def _read_webp(file: BinaryIO, carried: Carried) -> None:
    file.seek(12)
    for kind, length in _pieces(file, "<4sI"):
        if kind not in (b"EXIF", b"XMP "):
            continue
        if length > MAX_TEXT:
            carried.leave(f"The chunk {kind.decode().strip()}")
            continue
        data = file.read(length)
        if carried.is_full():
            return
        if kind == b"EXIF":
            carried.add_exif(data)
        else:
            carried.add(XMP_KEY, data.decode("utf-8", "replace"))


def _pieces(file: BinaryIO, form: str) -> Iterator[tuple[bytes, int]]:
    """Yield kind and length of each chunk; the consumer may read its data. PNG adds a checksum, RIFF pads to even."""
    for _ in range(MAX_PIECES):
        head = file.read(8)
        if len(head) < 8:
            return
        first, second = struct.unpack(form, head)
        kind, length = (second, first) if form[0] == ">" else (first, second)
        behind = file.tell() + length + (4 if form[0] == ">" else length % 2)
        yield kind, length
        file.seek(behind)


_UNENCODABLE = re.compile("[\x00\ud800-\udfff]")
_PNG_TEXTS: dict[bytes, Callable[[bytes, Carried], None]] = {
    b"tEXt": _plain_text,
    b"zTXt": _packed_text,
    b"iTXt": _international_text,
    b"eXIf": lambda data, carried: carried.add_exif(data),
}
_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, Carried], None]], ...] = (
    (lambda head: head.startswith(PNG_SIGNATURE), _read_png),
    (lambda head: head.startswith(b"\xff\xd8\xff"), _read_jpeg),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", _read_webp),
)
