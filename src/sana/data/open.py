"""The one door to data sets on the disk: a folder of pictures, a tar of samples, or a folder of such tars."""

import os
from pathlib import Path

from sana.data.folder import FolderSource
from sana.data.samples import Dataset
from sana.errors import BadData, InvalidInput, ModelNotFound


def open_source(path: str | Path, *, prompt: str = "") -> Dataset:
    """Open a data set; pictures are read later, one by one.

    Args:
        path: a folder.
        prompt: caption of pictures that have none.

    Raises:
        ModelNotFound: nothing is there.
        InvalidInput: it is an address or a command, or no data set.
        BadData: there is no usable picture in it.
    """
    told = os.fspath(path)
    if "://" in told or told.startswith("pipe:"):
        raise InvalidInput(f"'{told[:80]}' is no path. A data set is read from this disk only; download it first.")
    place = Path(told).expanduser()
    if not place.exists():
        raise ModelNotFound(f"There is no file or folder {told[:200]}. Check the name.")
    if not place.is_dir():
        raise InvalidInput(f"{place.name} is no data set: give a folder of pictures.")
    source = FolderSource(place, prompt=prompt)
    if not len(source):
        first = f" The first of {len(source.findings)} findings: {source.findings[0]}" if source.findings else ""
        raise BadData(f"There is no picture in PNG, JPEG or WebP below {told[:200]}.{first}")
    return source
