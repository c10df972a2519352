"""Reads the drawn world back from pixels, exactly and without learning.

A picture is plain paper with things on it. What is neither paper nor shadow is ink; connected ink is a candidate, and a
candidate is a thing if it has one colour of the palette all over, a sharp outline, and the silhouette of a kind.

Legend: H W picture size. Pictures are uint8 [H, W, 3], sRGB; colours are floats, 0 to 255; coordinates are pixels, x to
the right and y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sana.data.cutouts import COLOURS, SHADOW_OPACITY, Scene
from sana.errors import InvalidInput
from sana.evaluation.blobs import Mask, grown, label
from sana.evaluation.silhouettes import Floats, match

# Each limit lies between what true, reconstructed and slightly blurred scenes show and what noise, strong blurs,
# half-blends and other shapes show; both ends, as measured over hundreds of pictures, are given where they matter.
FRAME, MAX_FRAME_SPREAD = 4, 14.0
"""Width of the frame that shows the paper, and its largest mean deviation, as of noise of sigma 17."""
INK = 32.0
"""Distance from paper, lit or in shadow, at which ink begins; half-covered brown, the faintest, is 39 away."""
DEEPEST_SHADE = 1.2 * SHADOW_OPACITY
BRIDGE = 2
"""Pixels by which ink is grown before it is joined: a boat that lost its mast stays whole; things are 14 apart."""
MIN_AREA, MAX_CANDIDATES = 300, 40
"""Pixels of the smallest candidate (the smallest thing has a thousand), and how many are looked at."""
NEAR = 40.0
"""Distance within which a pixel has a palette colour: two colours are 83 apart, red half-blended with paper is 46 from
pink."""
MAX_HALO = 4.2
"""Most ink of another colour, in pixels per pixel of outline: 3.1 in reconstructions and 3.5 after a blur of sigma 1.5;
11 and more after sigma 12, and most half-blends whose shape would pass have more than 4.7."""
MIN_OVERLAP, MIN_LEAD = 0.84, 0.05
"""Least overlap with a kind, and its lead over the next: 0.89 and 0.16 in reconstructions; a rectangle overlaps a fish
by 0.82, a pentagon a flower by 0.86 with a lead of 0.04."""

PLACE_TOLERANCE = 10.0
"""Pixels between a thing's given centre and that of its box; the moon's differ by 9 from the start."""

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


def detect(picture: NDArray[np.uint8]) -> list[Detection]:
    """Find the things of a picture, uint8 [H, W, 3], the best fitting first.

    Raises:
        InvalidInput: the array is not such a picture.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or min(picture.shape[:2]) <= 2 * FRAME:
        given = f"{picture.dtype} {list(picture.shape)}"
        raise InvalidInput(f"A picture must be uint8 [H, W, 3], larger than its frame, but is {given}. Convert it.")
    pixels = picture.astype(np.float32)
    outside = np.ones(picture.shape[:2], bool)
    outside[FRAME:-FRAME, FRAME:-FRAME] = False
    paper = np.median(pixels[outside], axis=0)
    if np.abs(pixels[outside] - paper).mean() > MAX_FRAME_SPREAD:
        return []
    ink = _ink(pixels, paper)
    joined = ink
    for _ in range(BRIDGE):
        joined = grown(joined)
    labels, count = label(joined)
    areas = np.bincount(labels[ink], minlength=count + 1)
    found = []
    for number in np.argsort(-areas, kind="stable")[:MAX_CANDIDATES]:
        if areas[number] >= MIN_AREA:
            read = _read(pixels, labels == number, ink, paper)
            found += [read] if read else []
    return sorted(found, key=lambda detection: -detection.confidence)


def _ink(pixels: Floats, paper: Floats) -> Mask:
    """What is neither paper nor paper in shadow, [H, W]."""
    light = np.clip(pixels @ (paper / max(float(paper @ paper), 1.0)), 1 - DEEPEST_SHADE, 1.1)
    # A product with ones is several times faster than a sum over an axis of three.
    rest: Mask = np.square(pixels - light[..., None] * paper) @ np.ones(3, np.float32) > INK**2
    return rest


def _read(pixels: Floats, own: Mask, ink: Mask, paper: Floats) -> Detection | None:
    """Read one candidate, whose pixels are `own`, or refuse it."""
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    own, ink, relative = own[window], ink[window] & own[window], pixels[window] - paper
    votes = (_squared_distances(pixels[window][own]) < NEAR**2).sum(0)
    colour = int(votes.argmax())
    line = _PALETTE[colour] - paper
    alpha = (relative @ (line / max(float(line @ line), 1.0))) * own
    body = alpha > 0.5
    if body.sum() < MIN_AREA or ink.sum() - votes[colour] > MAX_HALO * _perimeter(body):
        return None
    # A shadow, seen as a little brown, reaches 0.32.
    overlaps = match(np.clip((alpha - 0.3) / 0.4, 0, 1))
    (kind, best), (_, second) = list(overlaps.items())[:2]
    if best < MIN_OVERLAP or best - second < MIN_LEAD:
        return None
    return _detection(kind, _NAMES[colour], best, body, left=int(columns[0]), top=int(rows[0]))


def _squared_distances(pixels: Floats) -> Floats:
    """Of pixels, [n, 3], to the colours of the palette, [n, 8]."""
    ones = np.ones(3, np.float32)
    return (np.square(pixels) @ ones)[:, None] - 2 * pixels @ _PALETTE.T + np.square(_PALETTE) @ ones


def _perimeter(body: Mask) -> int:
    """How many pixels of a body have a side outside it."""
    wide = np.pad(body, 1)
    inner = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return int((body & ~inner).sum())


def _detection(kind: str, colour: str, overlap: float, body: Mask, *, left: int, top: int) -> Detection:
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    return Detection(
        kind=kind,
        colour=colour,
        left=float(left + columns[0]),
        top=float(top + rows[0]),
        right=float(left + columns[-1] + 1),
        bottom=float(top + rows[-1] + 1),
        confidence=overlap,
    )


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
