"""Tars as containers of samples: an index of their regular members, which are then read by offset. Nothing is unpacked.

Only the 512-byte headers are followed (ustar, with the long names of GNU and of pax). Every member that is not a plain
file with a harmless name and an allowed suffix, or that is too large, is refused and told; so are links, devices,
sparse files and compressed tars. What a member holds is bytes: no suffix makes anything run.
"""

import io
import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sana.data.samples import BadSample, Finding
from sana.errors import BadData

BLOCK = 512
SUFFIXES = ("png", "jpg", "jpeg", "webp", "json", "txt", "caption")
MAX_SIZES = {"json": 2**24, "txt": 2**20, "caption": 2**20}
MAX_PICTURE = 2**28
MAX_NAME = 2**16
"""Bytes of a long name, or of a header of pax."""
MAX_MEMBERS = 10**7
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a part of a file",
}
_COMPRESSED = (b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ", b"(\xb5/\xfd", b"PK\x03\x04")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
EXECUTED = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "bin", "ckpt", "py")
"""Suffixes whose members some readers run as a program, or may."""


class Member(NamedTuple):
    """Where the bytes of a file in a tar are."""

    name: str
    offset: int
    size: int


@dataclass(kw_only=True)
class Index:
    """The members of one tar, in their order."""

    path: Path
    place: str
    """What the tar is called in messages."""
    members: list[Member] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    stamp: tuple[int, int] = (0, 0)
    """Size and time of the file when it was read."""

    def tell(self, kind: str, text: str, name: str | None = None) -> None:
        """Note a finding about the tar, or about one of its members."""
        place = self.place if name is None else f"{self.place}:{shown(name)}"
        self.findings.append(Finding(kind=kind, place=place, text=text))


class Opened(io.RawIOBase):
    """A member as a file that can seek; of its bytes only those are read that are asked for."""

    def __init__(self, index: Index, member: Member) -> None:
        """Open the tar. Raises BadSample when it is no longer the file that was indexed."""
        super().__init__()
        self._member, self._place = member, 0
        where = f"{index.place}:{shown(member.name)}"
        try:
            self._handle = os.open(index.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise BadSample(
                Finding(kind="bad-shard", place=where, text=f"The tar cannot be read ({error.strerror}).")
            ) from None
        if _stamp(os.fstat(self._handle)) != index.stamp:
            self.close()
            raise BadSample(Finding(kind="bad-shard", place=where, text="The tar has changed since it was opened."))

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can seek."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes, never beyond the member."""
        wanted = min(len(buffer), max(0, self._member.size - self._place))
        os.lseek(self._handle, self._member.offset + self._place, os.SEEK_SET)
        data = os.read(self._handle, wanted)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; beyond the end nothing is read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._member.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def close(self) -> None:
        """Close the tar."""
        if not self.closed and hasattr(self, "_handle"):
            os.close(self._handle)
        super().close()


def read_index(path: Path, place: str) -> Index:
    """Return the members of a tar and what is wrong with it; of damaged ones what precedes the damage.

    Raises:
        BadData: it is no regular file, or cannot be opened.
    """
    index = Index(path=path, place=place)
    try:
        with path.open("rb", buffering=4 * BLOCK) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadData(f"{place} is no file but a device or a pipe. Give a tar.")
            index.stamp = _stamp(status)
            index.members.extend(_Walk(file, status.st_size, index).members())
    except OSError as error:
        if isinstance(error, BadData):
            raise
        raise BadData(f"{place} cannot be read ({error.strerror}).") from error
    return index


def read_member(index: Index, member: Member) -> bytes:
    """Return all bytes of a member. Raises BadSample when the tar has changed."""
    with Opened(index, member) as file:
        data = io.BufferedReader(file).read()
    if len(data) < member.size:
        where = f"{index.place}:{shown(member.name)}"
        raise BadSample(Finding(kind="bad-shard", place=where, text="The tar ends within this member."))
    return data


def split_name(name: str) -> tuple[str, str]:
    """Return the key of a member and its suffix: what precedes and follows the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def shown(name: str) -> str:
    """Return a name of a member as messages show it."""
    harmless = "".join(c if unicodedata.category(c)[0] != "C" else "?" for c in name)
    return harmless if len(harmless) <= 120 else f"{harmless[:60]}...{harmless[-50:]}"


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


class _Walk:
    """The way along the headers of one tar."""

    def __init__(self, file: BinaryIO, end: int, index: Index) -> None:
        self.file, self.end, self.index = file, end, index
        self.place = self.headers = 0
        self.is_cut = False
        """Whether that was told already."""
        self.told: dict[str, str] = {}
        """What long headers say of the member behind them."""
        self.names: set[str] = set()
        self.left_out: set[str] = set()

    def members(self) -> Iterator[Member]:
        """Yield the members that may be read."""
        if not self.end:
            self.index.tell("bad-shard", "The tar is empty: it has 0 bytes. Make it anew, or remove it.")
        while self.place < self.end:
            self.file.seek(self.place)
            block = self.file.read(BLOCK)
            if len(block) == BLOCK and not block.strip(b"\0"):
                return
            size, fault = _size(block), self._fault(block)
            if fault or size is None:
                text = f"{fault or 'The size of a member is damaged.'} What follows is not read."
                self.index.tell("bad-shard", text)
                return
            self.place, self.headers = self.place + BLOCK, self.headers + 1
            kind = block[156:157]
            if kind in (b"L", b"K", b"x", b"g"):
                if size > MAX_NAME:
                    self.index.tell("bad-shard", f"A header of {size} bytes is too long. What follows is not read.")
                    return
                data = self.file.read(size)
                self.told |= _long_name(data) if kind == b"L" else _pax(data) if kind == b"x" else {}
                self.place += _padded(size)
            elif (member := self._member(block, kind, size)) is not None:
                yield member
        if self.end and not self.is_cut:
            self.index.tell("bad-shard", "The tar has no end mark, so it may be cut off. Make it anew.")

    def _fault(self, block: bytes) -> str:
        """Return what is wrong with a header as such."""
        if not self.headers and block.startswith(_COMPRESSED):
            return "It is compressed; unpack it, so that samples can be read in any order."
        if len(block) < BLOCK:
            return "The tar is cut off within a header."
        if self.headers > MAX_MEMBERS:
            return f"It has more than {MAX_MEMBERS} members."
        told = _octal(block[148:156])
        plain = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
        signed = plain - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if told in (plain, signed):
            return ""
        return "The header of a member is damaged." if self.headers else "It is no tar."

    def _member(self, block: bytes, kind: bytes, size: int) -> Member | None:
        """Return a member if it may be read, and go behind it."""
        name, told, self.told = _name(block, self.told), self.told, {}
        size = 0 if kind in _WITHOUT_DATA else _told_size(told, size)
        member = Member(name, self.place, size)
        self.place += _padded(size)
        if member.offset + size > self.end or (kind == b"S" and block[482]):
            self.place, self.is_cut = self.end + 1, True
            self.index.tell("bad-shard", "The tar is cut off within this member, or it is in pieces.", name)
            return None
        refusal = self._refusal(member, b"S" if "GNU.sparse" in "".join(told) else kind)
        if refusal:
            self.index.tell("bad-member", refusal, name)
        suffix = split_name(name)[1]
        if refusal or kind == b"5" or suffix not in SUFFIXES:
            return None
        self.names.add(name)
        return member

    def _refusal(self, member: Member, kind: bytes) -> str:
        """Return why a member is not read; what is merely of no use is told once for each suffix."""
        fault = _unsafe(member.name)
        if fault:
            return f"The name {fault}, so the member is refused."
        if kind == b"5":
            return ""
        if kind not in _REGULAR:
            return f"The member is {_KINDS.get(kind, 'of an unknown kind')} and no plain file, so it is refused."
        suffix = split_name(member.name)[1]
        if suffix.rpartition(".")[2] in EXECUTED:
            return "Members of this kind can run programs when they are read. It is refused."
        if suffix not in SUFFIXES:
            if suffix not in self.left_out:
                text = f"Members of this kind are left out; only {', '.join(SUFFIXES)} are read."
                self.index.tell("ignored", text, member.name)
            self.left_out.add(suffix)
            return ""
        most = MAX_SIZES.get(suffix, MAX_PICTURE)
        if member.size > most:
            return f"The member has {member.size} bytes; at most {most} are read of this kind."
        return "There is a member of this name before it. It is refused." if member.name in self.names else ""


def _unsafe(name: str) -> str:
    """Return what makes a name one that is not used."""
    parts = name.split("/")
    if not name or len(name) > 1024:
        return "is empty or too long"
    if name.startswith("/") or name[1:2] == ":" or "\\" in name:
        return "is no relative path"
    if ".." in parts:
        return "leads out of the tar"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Co") for c in name):
        return "has characters that are no text"
    return ""


def _name(block: bytes, told: dict[str, str]) -> str:
    if "path" in told:
        return told["path"].removeprefix("./")
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return (f"{prefix}/{name}" if prefix else name).removeprefix("./")


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _long_name(data: bytes) -> dict[str, str]:
    return {"path": _text(data)}


def _pax(data: bytes) -> dict[str, str]:
    """Return the records `LENGTH KEY=VALUE` of a header of pax, as far as they make sense."""
    found: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not length.isdigit() or len(length) > 6 or not 0 < int(length) <= len(data):
            return found
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return found


def _told_size(told: dict[str, str], size: int) -> int:
    value = told.get("size", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else size


def _size(block: bytes) -> int | None:
    field_ = block[124:136] or b"0"  # of a header that is cut off, which is told as such
    if field_[0] & 0x80:  # in base 256, of GNU
        return None if field_[0] & 0x40 else int.from_bytes(field_[1:], "big")
    return _octal(field_)


def _octal(data: bytes) -> int | None:
    digits = data.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if all(digit in b"01234567" for digit in digits) else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
