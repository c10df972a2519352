"""Pictures that are there already: whole or not, and drawn as it is asked for now or otherwise."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana.apps.cli.manifest import entries
from sana.engine.request import ResolvedRequest
from sana.errors import InvalidInput

NOT_COMPARED = frozenset({"seed", "count", "batch_size"})
"""Settings that pictures of one order differ in, or that change only the last bits."""
_SIGNATURE, _BLOCK = b"\x89PNG\r\n\x1a\n", 1 << 20
FILES = frozenset({"image", "mask", "controls", "loras"})
"""Settings that name files, which records name without their folders."""


def is_whole_png(file: Path) -> bool:
    """Tell whether a file is a PNG from its first to its last chunk, with all checksums right."""
    with file.open("rb") as data:
        if data.read(8) != _SIGNATURE:
            return False
        while len(head := data.read(8)) == 8:
            left, checksum = int.from_bytes(head[:4], "big"), zlib.crc32(head[4:])
            while left and (piece := data.read(min(left, _BLOCK))):
                left, checksum = left - len(piece), zlib.crc32(piece, checksum)
            if left or data.read(4) != checksum.to_bytes(4, "big"):
                return False
            if head[4:] == b"IEND":
                return not data.read(1)
    return False


def is_ruin(file: Path) -> bool:
    """Tell whether a file is what is left of a picture of ours: no whole PNG, and empty, or known by its record or by
    the manifest of its folder. Anything else may be somebody's.
    """
    from sana.engine.metadata import read_metadata

    if not file.is_file() or is_whole_png(file):
        return False
    with file.open("rb") as data:
        start = data.read(8)
    if not start or (start == _SIGNATURE and entries(file.parent).get(file.name, {}).get("state") == "done"):
        return True
    try:
        return start == _SIGNATURE and read_metadata(file).record is not None
    except InvalidInput:
        return False


def is_as_asked(file: Path, asked: ResolvedRequest) -> bool:
    """Tell whether a picture was drawn as it is asked for now, as far as it says.

    Raises:
        InvalidInput: it was cut short.
    """
    from sana.engine.metadata import read_metadata

    if not is_whole_png(file):
        raise InvalidInput(f"{file} is no whole picture. Delete it, or draw it again with --force.")
    record = read_metadata(file).record
    drawn = record.get("request") if record is not None else None
    if not isinstance(drawn, dict):
        return True
    wanted = asked.to_dict()
    names = (wanted.keys() & drawn.keys()) - NOT_COMPARED
    return all(_compared(name, drawn[name]) == _compared(name, wanted[name]) for name in names)


def _compared(name: str, value: Any) -> Any:
    return _without_folders(value) if name in FILES else value


def _without_folders(value: Any) -> Any:
    """Return a file's base name, also of files within lists and tables."""
    if isinstance(value, Mapping):
        return value.get("name") if "sha256" in value else {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) else value
