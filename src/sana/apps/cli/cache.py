"""What lies in the cache of downloaded models, and what a download would still fetch. Never asks the network."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sana.cards import Card
from sana.errors import CheckpointError, ModelNotFound

MARGIN = 500_000_000
"""Bytes of the disk that a download leaves free."""


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A model's files on this computer."""

    complete: bool
    """Whether it can be loaded without a network."""
    size: int
    """Bytes of it that are here, unfinished files included."""


def cached(card: Card, parts: Collection[str] | None = None) -> Cached:
    """Return how much of a model, or of some of its parts, is here."""
    if card.hub_id is None:
        return Cached(complete=True, size=0)
    repository = folder() / f"models--{card.hub_id.replace('/', '--')}"
    if not repository.is_dir():
        return Cached(complete=False, size=0)
    from sana.checkpoints.hub import locate

    try:
        locate(
            card.hub_id,
            parts=None if parts is None else tuple(parts),
            variant=card.variant,
            cache_dir=folder(),
            local_files_only=True,
        )
        complete = True
    except (ModelNotFound, CheckpointError):
        complete = False
    blobs = repository / "blobs"
    size = sum(file.stat().st_size for file in blobs.iterdir() if file.is_file()) if blobs.is_dir() else 0
    return Cached(complete=complete, size=size)


def download_size(card: Card, parts: Collection[str] | None = None) -> int:
    """Return about how many bytes a model, or some of its parts, has."""
    return sum(size for part, size in card.download_bytes.items() if parts is None or part in parts)


def check_space(card: Card, parts: Collection[str] | None = None) -> None:
    """Refuse a download that would fill the disk.

    Raises:
        ModelNotFound: saying how much is missing, and how to put the files elsewhere.
    """
    to_come = download_size(card, parts) - cached(card, parts).size
    free = free_bytes(folder())
    if to_come > 0 and to_come + MARGIN > free:
        raise ModelNotFound(
            f"{card.name} is about {said(to_come)} to download, but only {said(free)} are free in {tilde(folder())}."
            " Make room, or set HF_HOME to a folder on a larger disk."
        )


def folder() -> Path:
    """Return where the hub library keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Tell whether the hub library was told not to use the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def host() -> str:
    """Return the name of the hub's computer, without what its address may hold besides."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "huggingface.co"


def free_bytes(path: Path) -> int:
    """Return how much room there is where a path lies, or will lie."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def tilde(path: Path | str) -> str:
    """Return a path without the name of its user."""
    home = os.path.expanduser("~")
    text = str(path)
    return "~" + text[len(home) :] if home != "~" and (text == home or text.startswith(home + os.sep)) else text


def said(size: float) -> str:
    """Return a number of bytes as one says it: 9.1 GB, 130 GB, 25 MB."""
    if size < 0.95e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB" if size < 99.5e9 else f"{size / 1e9:.0f} GB"
