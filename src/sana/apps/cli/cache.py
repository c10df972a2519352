"""What lies in the cache of downloaded models, and what a download would still fetch. Never asks the network."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sana.cards import CARDS, Card
from sana.checkpoints import library
from sana.errors import CheckpointError, ModelNotFound

if TYPE_CHECKING:
    from sana.checkpoints.hub import Located

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
    size = repository_size(card.hub_id)
    if not size and library.find(card.hub_id, folder()) is None:
        return Cached(complete=False, size=0)
    if card.is_single_file:  # what else it needs comes from another model's folder
        base = cached(CARDS[card.home], base_parts(card))
        rest = download_size(card, base_parts(card)) if base.complete else 0
        return Cached(complete=base.complete and is_here(card.name, None, None), size=size + rest)
    return Cached(complete=_is_loadable(card.hub_id, card.variant, parts), size=size)


def is_here(name: str, revision: str | None, variant: str | None) -> bool:
    """Tell whether all of a model is on this computer."""
    try:
        fetch(name, revision, variant, offline=True)
    except (ModelNotFound, CheckpointError):
        return False
    return True


def fetch(name: str, revision: str | None, variant: str | None, *, offline: bool = False) -> "Located":
    """Return where a model lies, after downloading what is missing unless that is ruled out.

    Raises:
        ModelNotFound: it is not to be had, or not here.
        CheckpointError: it has no such variant, or came damaged.
    """
    from sana.checkpoints.hub import locate

    here = folder()
    located = locate(name, revision=revision, variant=variant, cache_dir=here, local_files_only=offline, single=True)
    if located.file is not None and located.card is not None and located.card.is_single_file:
        base, parts = CARDS[located.card.home], tuple(base_parts(located.card))
        locate(base.name, parts=parts, cache_dir=here, local_files_only=offline)
    return located


def base_parts(card: Card) -> list[str]:
    """Return the parts that a model which is published as one file takes from the folder of another."""
    own = ("transformer", "controlnet")
    return [*(part for part in card.download_bytes if part not in own), "scheduler"]


def repository_size(repo: str) -> int:
    """Return how many bytes of a repository are here, unfinished files included."""
    held = library.find(repo, folder())
    return held.size if held is not None else 0


def _is_loadable(repo: str, variant: str | None, parts: Collection[str] | None) -> bool:
    from sana.checkpoints.hub import locate

    wanted = None if parts is None else tuple(parts)
    try:
        locate(repo, parts=wanted, variant=variant, cache_dir=folder(), local_files_only=True)
    except (ModelNotFound, CheckpointError):
        return False
    return True


def download_size(card: Card, parts: Collection[str] | None = None) -> int:
    """Return about how many bytes a model, or some of its parts, has."""
    return sum(size for part, size in card.download_bytes.items() if parts is None or part in parts)


def check_space(card: Card, parts: Collection[str] | None = None) -> None:
    """Refuse a download that would fill the disk.

    Raises:
        ModelNotFound: saying how much is missing, and how to put the files elsewhere.
    """
    check_room(card.name, download_size(card, parts) - cached(card, parts).size)


def check_room(name: str, to_come: int) -> None:
    """Refuse a download of so many bytes where they would fill the disk; errors as `check_space`."""
    free = free_bytes(folder())
    if to_come > 0 and to_come + MARGIN > free:
        raise ModelNotFound(
            f"{name} is about {said(to_come)} to download, but only {said(free)} are free in {tilde(folder())}."
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
    if 0 < size < 0.95e6:
        return f"{max(size, 500) / 1e3:.0f} kB"
    if size < 0.95e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB" if size < 99.5e9 else f"{size / 1e9:.0f} GB"
