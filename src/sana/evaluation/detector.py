"""Reads the drawn world back from pixels, exactly and without learning.

A picture is plain paper with things on it. What is neither paper nor shadow is ink; connected ink is a candidate, and a
candidate is a thing if it has one colour of the palette all over, a sharp outline, and the silhouette of a kind.

Legend: H W picture size, h w size of a candidate's window. Pictures are uint8 [H, W, 3], sRGB; colours are floats, 0 to 255;
coordinates are pixels, x to the right and y downwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana.data.cutouts import COLOURS, SHADOW_OPACITY, Scene
from sana.errors import InvalidInput
from sana.evaluation.blobs import Mask, grown, label
from sana.evaluation.silhouettes import Floats, match

# The limits lie between what true, reconstructed, wobbling and slightly blurred scenes show and what noise, strong blurs,
# half-blends and strange shapes show; the measured ends of both are given where they are not far apart.
FRAME, MAX_FRAME_SPREAD = 4, 14.0
INK = 32.0
"""Distance from paper and shadow at which ink begins; a shadow deviates by less, half-covered brown, the darkest, by 39."""
DEEPEST_SHADE = 1.2 * SHADOW_OPACITY
MIN_AREA = 300
"""Pixels; the smallest thing has a thousand."""
MAX_CANDIDATES = 40
NEAR = 40.0
"""Distance within which a pixel has a palette colour. Two colours are 83 apart; red half-blended with paper is 46 from pink."""
MIN_SOLID = 0.55
"""Least share of pixels with the colour itself: 0.69 and more after a blur of sigma 1.5, 0.6 and less after sigma 12."""
FOREIGN, MAX_FOREIGN = 60.0, 0.1
MAX_EDGE = 5.0
"""Widest outline in pixels: 2.5 and less after a blur of sigma 1.5, 11 and more after sigma 12."""
MIN_OVERLAP, MIN_LEAD = 0.84, 0.05
"""Least overlap with a kind, and its lead over the next: 0.89 and 0.16 in reconstructions; a rectangle overlaps a fish by 0.82."""

PLACE_TOLERANCE = 8.0

_NAMES = tuple(COLOURS)
_PALETTE = np.asarray(list(COLOURS.values()), np.float32)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A thing that was found, its bounding box in pixels, and how well its silhouette fits (0 to 1)."""

    kind: str
    colour: str
    left: float
    top: float
    right: float
    bottom: float
    confidence: float

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (x, y)."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the box."""
        return self.right - self.left, self.bottom - self.top


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """Connected ink: the picture's pixels in its window, which of them belong to it, and where the window lies."""

    pixels: Floats
    own: Mask
    ink: Mask
    left: int
    top: int


def detect(picture: NDArray[np.uint8]) -> list[Detection]:
    """Find the things of a picture, uint8 [H, W, 3], the best fitting first.

    Raises:
        InvalidInput: the array is not such a picture.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or min(picture.shape) < 1:
        raise InvalidInput(f"A picture must be uint8 [H, W, 3] but is {picture.dtype} {list(picture.shape)}. Convert it.")
    pixels = picture.astype(np.float32)
    inside = np.zeros(picture.shape[:2], bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    frame = pixels[~inside]
    paper = np.median(frame, axis=0)
    if np.abs(frame - paper).mean() > MAX_FRAME_SPREAD:
        return []
    found = []
    for candidate in _candidates(pixels, _ink(pixels, paper)):
        whole = _read(candidate, paper)
        # Two things may come so close that the bridged gap joins them; a boat's parts are read only as a whole.
        found += [whole] if whole else [part for part in (_read(c, paper) for c in _pieces(candidate)) if part]
    return sorted(found, key=lambda detection: -detection.confidence)


def _ink(pixels: Floats, paper: Floats) -> Mask:
    """What is neither paper nor paper in shadow, [H, W]."""
    light = np.clip(pixels @ (paper / max(float(paper @ paper), 1.0)), 1 - DEEPEST_SHADE, 1.1)
    rest: Mask = np.square(pixels - light[..., None] * paper).sum(-1) > INK**2
    return rest


def _candidates(pixels: Floats, ink: Mask) -> Iterator[_Candidate]:
    """Yield connected ink; gaps of up to two pixels are bridged, because a blur may cut a boat's mast."""
    return _parts(pixels, ink, grown(ink))


def _pieces(candidate: _Candidate) -> Iterator[_Candidate]:
    """Yield the connected ink of a candidate without bridges, if that is more than one piece."""
    labels, count = label(candidate.ink)
    if count < 2:
        return
    for part in _parts(candidate.pixels, candidate.ink, candidate.ink, labels, count):
        yield dataclasses.replace(part)


def is_read_right(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether the detections are the scene's things, one for one: kind, colour, and place within `PLACE_TOLERANCE`."""
    left = list(found)
    for thing in scene.things:
        for detection in left:
            x, y = detection.centre
            same = (detection.kind, detection.colour) == (thing.kind, thing.colour)
            if same and abs(x - thing.x) <= PLACE_TOLERANCE and abs(y - thing.y) <= PLACE_TOLERANCE:
                left.remove(detection)
                break
        else:
            return False
    return not left
