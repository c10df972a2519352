"""What control networks follow, made from pictures: edges, strokes and depth, white on black.

Shapes: H W pixels; arrays are [H, W] float32 unless said otherwise. Free of torch where no network is needed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]
ControlMap = Callable[[Image.Image], Image.Image]

SIDE = 1024
"""Short side of a picture to which the blurs below belong; they grow and shrink with it."""
CANNY_SIGMA = 2.0
"""Pixels of the blur that comes before thin edges."""
CANNY_LOW, CANNY_HIGH = 0.1, 0.25
"""Height of a step, of colours from 0 to 1, from which a pixel may belong to an edge, and from which it begins one."""
SOFT_SIGMAS = (1.0, 2.0, 4.0)
"""Pixels of the blurs whose slopes soft edges are made of."""
SOFT_FULL = 0.9985
"""Share of the pixels that lie below the step that is drawn white."""
SOFT_LEAST = 0.08
"""Least step that is drawn white, so that the noise of a flat picture stays dark."""
STROKE_SIGMA = 4.0
"""Pixels of the blur that comes before strokes: a hand leaves out what is small."""
STROKE_LOW, STROKE_HIGH = 0.1, 0.25
"""As for thin edges."""
STROKE_RADIUS, INK_RADIUS = 3, 8
"""Pixels from the middle of a stroke to its rim."""
_LEAST_SIGMA = 1.0
_EIGHTH = np.tan(np.pi / 8)


def control_map(kind: str, picture: Image.Image) -> Image.Image:
    """Return the control picture of a kind, RGB, in the size of the picture.

    Raises:
        InvalidInput: there is no such kind.
        ModelNotFound: a network that the kind needs is neither here nor to be had.
    """
    if kind not in CONTROL_MAPS:
        known = ", ".join(CONTROL_MAPS)
        raise InvalidInput(f"There is no control picture of kind '{kind}': {known}.{did_you_mean(kind, CONTROL_MAPS)}")
    return CONTROL_MAPS[kind](picture.convert("RGB"))


def canny(picture: Image.Image, low: float = CANNY_LOW, high: float = CANNY_HIGH) -> Image.Image:
    """Return thin white edges: where the slope is largest across the edge, and it is strong or touches what is.

    Where colours differ, the channel with the largest slope counts.
    Source: Canny 1986: blur, slope, non-maximum suppression, hysteresis.
    """
    return _picture(_thin(picture, CANNY_SIGMA, low, high))


def soft_edge(picture: Image.Image) -> Image.Image:
    """Return soft edges: the slope of the colours at several scales, the widest edges strongest.

    It needs no weights and looks like what a HED network gives, which knows better what an object is; kind "hed" is
    that network. Source: scale-normalised slopes, Lindeberg 1998, eq. 15, averaged.
    """
    return _picture(_soft(picture))


def scribble(picture: Image.Image) -> Image.Image:
    """Return strokes as by a pen, white or black and nothing between, along the edges of what is large."""
    lines = _thin(picture, STROKE_SIGMA, STROKE_LOW, STROKE_HIGH)
    return _picture(thickened(lines, max(1, round(STROKE_RADIUS * min(lines.shape) / SIDE))))


def ink(picture: Image.Image) -> Image.Image:
    """Return the edges as black strokes on white paper, as one would draw them with a felt pen.

    An autoencoder that has only seen light paper tells these apart, and white lines on black hardly: for small models.
    """
    lines = _thin(picture, CANNY_SIGMA, CANNY_LOW, CANNY_HIGH)
    return _picture(~thickened(lines, max(1, round(INK_RADIUS * min(lines.shape) / SIDE))))


def hed(picture: Image.Image) -> Image.Image:
    """Return the soft edges of the HED network, which published control networks were trained on. Errors as there."""
    from sana.engine.hed import load_hed, soft_edges

    return _picture(soft_edges(load_hed(), np.asarray(picture)))


def depth(picture: Image.Image, model: "str | Path | None" = None) -> Image.Image:
    """Return depth from a network, near is white. Errors as `engine.depth.load_depth`."""
    from sana.engine.depth import estimate, load_depth

    return _picture(estimate(load_depth(model), np.asarray(picture)))


def blurred(plane: Plane, sigma: float) -> Plane:
    """Blur with a Gaussian of `sigma` pixels; beyond the border the last pixel goes on."""
    reach = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        size = plane.shape[axis]
        width = [(reach, reach) if i == axis else (0, 0) for i in range(2)]
        padded = np.pad(plane, width, mode="edge")
        plane = np.zeros_like(plane)
        for shift, weight in enumerate(weights):
            plane += weight * (padded[shift : shift + size] if axis == 0 else padded[:, shift : shift + size])
    return plane


def slope(plane: Plane) -> tuple[Plane, Plane]:
    """Return the Sobel filter's answers to the right and downwards; a step of 1 gives 4."""
    p = np.pad(plane, 1, mode="edge")
    across = (p[:-2, 2:] - p[:-2, :-2]) + 2 * (p[1:-1, 2:] - p[1:-1, :-2]) + (p[2:, 2:] - p[2:, :-2])
    down = (p[2:, :-2] - p[:-2, :-2]) + 2 * (p[2:, 1:-1] - p[:-2, 1:-1]) + (p[2:, 2:] - p[:-2, 2:])
    return across, down


def is_ridge(strength: Plane, across: Plane, down: Plane) -> Mask:
    """Tell where `strength` is largest along the direction (across, down), which counts in steps of 45 degrees.

    Of equal neighbours the one to the right, or below, is taken.
    """
    p = np.pad(strength, 1)
    height, width = strength.shape

    def at(y: int, x: int) -> Plane:
        return p[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    right, below = np.abs(across), np.abs(down)
    falling = (across >= 0) == (down >= 0)
    directions = (
        (below <= _EIGHTH * right, 0, 1),
        (right < _EIGHTH * below, 1, 0),
        (falling, 1, 1),
        (~falling, 1, -1),
    )
    found = np.zeros(strength.shape, dtype=bool)
    free = np.ones(strength.shape, dtype=bool)
    for here, y, x in directions:
        found |= free & here & (strength >= at(-y, -x)) & (strength > at(y, x))
        free &= ~here
    return found & (strength > 0)


def grown(weak: Mask, strong: Mask) -> Mask:
    """Return the weak pixels that a chain of weak neighbours, corners included, joins to a strong one."""
    height, width = weak.shape
    stride = width + 2
    left = np.pad(weak, 1).ravel()
    kept = np.zeros_like(left)
    front = np.flatnonzero(np.pad(strong & weak, 1))
    steps = np.array([y * stride + x for y in (-1, 0, 1) for x in (-1, 0, 1)])
    while len(front):
        kept[front] = True
        left[front] = False
        around = (front[:, None] + steps).ravel()
        front = np.unique(around[left[around]])
    found: Mask = kept.reshape(height + 2, stride)[1:-1, 1:-1]
    return found


def thickened(lines: Mask, radius: int) -> Mask:
    """Return the pixels at most `radius` away from a line."""
    height, width = lines.shape
    padded = np.pad(lines, radius)
    out = np.zeros_like(lines)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if x * x + y * y <= radius * radius:
                out |= padded[radius + y : radius + y + height, radius + x : radius + x + width]
    return out


def _thin(picture: Image.Image, sigma: float, low: float, high: float) -> Mask:
    strength, across, down = _steps(picture, sigma)
    thin = np.where(is_ridge(strength, across, down), strength, 0)
    return grown(thin >= low, thin >= high)


def _soft(picture: Image.Image) -> Plane:
    total = sum((_steps(picture, sigma)[0] for sigma in SOFT_SIGMAS), np.float32(0)) / len(SOFT_SIGMAS)
    white = max(float(np.quantile(total, SOFT_FULL)), SOFT_LEAST)
    return np.minimum(total / white, 1)


def _steps(picture: Image.Image, sigma: float) -> tuple[Plane, Plane, Plane]:
    """Return how high a step in colour is, of colours from 0 to 1, and its direction: from the slopes after a blur.

    Of the three channels the one counts where the step is highest.
    """
    colours: NDArray[np.float32] = np.asarray(picture, dtype=np.float32) / np.float32(255)
    sigma = max(_LEAST_SIGMA, sigma * min(colours.shape[:2]) / SIDE)
    parts = [slope(blurred(colours[..., channel], sigma)) for channel in range(3)]
    slopes = np.stack([np.hypot(*part) for part in parts])
    best = slopes.argmax(axis=0)[None]
    across, down = (np.take_along_axis(np.stack(planes), best, 0)[0] for planes in zip(*parts, strict=True))
    # A blurred step is a Gaussian's integral; the filter, 8 on a slope of 1, adds a third to its variance.
    height = np.sqrt(2 * np.pi * (sigma**2 + 1 / 3)) / 8
    return np.take_along_axis(slopes, best, 0)[0] * np.float32(height), across, down


def _picture(plane: NDArray[Any]) -> Image.Image:
    """Return values from 0 to 1 as an RGB picture."""
    return Image.fromarray((plane * 255 + 0.5).astype(np.uint8)).convert("RGB")


CONTROL_MAPS: dict[str, ControlMap] = {
    "canny": canny,
    "scribble": scribble,
    "soft-edge": soft_edge,
    "ink": ink,
    "hed": hed,
    "depth": depth,
    "map": lambda picture: picture,
}
