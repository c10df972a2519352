"""Where a user's picture lies on what the model draws, what of it stays, and how old and new become one picture.

Three grids of pixels: the picture that comes back, which has the user's size; the canvas, which the model draws and
which may have another shape; and the latents. What the canvas has beyond the picture is filled with the picture's edge
before drawing and cut off afterwards. Legend: H W pixels of the result, always in the order (height, width).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from torch import Tensor

from sana.data.buckets import fitted_size
from sana.data.pictures import fit
from sana.engine.images import resize_and_crop
from sana.errors import InvalidInput

Array = npt.NDArray[Any]
Border = tuple[int, int, int, int]
"""Pixels beyond a picture: left, top, right, bottom."""

SHAPE_TOLERANCE = 0.02
"""How far the shape of a mask may be from that of its picture."""
ENOUGH = 16
"""Pixels of a picture for each that is drawn, above which it is made smaller before its edges are extended."""
STRIP_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The way from the result's pixels to those that the model draws, and back."""

    height: int
    width: int
    drawn: tuple[int, int]
    """(height, width) that the model draws."""
    resized: bool
    """Whether the canvas is resized to cover the result; otherwise the result is its upper left part, as it is."""

    def place(self, picture: Image.Image) -> Image.Image:
        """Return a picture of the result's size as the canvas has it, its edges extended to fill the rest."""
        if picture.size != (self.width, self.height):
            picture = fit(picture, self.width, self.height)
        high, wide = self.drawn
        if not self.resized:
            return extended(picture, (0, 0, wide - self.width, high - self.height))
        fitted = fitted_size(high, wide, self.height, self.width)
        shrink = (ENOUGH * high * wide / (fitted[0] * fitted[1])) ** 0.5
        if shrink < 1:
            picture = picture.resize([max(1, int(side * shrink)) for side in picture.size], Image.Resampling.BOX)
            fitted = fitted_size(high, wide, picture.height, picture.width)
        top, left = (fitted[0] - picture.height) // 2, (fitted[1] - picture.width) // 2
        rest = (left, top, fitted[1] - picture.width - left, fitted[0] - picture.height - top)
        return fit(extended(picture, rest), wide, high)

    def cut(self, images_BCHW: Tensor) -> Tensor:
        """Return drawn images in the size of the result."""
        if self.resized:
            return resize_and_crop(images_BCHW, self.height, self.width)
        return images_BCHW[:, :, : self.height, : self.width]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """The picture that a result is laid into, and how much of the new each pixel takes."""

    picture: Image.Image
    """RGB, of the result's size."""
    share: Array
    """[H, W] float32: 0 where the picture stays, 1 where it is drawn anew, in between over the feathered border."""

    def paste(self, drawn: Image.Image) -> Image.Image:
        """Return the drawn picture with everything that stays laid over it, to the last bit."""
        old, new = np.asarray(self.picture), np.asarray(drawn)
        mixed = old.copy()
        for top in range(0, len(old), STRIP_ROWS):  # whole pictures as floats would take much memory
            rows = slice(top, top + STRIP_ROWS)
            share = self.share[rows, :, None]
            mixed[rows] = np.rint(old[rows] * (1 - share) + new[rows] * share)
        return Image.fromarray(mixed)


def extended(picture: Image.Image, border: Border) -> Image.Image:
    """Return the picture with its outermost pixels repeated beyond its edges."""
    left, top, right, bottom = border
    if not any(border):
        return picture
    pixels = np.asarray(picture)
    widths = [(top, bottom), (left, right), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, widths, mode="edge"))


def outpainted(picture: Image.Image, border: Border) -> Image.Image:
    """Return the picture with more room around it, filled with its edges, the more blurred the farther away."""
    if not any(border):
        return picture
    left, top = border[:2]
    filled = extended(picture, border)
    longest = max(border)
    away = Image.new("L", filled.size, 255)
    away.paste(0, (left, top, left + picture.width, top + picture.height))
    for part in (16, 4):  # weak and near, then strong and far
        blurred = filled.filter(ImageFilter.GaussianBlur(longest / part))
        filled = Image.composite(blurred, filled, away.filter(ImageFilter.GaussianBlur(longest / part / 2)))
    filled.paste(picture, (left, top))
    return filled


def masked(mask: Image.Image | None, size: tuple[int, int], border: Border) -> Image.Image | None:
    """Return what is drawn anew of a picture with its new room: what the mask says, and all of the room.

    Args:
        mask: as `read_mask` returns it, of the picture's shape; resized to it. None asks for the room alone.
        size: (width, height) of the picture.

    Raises:
        InvalidInput: the mask has another shape, or asks for nothing.
    """
    if mask is None and not any(border):
        return None
    if mask is None:
        mask = Image.new("L", size, 0)
    elif mask.getbbox() is None and not any(border):
        raise InvalidInput("The mask is black everywhere, so nothing would be drawn. Paint white what is to change.")
    if mask.size != size:
        if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > SHAPE_TOLERANCE:
            raise InvalidInput(
                f"The mask has {mask.width} x {mask.height} pixels and the picture {size[0]} x {size[1]}: their shapes"
                " differ. Make the mask from the picture."
            )
        mask = mask.resize(size, Image.Resampling.NEAREST)
    left, top, right, bottom = border
    whole = Image.new("L", (size[0] + left + right, size[1] + top + bottom), 255)
    whole.paste(mask, (left, top))
    return whole


def fitted_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """Return the mask as `fit` makes a picture of that size, again with 0 and 255 only."""
    return fit(mask, width, height).point([255 * (level >= 128) for level in range(256)])


def feathered(mask: Image.Image, width: int) -> Array:
    """Return the share [H, W] of the new: 0 outside of the mask, rising to 1 over `width` pixels inside of it.

    The width is the sum of steps along rows and columns to the nearest pixel outside. Where the mask is thinner, the
    share reaches 1 in its middle. The picture's own edge is no border.
    """
    inside = np.asarray(mask) > 0
    if width == 0 or inside.all():
        return inside.astype(np.float32)
    depth = np.minimum(_depth(inside), width + 1.0)
    deepest = _widest(_widest(depth, width, 0), width, 1)
    share = np.minimum(depth / np.maximum(deepest, 1.0), 1.0).astype(np.float32)
    smooth: Array = share * share * (3 - 2 * share)
    return smooth


def _depth(inside: Array) -> Array:
    """Return how many steps along rows and columns each pixel is away from the nearest one outside; 0 there."""
    depth = np.where(inside, np.float32(sum(inside.shape)), np.float32(0))
    for axis in (0, 1):
        shape = [1, 1]
        shape[axis] = -1
        place = np.arange(inside.shape[axis], dtype=np.float32).reshape(shape)
        forth = np.minimum.accumulate(depth - place, axis) + place
        back = np.flip(np.minimum.accumulate(np.flip(depth + place, axis), axis), axis) - place
        depth = np.minimum(forth, back)
    return depth


def _widest(values: Array, radius: int, axis: int) -> Array:
    """Return the largest value within `radius` along an axis."""
    reach, widest = 0, values
    while reach < radius:  # each round joins two windows that overlap, and so at most doubles the reach
        step = min(radius - reach, reach + 1) if reach else 1
        moved = np.pad(widest, [(step, step) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        length = values.shape[axis]
        ahead, behind = (np.take(moved, range(start, start + length), axis) for start in (2 * step, 0))
        widest = np.maximum(np.maximum(ahead, behind), widest)
        reach += step
    return widest
