"""The files that a record names: found again, beside the picture or where the user says, and held to their SHA-256."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sana.apps.cli import arguments
from sana.apps.cli.arguments import Spelling
from sana.engine.attachments import FileRef
from sana.engine.metadata import shortened
from sana.engine.request import Request
from sana.errors import InvalidInput, ModelNotFound


@dataclass(frozen=True, kw_only=True)
class Attached:
    """Files that the picture was made from, where they are not beside it under the names that are recorded."""

    image: Annotated[str | None, Spelling(value="FILE")] = None
    """The picture that was edited."""
    mask: Annotated[str | None, Spelling(value="FILE")] = None
    """Its mask."""
    control_image: Annotated[tuple[str, ...], Spelling(value="FILE")] = ()
    """The picture of a control; given once for each, in the order that `sana info` shows."""
    lora: Annotated[tuple[str, ...], Spelling(value="FILE")] = ()
    """An adapter; given once for each, in that order."""


def found(request: Request, place: Path, given: Attached) -> Request:
    """Return the request with paths in the place of what the record says of files.

    Args:
        place: the folder of the picture, where they are looked for.
        given: where they are instead.

    Raises:
        ModelNotFound: a file is nowhere.
        InvalidInput: a file is another one than it was, or one is given that was not used.
    """
    controls = [one.image for one in request.controls]
    loras = [one.source for one in request.loras]
    found_controls = _several("control_image", controls, given.control_image, place, _picture_digest)
    found_loras = _several("lora", loras, given.lora, place, _file_digest)
    return request.replace(
        image=_one("image", request.image, given.image, place, _picture_digest),
        mask=_one("mask", request.mask, given.mask, place, _mask_digest),
        controls=tuple(
            dataclasses.replace(one, image=path) for one, path in zip(request.controls, found_controls, strict=True)
        ),
        loras=tuple(
            dataclasses.replace(one, source=path) for one, path in zip(request.loras, found_loras, strict=True)
        ),
    )


def _several(
    name: str, recorded: Sequence[Any], given: Sequence[str], place: Path, digest: Callable[[Path], str]
) -> list[Any]:
    if given and len(given) != len(recorded):
        flag = arguments.flag_of(name)
        raise InvalidInput(f"{flag} is given {len(given)} times, but the record has {len(recorded)}. Give each once.")
    paths: Sequence[str | None] = given or [None] * len(recorded)
    return [_one(name, one, path, place, digest) for one, path in zip(recorded, paths, strict=True)]


def _one(name: str, recorded: Any, given: str | None, place: Path, digest: Callable[[Path], str]) -> Any:
    """Return the path of a file that the record names."""
    flag = arguments.flag_of(name)
    if recorded is None:
        if given is not None:
            raise InvalidInput(f"{flag} is given, but the picture was made without such a file. Drop it.")
        return None
    if not isinstance(recorded, FileRef):
        raise InvalidInput(f"The record does not say which file {flag} was, so it cannot be drawn again.")
    path = Path(given).expanduser() if given is not None else place / recorded.name
    what = shortened(recorded.name) or "a picture that was no file"
    if not path.is_file() or not (given or recorded.name):
        where = f"there is none at {shortened(str(path), 80)}" if given else "it is not beside it"
        raise ModelNotFound(f"It was made from {what}, and {where}. Say where it is with {flag} FILE.")
    if digest(path) != recorded.sha256:
        raise InvalidInput(
            f"{shortened(path.name)} is not the file that was used, its SHA-256 differs. Say where {what} is with"
            f" {flag} FILE."
        )
    return str(path)


def _picture_digest(path: Path) -> str:
    from sana.engine.pictures import read_picture, reference

    return reference(path, read_picture(path)).sha256


def _mask_digest(path: Path) -> str:
    from sana.engine.pictures import read_mask, reference

    return reference(path, read_mask(path)).sha256


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
