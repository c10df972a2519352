"""Pictures that are there already: whole or not, and drawn as it is asked for now or otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana.apps.cli.names import is_whole_png
from sana.engine.request import ResolvedRequest
from sana.errors import InvalidInput

NOT_COMPARED = frozenset({"seed", "count", "batch_size"})
"""Settings that pictures of one order differ in, or that change only the last bits."""
FILES = frozenset({"image", "mask", "controls", "loras"})
"""Settings that name files, which records name without their folders."""


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
