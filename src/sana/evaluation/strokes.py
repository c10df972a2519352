"""The strokes of a control picture, and how well those of two pictures lie on each other.

Shapes: H W pixels. Pictures are uint8 [H, W, 3].
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana.engine.control_maps import Mask, control_map, thickened
from sana.errors import InvalidInput

STROKED = {"canny": False, "scribble": False, "ink": True}
"""Kinds of control pictures that consist of strokes and nothing else, and whether the strokes are dark."""


def control_picture(kind: str, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return what a control network of that kind sees of a picture: uint8 [H, W, 3].

    Raises:
        InvalidInput: control pictures of this kind do not consist of strokes.
    """
    if kind not in STROKED:
        raise InvalidInput(
            f"A control picture of kind {kind} has no strokes that could be found again. Those that have:"
            f" {', '.join(STROKED)}."
        )
    return np.asarray(control_map(kind, Image.fromarray(picture)))


def strokes(kind: str, picture: NDArray[np.uint8]) -> Mask:
    """Return the stroke pixels, [H, W], of a picture's control picture. Errors as there."""
    drawn = control_picture(kind, picture)[..., 0]
    mask: Mask = drawn < 128 if STROKED[kind] else drawn >= 128
    return mask


def overlap(one: Mask, other: Mask, tolerance: int = 0) -> float:
    """Return intersection over union of two masks, [H, W], whose pixels may miss each other by `tolerance` pixels.

    A pixel is met if the other mask has one no farther than that. With m, the mean of the two numbers of pixels that
    are met, and u, the number of pixels of both that are not, it is m / (m + u): the plain ratio for a tolerance of 0.
    Two empty masks agree.
    """
    met = [int((mine & thickened(theirs, tolerance)).sum()) for mine, theirs in ((one, other), (other, one))]
    total, mean = int(one.sum()) + int(other.sum()), sum(met) / 2
    return mean / (total - mean) if total else 1.0
