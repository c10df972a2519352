"""The few EXIF tags that hold prompts, read from a TIFF block that may be cut or lie about its lengths.

Source: Exif 2.32, 4.6.2 (directory) and 4.6.5 (UserComment and its character codes).
"""

import struct
from collections.abc import Iterator

TAGS = {
    0x010E: "ImageDescription",
    0x010F: "Make",
    0x0110: "Model",
    0x0131: "Software",
    0x9286: "UserComment",
    0x927C: "MakerNote",
}
_SUBDIRECTORY = 0x8769
_MAX_ENTRIES = 1000


def read_exif(data: bytes) -> dict[str, str]:
    """Return tag name -> text of an EXIF block, with or without the `Exif` head; of a damaged one what can be read."""
    data = data.removeprefix(b"Exif\x00\x00")
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        return {}
    found: dict[str, str] = {}
    directory = struct.unpack_from(order + "I", data, 4)[0]
    for tag, value in _entries(data, directory, order):
        if tag == _SUBDIRECTORY:
            pointer = struct.unpack(order + "I", value[:4].ljust(4, b"\x00"))[0]
            inner = _entries(data, pointer, order)
            found |= {TAGS[inner_tag]: _text(inner_tag, text) for inner_tag, text in inner if inner_tag in TAGS}
        elif tag in TAGS:
            found.setdefault(TAGS[tag], _text(tag, value))
    return found


def _entries(data: bytes, offset: int, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield tag and bytes of each entry that lies inside the block."""
    if offset + 2 > len(data):
        return
    count = min(struct.unpack_from(order + "H", data, offset)[0], _MAX_ENTRIES)
    for start in range(offset + 2, offset + 2 + 12 * count, 12):
        if start + 12 > len(data):
            return
        tag, kind, length, place = struct.unpack_from(order + "HHII", data, start)
        size = length * _SIZES.get(kind, 1)
        yield tag, data[start + 8 : start + 8 + size] if size <= 4 else data[place : place + size]


def _text(tag: int, value: bytes) -> str:
    if tag == 0x9286:
        return decode_comment(value)
    return value.rstrip(b"\x00").decode("utf-8", "replace")


def decode_comment(value: bytes) -> str:
    """Return the text of a user comment: UTF-16 of either byte order, or else UTF-8, behind its code of eight bytes."""
    code, rest = value[:8], value[8:]
    if code.rstrip(b"\x00") == b"UNICODE":
        if rest[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = rest.decode("utf-16", "replace")
        else:  # the order of the block does not tell: a common writer is big-endian always. Zeros tell.
            big = rest[0::2].count(0) >= rest[1::2].count(0)
            text = rest.decode("utf-16-be" if big else "utf-16-le", "replace")
    else:
        known = code.rstrip(b"\x00") in (b"ASCII", b"JIS", b"") and len(value) >= 8
        text = (rest if known else value).decode("utf-8", "replace")
    return text.rstrip("\x00")


_SIZES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
