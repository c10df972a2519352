"""From a name to a local folder or file: a path, a card's short name, the built-in model, or something on the hub.

Local first: when the cached snapshot of the wanted revision has all the files that are needed, no request is made.
Otherwise exactly the needed files are fetched with `huggingface_hub`, which resumes, locks and caches.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from sana.cards import CARDS, Card
from sana.checkpoints.built_in import installed
from sana.checkpoints.digests import hub_digest, verify
from sana.checkpoints.hub_errors import folder_hint, not_served
from sana.checkpoints.layout import MODEL_INDEX, missing_files, part_of, read_json, wanted_files
from sana.checkpoints.references import Reference, card_of_file, is_reference, parse_reference
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, did_you_mean

REQUEST_TIMEOUT = 10.0
"""Seconds the hub has for its first answer."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a model lies, and what its name already says about it."""

    folder: Path
    """Local folder in the published layout; `built_in.part_folder` tells where its parts are."""
    variant: str | None = None
    """Variant to load: the caller's, or the one the card of a short name recommends."""
    card: Card | None = None
    """The card whose short name or hub id was given."""
    commit: str | None = None
    """Commit of a folder or file that came from the hub."""
    file: Path | None = None
    """The one file that was named instead of a folder, an original checkpoint; `folder` is where it lies."""
    name: str | None = None
    """What the file is called at its source, which tells its card: `hf://organisation/repository/path`."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Which files of which repository are asked for, and how the hub may be asked."""

    repo: str
    parts: tuple[str, ...] | None
    optional: tuple[str, ...] = ()
    variant: str | None
    use_safetensors: bool | None
    revision: str | None
    cache_dir: Path | None
    token: str | bool | None
    endpoint: str | None

    @property
    def title(self) -> str:
        return f"'{self.repo}' at revision '{self.revision or constants.DEFAULT_REVISION}'"


def locate(
    name: str | Path,
    *,
    parts: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    variant: str | None = None,
    use_safetensors: bool | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    single: bool = False,
) -> Located:
    """Find a model by folder, short name or hub id, downloading only what is missing.

    `parts` are the subfolders that will be loaded (None: all, `("",)`: a model saved alone), and those of `optional`
    that the model has. `revision` is a branch, a
    tag or a commit; `endpoint` replaces the public hub. With `single` a file will do too: its path, a reference such
    as `hf://organisation/repository/path`, or the short name of a model that is published so.
    Errors: ModelNotFound when the name is unknown or its files can be had neither here nor from the hub;
    CheckpointError when the repository has no such variant or a download is damaged; InvalidInput for a file's path
    without `single`.
    """
    options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "endpoint": endpoint}
    options |= {"revision": revision, "force": force_download}
    options["offline"] = local_files_only or constants.HF_HUB_OFFLINE
    if isinstance(name, str) and is_reference(name):
        return _referred(name, single, options)
    path = Path(name).expanduser()
    if not str(name).strip():  # as a path it would be the working folder
        raise _unknown(name)
    card = _card_of(str(name))
    # A built-in model goes before a folder of its name, which is spelled ./name or given as a Path.
    if card is not None and card.folder is not None and not (isinstance(name, Path) and path.is_dir()):
        return Located(folder=installed(card), variant=variant or card.variant, card=card)
    if path.is_dir():
        return Located(folder=path, variant=variant, card=card)
    if path.is_file() and single:
        return Located(folder=path.parent, file=path, name=path.name, card=card_of_file(path.name))
    if path.is_file():
        raise InvalidInput(f"'{name}' is a file; give the model folder that it lies in.")
    if card is None and (isinstance(name, Path) or not _HUB_ID.fullmatch(name)):
        raise _unknown(name)
    if card is not None and card.is_single_file:
        return _referred(str(card.original), single, options)
    wanted = _Wanted(
        repo=(card.hub_id if card else None) or str(name),
        parts=tuple(parts) if parts is not None else None,
        optional=tuple(optional),
        variant=variant or (card.variant if card and card.name == name else None),
        use_safetensors=use_safetensors,
        revision=revision,
        cache_dir=Path(cache_dir).expanduser() if cache_dir is not None else None,
        token=token,
        endpoint=endpoint,
    )
    folder = _obtain(wanted, offline=options["offline"], force=force_download)
    _log.info("%s is commit %s", wanted.title, folder.name)
    return Located(folder=folder, variant=wanted.variant, card=card, commit=folder.name)


def _referred(name: str, single: bool, options: dict[str, Any]) -> Located:
    """Find what a reference names, where a file will do."""
    if not single:
        raise InvalidInput(f"'{name[:120]}' is one file; load it with from_single_file, or as a whole model.")
    found = parse_reference(name)
    return locate_file(found, **{**options, "revision": options["revision"] or found.revision})


def locate_file(
    reference: Reference,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    offline: bool = False,
    force: bool = False,
) -> Located:
    """Find one file of a repository, in the cache or by downloading it alone; arguments and errors as `locate`."""
    wanted = _Wanted(
        repo=reference.repo,
        parts=None,
        variant=None,
        use_safetensors=None,
        revision=revision,
        cache_dir=Path(cache_dir).expanduser() if cache_dir is not None else None,
        token=token,
        endpoint=endpoint,
    )
    known = try_to_load_from_cache(
        wanted.repo,
        reference.file,
        cache_dir=wanted.cache_dir,
        revision=wanted.revision or constants.DEFAULT_REVISION,
    )
    if isinstance(known, str) and not force:
        pointer = Path(known)
    elif offline:
        advice = "allow one download (no local_files_only, no HF_HUB_OFFLINE) or pass the path of a copy"
        raise ModelNotFound(
            f"{reference.file} of {wanted.title} is not in the cache and cannot be fetched offline: {advice}."
        )
    else:
        pointer = _download_file(wanted, reference.file, force)
    commit = pointer.parents[reference.file.count("/")].name
    card = card_of_file(reference.name)
    _log.info("%s of %s is commit %s", reference.file, wanted.title, commit)
    return Located(folder=pointer.parent, file=pointer, name=reference.name, card=card, commit=commit)


def upload(folder: Path, repo: str, *, private: bool | None, token: str | bool | None, message: str | None) -> str:
    """Put a folder into a repository of the hub, made if there is none, and return the address of the commit.

    Errors: CheckpointError with the hub library's error as its cause.
    """
    api = HfApi(token=token, library_name="sanakit")
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        made = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message or "Upload with sanakit")
    except Exception as error:  # as in `_download`
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        text = f"'{repo}' could not be written on the hub ({reason}). Run `hf auth login`, and check the name."
        raise CheckpointError(text) from error
    return str(made.commit_url)


def _card_of(name: str) -> Card | None:
    return CARDS.get(name) or next((card for card in CARDS.values() if name == card.hub_id), None)


def _unknown(name: str | Path) -> ModelNotFound:
    path = Path(name).expanduser()
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    if len(path.parts) > 1 or str(name).startswith((".", "~")):
        return ModelNotFound(f"There is no model folder '{name}'.{did_you_mean(path.name, siblings)}")
    known = f"Known names: {', '.join(CARDS)}; a folder or a hub id such as 'organisation/model' will do as well."
    return ModelNotFound(f"There is no model '{name}'.{did_you_mean(str(name), [*CARDS, *siblings])} {known}")


def _obtain(wanted: _Wanted, *, offline: bool, force: bool) -> Path:
    """Return the snapshot folder, from the cache if it is complete there."""
    cached = _cached_folder(wanted)
    sizes = _expected_sizes(wanted) if cached else {}
    damaged = [file for file, size in sizes.items() if cached and _size(cached / file) not in (None, size)]
    if cached and not force and _is_complete(cached, wanted, sizes):
        return cached
    fallback = None
    if cached and not (force or damaged or _lacks(cached, wanted, plain_will_do=True)):
        fallback = cached
    if offline:
        if fallback:
            return fallback
        lack = f"its file {damaged[0]} is cut short" if damaged else "not all of its files are in the cache"
        advice = "allow one download (no local_files_only, no HF_HUB_OFFLINE) or pass a folder"
        text = f"{wanted.title} cannot be loaded offline because {lack}: {advice}."
        raise ModelNotFound(text + folder_hint(wanted.repo))
    for file in damaged:
        _forget(cached / file if cached else Path(file))
    try:
        folder = _download(wanted, force=force)
    except ModelNotFound as error:
        if fallback is None:
            raise
        _log.warning("using commit %s of '%s' from the cache: %s", fallback.name, wanted.repo, error)
        return fallback
    if lacking := _lacks(folder, wanted, plain_will_do=True):
        raise ModelNotFound(f"{wanted.title} has no {lacking[0]}: it is no model of this kind.")
    return folder


def _cached_folder(wanted: _Wanted) -> Path | None:
    """Return the snapshot folder of the revision as far as it is in the cache."""
    first = wanted.parts[0] if wanted.parts else None
    probes = [MODEL_INDEX] if first is None else [MODEL_INDEX, f"{first}/{part_of(first).config}".lstrip("/")]
    for probe in probes:
        found = try_to_load_from_cache(
            wanted.repo, probe, cache_dir=wanted.cache_dir, revision=wanted.revision or constants.DEFAULT_REVISION
        )
        if isinstance(found, str):
            return Path(found).parents[probe.count("/")]
    return None


def _expected_sizes(wanted: _Wanted) -> dict[str, int]:
    """Return wanted file -> bytes by the listing that an earlier download kept; empty when none fits."""
    read = getattr(huggingface_hub, "get_cached_repo_tree", None)  # huggingface_hub 1.x keeps no listing
    if read is None:
        return {}
    try:
        sizes = {
            file.path: file.size for file in read(wanted.repo, revision=wanted.revision, cache_dir=wanted.cache_dir)
        }
        files = wanted_files(sizes, wanted.parts, wanted.variant, wanted.use_safetensors, wanted.optional)
    except (huggingface_hub.errors.CachedRepoTreeNotFoundError, CheckpointError, ModelNotFound):
        return {}
    return {file: sizes[file] for file in files}


def _is_complete(folder: Path, wanted: _Wanted, sizes: Mapping[str, int]) -> bool:
    """Tell whether a snapshot needs nothing more; without a listing only an unambiguous folder counts."""
    if sizes:
        return all(_size(folder / file) == size for file, size in sizes.items())
    return not _lacks(folder, wanted)


def _lacks(folder: Path, wanted: _Wanted, *, plain_will_do: bool = False) -> tuple[str, ...]:
    told: dict[str, Any] = {"plain_will_do": plain_will_do, "optional": wanted.optional}
    return missing_files(folder, wanted.parts, wanted.variant, wanted.use_safetensors, **told)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _forget(pointer: Path) -> None:
    """Remove a cached file and the blob it points to, so that it is fetched again."""
    blob = pointer.resolve()
    pointer.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _download(wanted: _Wanted, *, force: bool) -> Path:
    """Fetch the wanted files of one commit.

    Errors: ModelNotFound with the hub library's error as its cause; CheckpointError for a file whose hash is wrong.
    """
    info = _info(wanted)
    listing = [file.rfilename for file in info.siblings or ()]
    files = wanted_files(listing, wanted.parts, wanted.variant, wanted.use_safetensors, wanted.optional)
    if not files:
        raise ModelNotFound(f"{wanted.title} holds no model in the known layout (no {MODEL_INDEX} or config.json).")
    present = [file for file in files if not force and _cached_file(wanted, file, str(info.sha))]
    try:
        folder = snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            cache_dir=wanted.cache_dir,
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", file) for file in files],
            force_download=force,
            token=wanted.token,
            endpoint=wanted.endpoint,
            library_name="sanakit",
        )
    except Exception as error:  # as above
        raise _not_served(wanted, error) from error
    for file in sorted(set(files) - set(present)):
        _check_download(Path(folder) / file)
    return Path(folder)


def _download_file(wanted: _Wanted, file: str, force: bool) -> Path:
    """Fetch one file; errors as `_download`."""
    _info(wanted)  # one question, answered soon: the download itself would ask six times, and tell of each
    try:
        pointer = hf_hub_download(
            wanted.repo,
            file,
            revision=wanted.revision,
            cache_dir=wanted.cache_dir,
            force_download=force,
            token=wanted.token,
            endpoint=wanted.endpoint,
            library_name="sanakit",
        )
    except RepositoryNotFoundError as error:  # a kind of the next one in some versions
        raise _not_served(wanted, error) from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _not_served(wanted, error) from error
        raise ModelNotFound(f"{wanted.title} has no file {file}: check the path on its page.") from error
    except Exception as error:  # the client's transport library, and with it its errors, depends on its version
        raise _not_served(wanted, error) from error
    _check_download(Path(pointer))
    return Path(pointer)


def _info(wanted: _Wanted) -> Any:
    """Ask the hub what a repository holds; errors as `_download`."""
    api = HfApi(endpoint=wanted.endpoint, token=wanted.token, library_name="sanakit")
    try:
        return api.model_info(wanted.repo, revision=wanted.revision, timeout=REQUEST_TIMEOUT)
    except Exception as error:  # the client's transport library, and with it its errors, depends on its version
        raise _not_served(wanted, error) from error


def _not_served(wanted: _Wanted, error: Exception) -> ModelNotFound:
    return not_served(wanted.repo, wanted.title, wanted.revision, wanted.endpoint, error)


def _cached_file(wanted: _Wanted, file: str, commit: str) -> bool:
    return isinstance(try_to_load_from_cache(wanted.repo, file, cache_dir=wanted.cache_dir, revision=commit), str)


def _check_download(pointer: Path) -> None:
    """Compare a downloaded file with the SHA-256 that names its blob; small ones have none, but may be no web pages.

    Errors: CheckpointError; the file is removed from the cache first.
    """
    try:
        if hub_digest(pointer):
            verify(pointer)
        elif pointer.suffix == ".json":
            read_json(pointer)
    except CheckpointError as error:
        _forget(pointer)
        text = f"The download of {pointer.name} was damaged on the way and was removed"
        raise CheckpointError(f"{text}: load it again, outside a network that asks for a login.") from error
