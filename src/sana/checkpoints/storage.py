"""Files that appear whole or not at all: single ones by a rename, whole folders by a rename and a list of moves.

A folder is saved into a hidden folder inside it. Once everything there is on the disk it is renamed to `.saved`, which
is the moment the save happens; its files are then moved into their places. A save that is killed before the rename
leaves what was there before; one that is killed after it is finished by the next process that looks. Nothing is ever
half new.
"""

import contextlib
import errno
import importlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sana.checkpoints.foreign import first_line
from sana.errors import CheckpointError, InvalidInput, SanaError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

STAGE = ".saving-"
SAVED = ".saved"
STALE = "stale.json"
"""File of a finished save that lists what it replaces without writing it anew: shards of an earlier save."""

LAST = ("model_index.json", "config.json", "scheduler_config.json", "state.json")
"""Files without which a folder is nothing: they go first and come last, so that nobody reads a mixture."""

_STALE_NAME = re.compile(r"(\w+/)?\w[\w.-]*\.(safetensors|bin|json)")
_FORGOTTEN = 24 * 3600.0
"""Seconds after which a folder of a save is an orphan on systems without locks."""
_ABANDONED = 3600.0
"""Seconds after which an unfinished single file belongs to nobody, where several processes write to one folder."""
_warned: set[str] = set()
_log = logging.getLogger(__name__)


Leftovers = Callable[[], Iterable[str]]
"""Tells which files of a folder a save makes useless, as names relative to it; asked while nobody else saves there."""


@contextlib.contextmanager
def saving(folder: Path, leftovers: list[Leftovers] | None = None) -> Iterator[Path]:
    """Give a block a folder to write into; what it wrote appears in `folder` at once when the block ends.

    Other files of `folder` stay, but for those that `leftovers`, which the block may fill, names. Two processes may
    save to the same folder: the later one wins, whole.
    Errors: InvalidInput for a path that is a file; OSError naming the file that could not be written, and the folder is
    as it was before.
    """
    if folder.is_file():
        raise InvalidInput(f"'{folder}' is a file; give a folder to save to.")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            finish(folder)
            sweep(folder)
            stage = folder / f"{STAGE}{os.getpid()}-{secrets.token_hex(4)}"
            stage.mkdir()
            held = _lock(stage, wait=False)
    try:
        yield stage
        stage.chmod(stat.S_IMODE(folder.stat().st_mode))
        _settle(stage)
        with _locked(folder):
            finish(folder)
            _note_stale(stage, [name for told in leftovers or () for name in told()])
            stage.rename(folder / SAVED)
            sync(folder)
            finish(folder)
    except OSError as error:
        if isinstance(error, SanaError):
            raise
        place = str(error.filename or folder).replace(str(stage), str(folder))
        reason = f"{error.strerror or error}; {folder} was not saved, what was there before is as it was"
        raise OSError(error.errno or errno.EIO, reason, place) from error
    finally:
        _unlock(held)
        shutil.rmtree(stage, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish a save that was killed after it had taken place; looks at one name where there is none.

    Errors: CheckpointError when the folder cannot be written.
    """
    if not _is_folder(folder / SAVED):
        return
    try:
        with _locked(folder):
            finish(folder)
    except OSError as error:
        text = f"The saving of {folder} was interrupted and cannot be finished here ({error.strerror})"
        raise CheckpointError(f"{text}: load it once where the folder can be written, or save it again.") from error


def finish(folder: Path) -> None:
    """Move what a finished save left in `.saved` into its places; may be repeated from any point."""
    saved = folder / SAVED
    if not _is_folder(saved):
        return
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if not _is_folder(path))
    files = [file for file in files if str(file) != STALE]
    moved = [file for file in files if str(file) not in LAST] + [file for file in files if str(file) in LAST]
    for name in LAST:
        if (saved / name).exists():
            (folder / name).unlink(missing_ok=True)
    for name in _stale_names(saved):
        (folder / name).unlink(missing_ok=True)
    for file in moved:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        _move(saved / file, folder / file)
    for place in {(folder / file).parent for file in files}:
        sync(place)
    shutil.rmtree(saved)
    sync(folder)


def write_all(file: Any, data: Any) -> None:
    """Write all bytes of a buffer to an unbuffered file, which may take fewer at a time."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


@contextlib.contextmanager
def naming(path: Path, size: int | None = None) -> Iterator[None]:
    """Give an error of the operating system the file's name, and the space that is needed if the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = system_error(error)
        if told is None:
            raise
        reason = told.strerror or first_line(error)
        if size and told.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason += f" ({size / 1e6:,.1f} MB are needed)"
        raise OSError(told.errno or errno.EIO, reason, str(path)) from error


def system_error(error: Exception) -> OSError | None:
    """Return the operating system's error behind what was raised; libraries written in Rust tell only its number."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found:
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return error if isinstance(error, OSError) else None


@contextlib.contextmanager
def naming_foreign(folder: Path) -> Iterator[None]:
    """Turn what libraries written in Rust raise for a full or broken disk into an OSError that names the folder."""
    try:
        yield
    except Exception as error:
        told = system_error(error)
        if told is None or told is error:
            raise
        raise OSError(told.errno, told.strerror, str(folder)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publish a mapping as the published model files have it: indented, keys sorted."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    publish(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk and rename it: `path` is never half written.

    Errors: OSError naming `path`.
    """
    beside = path.with_name(f".{path.name}.saving-{os.getpid()}-{secrets.token_hex(4)}")
    with naming(path):
        try:
            write(beside)
            beside.chmod(path.parent.stat().st_mode & 0o666)
            sync(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; systems that cannot open folders flush them themselves."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def warn_if_open_to_all(folder: Path) -> None:
    """Log once when anybody on this machine could exchange the files of a model that belongs to somebody else."""
    if os.name != "posix" or str(folder) in _warned:
        return
    found = folder.stat()
    if found.st_mode & stat.S_IWOTH and found.st_uid != os.geteuid():
        _warned.add(str(folder))
        _log.warning("%s belongs to another user and anybody may write to it: use models you trust, or copy it", folder)


def _settle(stage: Path) -> None:
    """Give all files the folder's permissions, which foreign libraries do not, and flush everything to the disk."""
    mode = stage.stat().st_mode
    for path in stage.rglob("*"):
        path.chmod(stat.S_IMODE(mode) if path.is_dir() else mode & 0o666)
        sync(path)
    sync(stage)


def _note_stale(stage: Path, names: list[str]) -> None:
    if names:
        (stage / STALE).write_text(json.dumps(names), encoding="utf-8")
        sync(stage / STALE)
        sync(stage)


def _stale_names(saved: Path) -> list[str]:
    """Return what `_note_stale` noted; a list from elsewhere can name nothing outside the folder."""
    file = saved / STALE
    names = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [name for name in names if isinstance(name, str) and _STALE_NAME.fullmatch(name)]


def sweep(folder: Path) -> None:
    """Remove what killed saves left behind: folders that nobody holds any more, and unfinished single files."""
    for orphan in folder.glob(f"{STAGE}*"):
        held = _lock(orphan, wait=False)
        if held is not None or time.time() - orphan.stat().st_mtime > _FORGOTTEN:
            shutil.rmtree(orphan, ignore_errors=True)
            _unlock(held)
    for orphan in folder.glob(f".*.{STAGE[1:]}*"):
        orphan.unlink(missing_ok=True)


def sweep_shared(folder: Path, *former: str) -> None:
    """Remove the unfinished single files of killed processes from a folder to which others may be writing just now.

    `former` are patterns of the names that they had in earlier versions.
    """
    for pattern in (f".*{STAGE}*", *former):
        for orphan in folder.glob(pattern):
            with contextlib.suppress(OSError):  # another process was faster, or the folder may only be read
                if orphan.is_file() and time.time() - orphan.stat().st_mtime > _ABANDONED:
                    orphan.unlink()


def _move(source: Path, target: Path) -> None:
    """Rename a file, or copy it whole when its folder is a link to another disk."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        publish(target, lambda beside: shutil.copyfile(source, beside))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other savers out of the few renames of a save; a killed process lets go by itself."""
    held = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(held)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder and return a handle, or None if somebody else holds it, or if this system cannot tell."""
    if os.name != "posix":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another, or a file system without locks
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
