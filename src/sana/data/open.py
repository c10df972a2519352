"""The one door to data sets on the disk: a folder of pictures, a tar of samples, or a folder of such tars."""

import os
from pathlib import Path

from sana.data.folder import FolderSource
from sana.data.samples import Dataset, Finding
from sana.data.webdataset import META, ShardSource, listed
from sana.errors import BadData, InvalidInput, ModelNotFound


def open_source(path: str | Path, *, prompt: str = "") -> Dataset:
    """Open a data set; pictures are read later, one by one.

    Args:
        path: a folder of pictures, a tar, a folder of tars, or its `wids-meta.json`.
        prompt: caption of pictures that have none.

    Raises:
        ModelNotFound: nothing is there.
        InvalidInput: it is an address or a command, or no data set.
        BadData: there is no usable picture in it.
    """
    told = os.fspath(path)
    if "://" in told or told.startswith("pipe:"):
        raise InvalidInput(f"'{told[:80]}' is no path. A data set is read from this disk only; download it first.")
    place = Path(os.path.expanduser(told))  # leaves a user that is unknown as it is
    try:
        there = place.exists()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise ModelNotFound(f"There is no file or folder {told[:200]}. Check the name.")
    source = _opened(place.parent if place.name == META else place, prompt)
    if not len(source):
        first = f" The first of {len(source.findings)} findings: {source.findings[0]}" if source.findings else ""
        raise BadData(f"There is no picture in PNG, JPEG or WebP in {told[:200]}.{first}")
    return source


def has_shards(place: Path) -> bool:
    """Tell whether a data set lies in tars, or in a file anyway, beside which pictures in a folder do not count."""
    return place.is_file() or (place / META).is_file() or any(place.glob("*.tar"))


def _opened(place: Path, prompt: str) -> Dataset:
    if place.is_dir():
        if not has_shards(place):
            return FolderSource(place, prompt=prompt)
        findings: list[Finding] = []
        shards = ShardSource(listed(place, findings), prompt=prompt)
        shards.findings = (*findings, *shards.findings)
        return shards
    if place.suffix.lower() == ".tar":
        return ShardSource([(place, place.name, None)], prompt=prompt)
    if place.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise InvalidInput(
            f"{place.name} is compressed. Unpack it to a .tar, so that samples can be read in any order."
        )
    raise InvalidInput(f"{place.name[:80]} is no data set: give a folder of pictures, a .tar, or a folder of tars.")
