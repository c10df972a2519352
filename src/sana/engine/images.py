"""Pixels in and out: decoded tensors to pictures, pictures to files, files to pictures.

Legend: B images, C = 3 colours, H W pixels; decoded tensors span about -1 to 1, returned ones 0 to 1.
"""

import contextlib
import errno
import io
import math
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from sana.data.buckets import fitted_size
from sana.data.pictures import upright_picture
from sana.engine.metadata import Level, png_info
from sana.engine.png import write_png
from sana.engine.request import Result
from sana.errors import InvalidInput, ModelNotFound, NonFinite, NotWritten, SanaError, did_you_mean

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)

STRIP_PIXELS = 1 << 16
MAX_DOWNLOAD = 100 * 2**20
DOWNLOAD_TIMEOUT = 30.0


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise NonFinite, naming `what`, if any value is NaN or infinite: such values never become a picture."""
    # The extremes carry every NaN and infinity, and need no second tensor.
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor.detach())):
        raise NonFinite(
            f"The {what} contain NaN or infinity, so there is no picture. Load the text encoder and the VAE in bfloat16"
            " or float32, and the transformer in the dtype its model card names."
        )


def resize_and_crop(image_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly (no antialias, in the tensor's dtype) until the target is covered, then cut its centre out."""
    old_height, old_width = image_BCHW.shape[-2:]
    if (old_height, old_width) == (height, width):
        return image_BCHW
    fitted = fitted_size(old_height, old_width, height, width)
    image_BCHW = torch.nn.functional.interpolate(image_BCHW, size=fitted, mode="bilinear", align_corners=False)
    top, left = (fitted[0] - height) // 2, (fitted[1] - width) // 2
    return image_BCHW[:, :, top : top + height, left : left + width]


def check_output_type(output_type: str) -> None:
    """Raise InvalidInput for an unknown output type."""
    if output_type not in OUTPUT_TYPES:
        raise InvalidInput(
            f"`output_type` must be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}."
            f"{did_you_mean(str(output_type), OUTPUT_TYPES)}"
        )


def to_pictures(decoded_BCHW: Tensor, output_type: str = "pil") -> Any:
    """Turn decoded images into what the caller asked for.

    Args:
        decoded_BCHW: the decoder's output, about -1 to 1.
        output_type: "pt" ([B, 3, H, W] in the decoder's dtype), "np" ([B, H, W, 3], float32), both 0 to 1, or "pil".

    Raises:
        NonFinite: a value is NaN or infinite.
        InvalidInput: the output type is unknown.
    """
    check_output_type(output_type)
    check_finite(decoded_BCHW, "decoded images")
    if output_type == "pil":
        return [Image.fromarray(to_bytes(image_CHW).numpy()) for image_CHW in decoded_BCHW.detach()]
    unit_BCHW = (decoded_BCHW / 2 + 0.5).clamp(0, 1)
    return unit_BCHW if output_type == "pt" else unit_BCHW.permute(0, 2, 3, 1).float().cpu().numpy()


def to_bytes(image_CHW: Tensor) -> Tensor:
    """Return [H, W, C] uint8 on the CPU of a finite decoded image; one half rounds to even.

    All steps are done on one strip of rows before the next, because a strip stays in the cache of a CPU.
    """
    _, height, width = image_CHW.shape
    rows = max(1, STRIP_PIXELS // width) if image_CHW.device.type == "cpu" else height
    bytes_HWC = torch.empty(height, width, len(image_CHW), dtype=torch.uint8)
    for y in range(0, height, rows):
        unit = (image_CHW[:, y : y + rows] * 0.5).add_(0.5).clamp_(0, 1).float()
        bytes_HWC[y : y + rows] = unit.mul_(255).round_().to(torch.uint8).permute(1, 2, 0)
    return bytes_HWC


def save_png(result: Result, index: int, path: str | Path, *, metadata: Level = "full", force: bool = False) -> Path:
    """Write one picture of a result as PNG with its metadata and return the path.

    The file appears complete or not at all: it is written under another name in the same folder and then renamed.

    Raises:
        InvalidInput: the name does not end in .png, the folder is missing, or the file exists and `force` is off.
        NotWritten: the disk is full or broken, or the folder may not be written to.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InvalidInput(f"{target} does not end in .png; pictures are written as PNG. Change the name.")
    info = png_info(result, index, metadata)
    image = result.images[index]
    write_atomically(target, lambda file: write_png(file, image, info), force=force)
    return target


def beginning(target: Path) -> str:
    """Return the start of a file's name, short enough to leave room for more: file systems count bytes."""
    return target.name.encode(errors="ignore")[:100].decode(errors="ignore")


def write_atomically(target: Path, write: Callable[[io.BufferedWriter], object], *, force: bool = False) -> None:
    """Call `write` with a temporary file beside `target`, then give it the final name in one step.

    The content is on the disk before the name is. Whatever fails, nothing is left and an older file stays as it was.

    Raises:
        InvalidInput: the folder is missing, or the file exists and `force` is off.
        NotWritten: the disk is full or broken, or the folder may not be written to.
    """
    if not target.parent.is_dir():
        raise InvalidInput(f"The folder {target.parent} does not exist. Create it first.")
    if target.exists() and not force:
        raise _exists(target)
    temporary = target.with_name(f".{beginning(target)}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(temporary, target)
            else:
                _publish_new(temporary, target)
            _sync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):  # missing, or the disk is broken: what came before tells more
                temporary.unlink()
    except OSError as error:
        if isinstance(error, SanaError):
            raise
        raise _not_written(target, error) from error


def _publish_new(temporary: Path, target: Path) -> None:
    """Name the finished file, refusing in the same step if another process took the name meanwhile."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise _exists(target) from None
    except FileNotFoundError:  # the temporary file was removed; nothing may take its name
        raise
    except OSError:  # the file system has no hard links: claim the name first, then replace the empty claim
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise _exists(target) from None
        try:
            os.replace(temporary, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too, where folders can be opened; the file is whole whether this works or not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _not_written(target: Path, error: OSError) -> NotWritten:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG):
        return NotWritten(f"There is no room for {target} ({reason}). Free some space, or choose another folder.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotWritten(f"The folder {target.parent} cannot be written to ({reason}). Choose another one.")
    return NotWritten(f"{target} could not be written ({reason}). Check the disk, or choose another folder.")


def _exists(target: Path) -> InvalidInput:
    return InvalidInput(f"{target} exists already and is not overwritten. Choose another name, or allow it: `force`.")


def load_image(
    image: "str | Path | Image.Image", convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Return a picture, upright and in RGB, from a path, an http(s) address or a PIL image.

    PNG, JPEG and WebP files are read, of at most `data.pictures.MAX_PIXELS`.

    Args:
        image: where the picture is.
        convert_method: called instead of the conversion to RGB.

    Raises:
        InvalidInput: nothing is there, it is no picture, or the download exceeds 100 MB or 30 s of silence.
    """
    if not isinstance(image, str | Path | Image.Image):
        raise InvalidInput(f"`image` must be a path, an http(s) address or a PIL image but is {type(image).__name__}.")
    source: Any = image
    if isinstance(image, str | Path) and str(image).startswith(("http://", "https://")):
        source = io.BytesIO(_download(image))
    try:
        picture = upright_picture(source)
    except ModelNotFound:
        raise InvalidInput(f"There is no picture at {image}. Give a path or an http(s) address.") from None
    return convert_method(picture) if convert_method is not None else picture.convert("RGB")


def _download(address: object) -> bytes:
    """Fetch an http(s) address (the caller checks that it is one), at most `MAX_DOWNLOAD` bytes."""
    try:
        with urllib.request.urlopen(str(address), timeout=DOWNLOAD_TIMEOUT) as answer:
            data: bytes = answer.read(MAX_DOWNLOAD + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InvalidInput(f"The picture at {address} cannot be fetched ({error}). Check the address.") from error
    if len(data) > MAX_DOWNLOAD:
        raise InvalidInput(f"The picture at {address} exceeds {MAX_DOWNLOAD >> 20} MB. Download it and give the path.")
    return data
