"""The models on this computer: what lies in the hub library's cache, whether it is whole, and how it goes away.

The cache is the hub library's own, so other programs share what lies there. Nothing here is imported with torch until
files are compared with their digests, and nothing but `remote` asks the network.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sana.cards import CARDS, Card
from sana.checkpoints.built_in import shared_folders
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, did_you_mean

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository of the hub, as far as it is in the cache."""

    repo: str
    """Its name on the hub, `organisation/model`."""
    folder: Path
    """Its folder in the cache, which other revisions of it share."""

    @property
    def size(self) -> int:
        """Bytes on the disk, unfinished downloads included."""
        blobs = self.folder / "blobs"
        return sum(_bytes(file) for file in blobs.rglob("*")) if blobs.is_dir() else 0

    @property
    def commits(self) -> dict[str, list[str]]:
        """Commit -> the branches and tags that point to it, of the revisions that are here."""
        snapshots, refs = self.folder / "snapshots", self.folder / "refs"
        found: dict[str, list[str]] = {path.name: [] for path in _entries(snapshots) if path.is_dir()}
        for ref in sorted(refs.rglob("*")) if refs.is_dir() else ():
            if ref.is_file():
                found.setdefault(ref.read_text("utf-8").strip(), []).append(ref.relative_to(refs).as_posix())
        return {commit: names for commit, names in found.items() if (snapshots / commit).is_dir()}


@dataclass(frozen=True, kw_only=True)
class Remote:
    """What the hub says of a repository before anything of it is downloaded."""

    commit: str
    size: int | None
    """Bytes of the files that are needed, or None where the hub does not say."""
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A file of a model that was looked at."""

    name: str
    """Relative to the model's folder."""
    size: int
    state: str
    """`whole`, `damaged`, or `unknown` where nothing says what it should be."""
    why: str = ""


def card_of(name: str) -> Card | None:
    """Return the card of a model's short name or hub id."""
    return CARDS.get(name) or next((card for card in CARDS.values() if card.hub_id == name), None)


def hub_id(name: str) -> str:
    """Return the repository that a short name or a hub id means.

    Raises:
        InvalidInput: it is built in, a folder, or one file of a repository.
        ModelNotFound: it means nothing.
    """
    card = card_of(name)
    if card is not None and card.folder is not None:
        raise InvalidInput(f"{name} is built in: it is part of this package, and always here.")
    if card is not None and card.hub_id:
        return card.hub_id
    if name.startswith("hf://"):
        repo = "/".join(name.removeprefix("hf://").split("/")[:2])
        raise InvalidInput(f"'{name[:80]}' is one file of a repository. Name that: {repo[:80]}")
    if name.count("/") != 1 or any(part in ("", ".", "..") or "--" in part for part in name.split("/")):
        raise ModelNotFound(f"There is no model '{name[:80]}'.{did_you_mean(name, CARDS)} All of them: sana models")
    return name


def find(repo: str, cache: Path) -> Repository | None:
    """Return the part of a repository that is in the cache, or None."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    return Repository(repo=repo, folder=folder) if folder.is_dir() else None


def remote(repo: str, revision: str | None, variant: str | None) -> Remote | None:
    """Ask the hub what a download would bring; None where it does not answer, which the download itself will tell."""
    from huggingface_hub import HfApi

    from sana.checkpoints.hub import REQUEST_TIMEOUT
    from sana.checkpoints.layout import wanted_files

    try:
        info = HfApi(library_name="sanakit").model_info(
            repo, revision=revision, timeout=REQUEST_TIMEOUT, files_metadata=True
        )
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        known = [sizes[name] for name in wanted_files(sizes, None, variant)]
    except Exception as error:  # the client's transport library, and with it its errors, depends on its version
        _log.info("the hub did not say how large %s is: %s", repo, error)
        return None
    licence = getattr(info.card_data, "license", None) if info.card_data is not None else None
    total = None if None in known or not known else sum(size for size in known if size is not None)
    return Remote(commit=str(info.sha), size=total, licence=str(licence) if licence else None)


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a model's folder, links that lead nowhere among them; hidden ones are left out."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and (path.is_symlink() or path.is_file()):
            yield path


def model_files(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the files of a model, those of shared parts last, each with the folder that its name is told from."""
    yield from ((path, folder) for path in sorted(files_of(folder)))
    for place in shared_folders(folder):
        yield from ((path, place.parents[1]) for path in sorted(files_of(place)))


def part_sizes(folder: Path) -> dict[str, int]:
    """Return part -> bytes of its files, shared or not; what lies in the folder itself is of the part ""."""
    sizes = {place.name: sum(part_sizes(place).values()) for place in shared_folders(folder)}
    for path in files_of(folder):
        parent = path.relative_to(folder).parent.as_posix()
        part = "" if parent == "." else parent.split("/")[0]
        sizes[part] = sizes.get(part, 0) + _bytes(path.resolve())
    return sizes


def check_file(path: Path, folder: Path) -> Checked:
    """Compare a file of a model with what it should be, as far as anything says so.

    Large files of the cache are named by their SHA-256, files that this package wrote hold it in their header; small
    ones must be readable JSON.
    """
    name, why = path.relative_to(folder).as_posix(), ""
    try:
        state = _state(path)
    except (CheckpointError, ModelNotFound) as error:
        state, why = "damaged", str(error)
    return Checked(name=name, size=_bytes(path.resolve()), state=state, why=why)


def remove(held: Repository, cache: Path) -> int:
    """Delete a repository from the cache and return how many bytes that freed; links are cut, never followed.

    Raises:
        InvalidInput: its folder is no ordinary folder right inside the cache.
        OSError: a file could not be deleted.
    """
    if held.folder.is_symlink() or held.folder.parent.resolve() != cache.resolve():
        raise InvalidInput(f"{held.folder} is a link to another place. Remove it by hand.")
    if held.folder.resolve().parent != cache.resolve():
        raise InvalidInput(f"{held.folder} lies outside of the cache. Remove it by hand.")
    size = held.size
    shutil.rmtree(held.folder)
    locks = cache / ".locks" / held.folder.name
    if locks.is_dir() and not locks.is_symlink():
        shutil.rmtree(locks, ignore_errors=True)
    return size - (dataclasses.replace(held).size if held.folder.exists() else 0)


def _state(path: Path) -> str:
    from sana.checkpoints.digests import hub_digest, verify
    from sana.checkpoints.layout import read_json

    if not path.exists():
        raise ModelNotFound(f"{path.name} is a link to a file that is gone.")
    if hub_digest(path) or path.suffix == ".safetensors":
        return "whole" if verify(path) else "unknown"
    if path.suffix == ".json":
        read_json(path)
        return "whole"
    return "unknown"


def _entries(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.iterdir())) if folder.is_dir() else iter(())


def _bytes(file: Path) -> int:
    """Return the bytes that a file takes here; a link takes none."""
    try:
        return 0 if file.is_symlink() or not file.is_file() else file.stat().st_size
    except OSError:
        return 0
