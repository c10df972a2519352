"""Pictures of a request: what a record merely names is refused, all else is for `data.pictures`. Free of torch."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sana.data import pictures
from sana.engine.attachments import FileRef, Source
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image


def read_picture(source: Source, what: str = "image") -> "Image":
    """Return the picture upright and in RGB. Errors as `data.pictures.read_picture`, and for what is only named."""
    return pictures.read_picture(_given(source, what), what)


def read_mask(source: Source, what: str = "mask") -> "Image":
    """Return a mask as `data.pictures.read_mask` does. Errors as `read_picture`."""
    return pictures.read_mask(_given(source, what), what)


def picture_size(source: Source, what: str = "image") -> tuple[int, int]:
    """Return (width, height) of the upright picture; of a file only the header is read. Errors as `read_picture`."""
    return pictures.picture_size(_given(source, what), what)


def is_see_through(source: Source) -> bool:
    """Tell whether a picture can have see-through pixels. Errors as `read_picture`."""
    return pictures.is_see_through(_given(source, "image"))


def reference(source: Source, picture: "Image") -> FileRef:
    """Return how records name a picture: the base name of its file, and the hash of what was read from it."""
    name = Path(source).name if isinstance(source, str | Path) else ""
    name = name.encode("utf-8", "replace").decode().replace("\\", "_")[:255]
    head = f"{picture.mode} {picture.width}x{picture.height}\n".encode()
    return FileRef(name=name, sha256=hashlib.sha256(head + picture.tobytes()).hexdigest())


def _given(source: Source, what: str) -> Source:
    if isinstance(source, FileRef):
        name = source.name or "a picture without a name"
        raise InvalidInput(f"The {what} is only known by what its record says ({name}). Give the file itself.")
    return source
