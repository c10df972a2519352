"""The picture arguments of a documented call, of every documented kind, as one tensor.

Shapes: P pictures, H W pixels, C h w latents. Pictures span -1 to 1; latents are as `output_type="latent"` gives them,
with standard deviation about 1.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sana.engine.pictures import read_picture
from sana.engine.request import MAX_SIDE, shown
from sana.engine.resolution import check_step
from sana.errors import InvalidInput

ImageInput = Image.Image | np.ndarray[Any, Any] | Tensor | Sequence[Image.Image | np.ndarray[Any, Any] | Tensor]
COLOURS = 3
MAX_PICTURES = 10_000


def read_images(name: str, value: Any, size: tuple[int, int], channels: int) -> Tensor:
    """Return pictures [P, 3, H, W] of that (height, width), or latents [P, C, h, w] as they are, both float.

    Pictures are resized as in the reference: PIL images with Lanczos's filter, arrays to the nearest pixel, tensors
    bilinearly. Arrays and tensors hold 0 to 1, or 0 to 255 as bytes; negative values say that they hold -1 to 1.
    Grey pictures and pictures with transparency become RGB.

    Args:
        name: the argument, for messages.
        value: a PIL image, an array [H, W], [H, W, 3] or [P, H, W, 3], a tensor [3, H, W] or [P, 3, H, W], latents
            [C, h, w] or [P, C, h, w], or a list of one of these kinds.
        channels: of latents; a tensor with so many channels holds latents.

    Raises:
        InvalidInput: it is nothing of this, or not finite.
    """
    items = _items(name, value)
    if isinstance(items[0], Image.Image):
        return torch.cat([_unit(_from_pil(name, item, size)) for item in items])
    if isinstance(items[0], np.ndarray):
        array = _joined(name, [_from_array(name, item) for item in items])
        return _signed(name, F.interpolate(array, size=size))
    tensor = as_tensor(name, items)
    if is_latent(tensor, channels):
        return tensor
    _check_channels(name, tensor)
    if tensor.shape[-2:] != size:
        tensor = F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)
    return _signed(name, tensor)


def read_control(name: str, value: Any, size: tuple[int, int], channels: int) -> Tensor:
    """Return a control as `read_images` does, but a tensor is taken as it is, neither resized nor scaled.

    Raises:
        InvalidInput: it is no picture, or a tensor whose sides are no multiples of 32.
    """
    items = _items(name, value)
    if not isinstance(items[0], Tensor):
        return read_images(name, items, size, channels)
    tensor = as_tensor(name, items)
    if is_latent(tensor, channels):
        return tensor
    _check_channels(name, tensor)
    check_step(*tensor.shape[-2:])
    return _rgb(tensor)


def is_latent(tensor: Tensor, channels: int) -> bool:
    """Tell whether a tensor [P, C, H, W] holds latents and not pictures."""
    return tensor.shape[1] == channels != COLOURS


def for_rows(tensor: Tensor, prompts: int, rows: int) -> Tensor:
    """Repeat what there is of each picture [P, ...] for R images: one for all, one per prompt, or all of them in turn.

    The reference takes them in turn also if there is one per prompt, and pairs pictures with the prompts of others.
    """
    count = len(tensor)
    if count == prompts:
        return tensor.repeat_interleave(rows // count, dim=0)
    return tensor.repeat(rows // count, *[1] * (tensor.ndim - 1))


def as_tensor(name: str, items: Sequence[Tensor]) -> Tensor:
    """Join tensors [C, H, W] or [P, C, H, W] into one, float, with bytes scaled to 0 to 1."""
    found = []
    for item in items:
        tensor = item[None] if item.ndim == 3 else item
        if tensor.ndim != 4 or 0 in tensor.shape or tensor.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise InvalidInput(
                f"`{name}` is a tensor {list(item.shape)} of {item.dtype}. Give numbers [3, H, W] or [P, 3, H, W]."
            )
        _check_sides(name, *tensor.shape[-2:])
        found.append(_scaled(tensor))
    return _joined(name, found)


def _items(name: str, value: Any) -> list[Any]:
    """Return the pictures as a list of one kind."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    kinds = (Image.Image, np.ndarray, Tensor)
    kind = next((kind for kind in kinds if items and isinstance(items[0], kind)), None)
    if kind is None or len(items) > MAX_PICTURES or not all(isinstance(item, kind) for item in items):
        raise InvalidInput(
            f"`{name}` has to be a PIL image, an array, a tensor, or a list of one of these, but is {shown(value)}."
            " `sana.load_image` reads a file."
        )
    return items


def _from_pil(name: str, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return [1, 3, H, W] with values from 0 to 1."""
    resized = read_picture(picture, name).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized).astype(np.float32) / 255).permute(2, 0, 1)[None]


def _from_array(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    """Return [P, channels, H, W] as float."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or 0 in array.shape or array.dtype.kind not in "uif":
        raise InvalidInput(
            f"`{name}` is an array {list(array.shape)} of {array.dtype}. Give numbers [H, W, 3] or [P, H, W, 3]."
        )
    _check_sides(name, *array.shape[1:3])
    numbers = array.astype(np.float32) / (1 if array.dtype.kind == "f" else 255)
    tensor = torch.from_numpy(np.ascontiguousarray(numbers.transpose(0, 3, 1, 2)))
    _check_channels(name, tensor)
    return tensor


def _check_sides(name: str, height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise InvalidInput(f"`{name}` is {width} x {height}; the largest side is {MAX_SIDE}. Make it smaller.")


def _scaled(tensor: Tensor) -> Tensor:
    """Return floating numbers as they are, as float32 at least, and whole ones as bytes scaled to 0 to 1."""
    return tensor.float() if tensor.is_floating_point() else tensor.float() / 255


def _check_channels(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] not in (1, 2, 3, 4):
        raise InvalidInput(
            f"`{name}` has {tensor.shape[1]} channels, but a picture has 3, or 1 if it is grey. Give [3, H, W], or"
            " [H, W, 3] in an array."
        )


def _rgb(tensor: Tensor) -> Tensor:
    """Return three colours of grey, grey with transparency, RGB or RGBA, -1 to 1; what is see-through becomes white."""
    count = tensor.shape[1]
    colours = tensor[:, :COLOURS] if count >= COLOURS else tensor[:, :1].expand(-1, COLOURS, -1, -1)
    if count % 2:
        return colours
    opaque = (tensor[:, -1:] + 1) / 2
    return colours * opaque + (1 - opaque)


def _joined(name: str, tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        raise InvalidInput(f"The pictures of `{name}` differ in size or channels. Resize them to one size.")
    tensor = torch.cat([tensor.detach() for tensor in tensors])
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidInput(f"`{name}` contains NaN or infinity. Check its source.")
    return tensor


def _unit(tensor: Tensor) -> Tensor:
    return 2 * tensor - 1


def _signed(name: str, tensor: Tensor) -> Tensor:
    """Return RGB from -1 to 1 of values from 0 to 1, or from -1 to 1 as they are."""
    signed = tensor if bool(tensor.min() < 0) else _unit(tensor)
    if float(signed.abs().max()) > 1 + 1e-3:
        warnings.warn(
            f"`{name}` holds values from {float(tensor.min()):.4g} to {float(tensor.max()):.4g}, but 0 to 1, or -1 to"
            " 1, are expected; they are used as they are.",
            stacklevel=2,
        )
    return _rgb(signed)
