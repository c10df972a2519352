"""The folder of a run: one process at a time, and what is read from the settings that it was begun with."""

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sana.errors import InvalidInput, NotWritten

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

LOCK = ".running"
_log = logging.getLogger(__name__)


class Lock:
    """Keeps other processes out of a run's folder; a killed process lets go by itself."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and take it.

        Errors: InvalidInput naming the process that has it; NotWritten when it cannot be written.
        """
        self._handle: int | None = None
        self.folder = folder
        self.take()

    @classmethod
    def check(cls, folder: Path) -> None:
        """Refuse a folder that another process has, before anything is made for it; later `Lock` decides.

        Errors: as of `Lock`.
        """
        if (folder / LOCK).exists():
            cls(folder).release()

    def take(self) -> None:
        """Take the folder, if it is not ours already."""
        if self._handle is not None:
            return
        file = self.folder / LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise NotWritten(f"The run's folder '{self.folder}' cannot be written: {error.strerror}.") from error
        if not self._locked(handle):
            holder = file.read_text(encoding="utf-8", errors="replace").strip()
            os.close(handle)
            raise InvalidInput(
                f"'{self.folder}' is being trained by another process ({holder or 'which did not say its number'}); "
                "wait for it, stop it, or choose another folder."
            )
        self._handle = handle
        with contextlib.suppress(OSError):  # the lock counts; on a full disk nobody hears whose it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}".encode(), 0)

    def _locked(self, handle: int) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            _log.warning("'%s' cannot be locked (%s): start no second run there", self.folder, error.strerror)
        return True

    def release(self) -> None:
        """Let others in."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings, by their dotted names, whose value is another than the saved one; None is one that is not there."""
    before, after = (dict(_flat(json.loads(json.dumps(tables)))) for tables in (saved, now))
    names = [*after, *(name for name in before if name not in after)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the first changed settings of two records of a recipe, as a recipe names them."""
    table = str(now.get("objective", "settings"))
    different = list(changed(saved, now).items())
    told = [f"{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in different[:MOST_TOLD]]
    more = f" and {len(different) - MOST_TOLD} more" if len(different) > MOST_TOLD else ""
    return ", ".join(one.replace("settings.", f"{table}.", 1) for one in told) + more


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_changes(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """List what differs between the settings a run was begun with and those of now.

    Errors: InvalidInput when the run cannot go on with them.
    """
    different = changed(saved, now)
    told = [f"{name} {_shown(old)} -> {_shown(new)}" for name, (old, new) in different.items()]
    for (name, (old, new)), words in zip(different.items(), told, strict=True):
        averaging = name == "run.ema" and bool(old) != bool(new)
        if name in FIXED or averaging or ".model." in name or name.startswith("discriminator_optimizer.name"):
            raise InvalidInput(
                f"The run in '{folder}' cannot go on with {words}; use another folder, or the same setting."
            )
    if told:
        _log.warning("'%s' goes on with other settings than before: %s", folder, ", ".join(told))


def check_models(folder: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Tell when a run goes on from other weights than it was begun with, under the same name."""
    told = [name for name, digest in now.items() if saved.get(name, digest) != digest]
    if told:
        names = ", ".join(told)
        _log.warning("'%s' goes on although the weights that %s names have changed since it began", folder, names)


def changed_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which data sets are other ones than those saved; the settings tell which a run names."""
    return ", ".join(
        f"{name} {saved[name]['samples']} -> {content['samples']} samples"
        + (" of other content" if saved[name]["samples"] == content["samples"] else "")
        for name, content in now.items()
        if saved.get(name, content) != content
    )


def check_data(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Tell when a run goes on with other data than it was begun with."""
    told = changed_data(saved, now)
    if told:
        _log.warning(
            "'%s' goes on with other data than before: %s; from here on their order is another, and the run will not "
            "end as it would have with the data of before",
            *(folder, told),
        )


def _shown(value: Any) -> str:
    return "(not set)" if value is None else json.dumps(value)


MOST_TOLD = 3
"""Changed settings that are listed of a finished run."""
FIXED = ("objective", "run.seed", "run.batch_size", "optimizer.name")
"""Settings without which the saved numbers mean nothing."""
