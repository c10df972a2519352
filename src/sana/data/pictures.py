"""The one door for pictures of users: whatever the file is, a plain upright picture comes out, or one sentence.

PNG, JPEG and WebP are read, by content and not by name, into 8-bit RGB (masks: black and white). Grey, palette, CMYK
and 16-bit pictures are converted; what is see-through is laid on white; the orientation in the EXIF data is honoured;
colour profiles are passed over. Animations, too many pixels and damaged files are refused. Free of torch.

Legend: sizes are (width, height), as in PIL.
"""

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sana.errors import InvalidInput, ModelNotFound

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 256 * 2**20
MAX_SIDE = 16384
MAX_PIXELS = 2**26
"""Largest picture that is read, 8192 x 8192; its RGB takes 192 MB."""
MAX_RATIO = 32
"""Longest side in units of the shortest."""
MIDDLE_GREY = 128
"""A mask is white from here on."""
_ORIENTATION = 0x0112
_MOST_CHUNKS = 2**16
"""Of a PNG file that are looked at one by one."""

Openable = Any
"""Where a picture is: a path, a PIL image, or a binary file that was opened and can seek."""


def read_picture(source: Openable, what: str = "image", name: str = "") -> "Image":
    """Return the picture upright and in RGB.

    Args:
        source: a path, an open file, or a PIL image, which is left alone.
        what: what it is called in errors.
        name: which one it is, where the source does not say it.

    Raises:
        ModelNotFound: there is no such file.
        InvalidInput: it is no picture that can be used.
    """
    with _opened(source, what, name) as picture:
        return _rgb(_loaded(picture, source, what, name), (255, 255, 255))


def upright_picture(source: Openable, what: str = "image") -> "Image":
    """Return the picture upright, in the mode that it was stored in. Errors as `read_picture`."""
    with _opened(source, what) as picture:
        upright = _loaded(picture, source, what)
        return upright.copy() if upright is source else upright


def read_mask(source: Openable, what: str = "mask") -> "Image":
    """Return a mask in mode L, 255 where the picture is to be drawn anew and 0 elsewhere.

    White asks for it, from middle grey on; what is see-through does not. Errors as `read_picture`.
    """
    with _opened(source, what) as picture:
        grey = _rgb(_loaded(picture, source, what), (0, 0, 0)).convert("L")
    return grey.point([255 * (level >= MIDDLE_GREY) for level in range(256)])


def picture_size(source: Openable, what: str = "image", name: str = "") -> tuple[int, int]:
    """Return (width, height) of the upright picture; of a file only the header is read. Errors as `read_picture`."""
    with _opened(source, what, name) as picture:
        width, height = picture.size
        # A PNG file may tell its orientation behind its pixels, and PIL reads all of them to look for it.
        is_upright = (
            picture.format == "PNG" and picture is not source and not _has_chunk(getattr(picture, "fp", None), b"eXIf")
        )
        return (height, width) if not is_upright and _orientation(picture) in (5, 6, 7, 8) else (width, height)


def is_see_through(source: Openable) -> bool:
    """Tell whether a picture can have see-through pixels. Errors as `read_picture`."""
    with _opened(source, "image") as picture:
        return bool(picture.has_transparency_data)


def fit(picture: "Image", width: int, height: int) -> "Image":
    """Return the picture resized to cover the size, without distortion, and cut to it around its centre.

    A mask (mode L) takes the share of white in each pixel, so that it reaches no farther than before.
    """
    from PIL.Image import Resampling

    if picture.size == (width, height):
        return picture
    scale = max(width / picture.width, height / picture.height)
    wide, high = min(width / scale, picture.width), min(height / scale, picture.height)
    left, top = (picture.width - wide) / 2, (picture.height - high) / 2
    how = Resampling.BOX if picture.mode == "L" else Resampling.LANCZOS
    return picture.resize((width, height), how, (left, top, left + wide, top + high))


@contextmanager
def _opened(source: Openable, what: str, name: str = "") -> Iterator["Image"]:
    """Open a picture, of which nothing but the header is read, and check what that says."""
    from PIL import Image

    if isinstance(source, Image.Image):
        _check_size(source, "The picture", what)
        yield source
        return
    file: Any = source
    name = name or "that was fetched"
    if isinstance(source, str | os.PathLike):
        file = os.fspath(source)
        name = Path(file).name[:80] or file[-80:]
        _check_file(file, name, what)
    # PIL warns of sizes, which are checked right after the header is read and more strictly, and of odd metadata.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise _too_large(name, what) from None
        except _DAMAGED as error:
            raise _unreadable(name, what, error) from None
        with picture:
            _check_size(picture, name, what)
            yield picture


def _check_file(path: str, name: str, what: str) -> None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        raise ModelNotFound(f"There is no file {name} for the {what}. Check the name.") from None
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput(f"The {what} {name} is not a file but a folder or a device. Give a picture.")
    if not status.st_size:
        raise InvalidInput(f"The {what} {name} is empty: it has 0 bytes. Give a picture.")
    if status.st_size > MAX_BYTES:
        raise InvalidInput(f"The {what} {name} has more than {MAX_BYTES >> 20} MB. Make it smaller.")


def _check_size(picture: "Image", name: str, what: str) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise _too_large(name, what)
    if min(width, height) < 1 or max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidInput(
            f"The {what} has {width} x {height} pixels, which is too long and thin: at most {MAX_RATIO} to 1. Cut it."
        )
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":  # the further pictures of an MPO file are views of the same
        raise InvalidInput(f"The {what} is an animation of {frames} pictures. Give one of them as a file of its own.")


def _too_large(name: str, what: str) -> InvalidInput:
    return InvalidInput(
        f"The {what} {name} is too large: at most {MAX_PIXELS >> 20} million pixels and {MAX_SIDE} along a side."
        " Make it smaller."
    )


def _unreadable(name: str, what: str, error: BaseException) -> InvalidInput:
    reason = "it is damaged or cut off" if str(error).strip() and "cannot identify" not in str(error) else (
        "it is no PNG, JPEG or WebP"
    )  # fmt: skip
    return InvalidInput(f"The {what} {name} cannot be read: {reason}. Save it anew as PNG.")


def _loaded(picture: "Image", source: Openable, what: str, name: str = "") -> "Image":
    """Return the picture with its pixels read and turned upright."""
    from PIL.Image import Transpose

    name = Path(source).name[:80] if isinstance(source, str | Path) else name or "given"
    try:
        picture.load()
    except _DAMAGED as error:
        raise _unreadable(name, what, error) from None
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(_orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def _orientation(picture: "Image") -> int:
    """Return the orientation that the EXIF data tell, 1 where they are missing or damaged: the picture may be fine."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = picture.getexif().get(_ORIENTATION, 1)
    except (*_DAMAGED, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 1
    return told if isinstance(told, int) and 1 <= told <= 8 else 1


def _has_chunk(file: "BinaryIO | None", kind: bytes) -> bool:
    """Tell whether a PNG file may have a chunk of this kind, without reading what chunks hold; its place is kept."""
    if file is None:
        return True
    place = file.tell()
    try:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == kind:
                return len(head) == 8
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return True
    finally:
        file.seek(place)


def _rgb(picture: "Image", background: tuple[int, int, int]) -> "Image":
    """Return a loaded picture in RGB, its see-through pixels on a background."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        below = Image.new("RGBA", picture.size, (*background, 255))
        return Image.alpha_composite(below, picture).convert("RGB")
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def _eight_bits(picture: "Image") -> "Image":
    """Return a grey picture of 16 bits, or of floats from 0 to 1, in mode L; PIL would clip instead of scale."""
    import numpy as np
    from PIL import Image

    values: Any = np.asarray(picture).astype(np.float64)
    most = 1.0 if picture.mode == "F" else 65535.0
    return Image.fromarray(np.rint(np.clip(np.nan_to_num(values) / most, 0, 1) * 255).astype(np.uint8))


_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error, MemoryError)
"""What PIL raises for damaged files, depending on where the damage is."""
