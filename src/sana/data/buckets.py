"""Aspect-ratio buckets: the published shapes that pictures are trained at, and the way of a picture into its shape.

A table maps height:width ratios to (height, width); the entry whose ratio is nearest wins, by plain difference. All
tables but that of 2880 are the one of 1024, scaled; at 256 only those shapes remain whose sides are whole latents of
32 pixels. Legend: h, w in pixels, always in the order (height, width), but for PIL's own sizes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

Table = Mapping[float, tuple[int, int]]
Small = Literal["refuse", "skip", "upscale"]
"""What becomes of a picture that does not cover its bucket: nothing is trained, it is left out, or it is enlarged."""
STEP = 32
"""Pixels of a latent; every side of a bucket is a multiple."""
LANCZOS_PIXELS = (5 * 2**19, 12 * 10**6)
"""Areas that the published transform makes with Lanczos instead of bicubic: the tables of 2048 and 2880."""

_UP_TO_SQUARE: dict[int, dict[float, tuple[int, int]]] = {
    1024: {
        0.25: (512, 2048),
        0.26: (512, 1984),
        0.27: (512, 1920),
        0.28: (512, 1856),
        0.32: (576, 1792),
        0.33: (576, 1728),
        0.35: (576, 1664),
        0.4: (640, 1600),
        0.42: (640, 1536),
        0.48: (704, 1472),
        0.5: (704, 1408),
        0.52: (704, 1344),
        0.57: (768, 1344),
        0.6: (768, 1280),
        0.68: (832, 1216),
        0.72: (832, 1152),
        0.78: (896, 1152),
        0.82: (896, 1088),
        0.88: (960, 1088),
        0.94: (960, 1024),
        1.0: (1024, 1024),
    },
    2880: {
        0.25: (1408, 5760),
        0.26: (1408, 5568),
        0.27: (1408, 5376),
        0.28: (1408, 5184),
        0.32: (1600, 4992),
        0.33: (1600, 4800),
        0.34: (1600, 4672),
        0.4: (1792, 4480),
        0.42: (1792, 4288),
        0.47: (1920, 4096),
        0.49: (1920, 3904),
        0.51: (1920, 3776),
        0.55: (2112, 3840),
        0.59: (2112, 3584),
        0.68: (2304, 3392),
        0.72: (2304, 3200),
        0.78: (2496, 3200),
        0.83: (2496, 3008),
        0.89: (2688, 3008),
        0.93: (2688, 2880),
        1.0: (2880, 2880),
    },
}
_UPRIGHT_KEYS = {
    1024: (1.07, 1.13, 1.21, 1.29, 1.38, 1.46, 1.67, 1.75, 2.0, 2.09, 2.4, 2.5, 2.89, 3.0, 3.11, 3.62, 3.75, 3.88, 4.0),
    2880: (
        1.07,
        1.12,
        1.21,
        1.28,
        1.39,
        1.47,
        1.7,
        1.82,
        2.03,
        2.13,
        2.39,
        2.5,
        2.92,
        3.0,
        3.12,
        3.68,
        3.82,
        3.95,
        4.0,
    ),
}
"""Keys of the upright shapes, which are the lying ones turned; each table lacks one of them."""
_NOT_TURNED = {1024: (0.52,), 2880: (0.51,)}


def _whole(base: int) -> dict[float, tuple[int, int]]:
    lying = _UP_TO_SQUARE[base]
    turned = [(w, h) for key, (h, w) in reversed(lying.items()) if key < 1 and key not in _NOT_TURNED[base]]
    return lying | dict(zip(_UPRIGHT_KEYS[base], turned, strict=True))


def _scaled(factor: float) -> dict[float, tuple[int, int]]:
    return {key: (int(h * factor), int(w * factor)) for key, (h, w) in _whole(1024).items()}


TABLES: dict[int, Table] = {
    256: {key: size for key, size in _scaled(0.25).items() if not (size[0] % STEP or size[1] % STEP)},
    512: _scaled(0.5),
    1024: _whole(1024),
    2048: _scaled(2),
    2880: _whole(2880),
    4096: _scaled(4),
}
"""Base size -> ratio -> (height, width)."""


def nearest(table: Table, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) whose key is nearest to the ratio asked for, the first of two equally near ones."""
    ratio = height / width
    return table[min(table, key=lambda key: abs(key - ratio))]


def bucket_for(width: int, height: int, base: int, *, aspect: bool = True) -> tuple[int, int]:
    """Return the bucket (height, width) of a picture of this size.

    Args:
        base: side of the square bucket; decides the table.
        aspect: whether there are other buckets than the square one, which also allows other bases.

    Raises:
        InvalidInput: no table is published for `base`, or its square has no whole latents.
    """
    if not aspect:
        if base < STEP or base % STEP:
            raise InvalidInput(f"A square bucket has a side that is a multiple of {STEP}, not {base}.")
        return base, base
    if base not in TABLES:
        known = ", ".join(map(str, TABLES))
        raise InvalidInput(f"No buckets are published for {base} pixels, only for {known}. Take one, or squares alone.")
    return nearest(TABLES[base], height, width)


def enlargement(width: int, height: int, bucket: tuple[int, int]) -> float:
    """Return by how much a picture is enlarged to cover its bucket (height, width); up to 1 it is not."""
    return max(bucket[0] / height, bucket[1] / width)


def fitted_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Return the (height, width) to which a picture is resized so that it covers the target, before the centre crop."""
    ratio = max(target_height / height, target_width / width)
    # Rounding may end a hair below the target, which must stay covered.
    return max(int(height * ratio), target_height), max(int(width * ratio), target_width)


def cut(picture: "Image", height: int, width: int, *, upscale: bool = False) -> "Image":
    """Return the picture resized until it just covers a bucket and cut to it around the centre.

    Raises:
        InvalidInput: it would have to be enlarged, and `upscale` does not allow it.
    """
    from PIL.Image import Resampling

    if picture.size == (width, height):
        return picture
    if not upscale and enlargement(picture.width, picture.height, (height, width)) > 1:
        raise InvalidInput(
            f"A picture of {picture.width} x {picture.height} does not cover its bucket of {width} x {height} pixels"
            " (width x height). Train at a smaller size, leave small pictures out, or let them be enlarged."
        )
    high, wide = fitted_size(picture.height, picture.width, height, width)
    is_large = LANCZOS_PIXELS[0] < height * width < LANCZOS_PIXELS[1]
    resized = picture.resize((wide, high), Resampling.LANCZOS if is_large else Resampling.BICUBIC)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    return resized.crop((left, top, left + width, top + height))
