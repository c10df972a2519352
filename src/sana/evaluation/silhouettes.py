"""Which kind a silhouette is of: overlap with drawn templates, whatever its place and size.

Legend: h w a patch; S side of a normalised silhouette; T templates. Coverage is 0 to 1 per pixel.
"""

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import Thing, silhouette

Floats = NDArray[np.float32]

SIDE = 48
AREA = 22.0**2
"""Area of a normalised silhouette in pixels: large enough for a cat's eyes, small enough for the moon's horns."""
TURNS = (-8.0, -4.0, 0.0, 4.0, 8.0)


def normalised(cover: Floats) -> Floats:
    """Move and scale a silhouette, coverage [h, w], so that its centroid is the middle and its area `AREA`: [S, S].

    Unlike the bounding box, both hardly change when a blur eats the tip of a ray.
    """
    total = float(cover.sum())
    x = float(cover.sum(0) @ (np.arange(cover.shape[1], dtype=np.float32) + 0.5)) / total
    y = float(cover.sum(1) @ (np.arange(cover.shape[0], dtype=np.float32) + 0.5)) / total
    half = SIDE / 2 * (total / AREA) ** 0.5
    margin = int(2 * half) + 1
    patch = Image.fromarray(np.pad(cover, margin))
    window = (x + margin - half, y + margin - half, x + margin + half, y + margin + half)
    return np.asarray(patch.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=window))


@functools.cache
def _templates() -> tuple[Floats, Floats]:
    """Every kind at every turn, also mirrored (a fish may swim the other way), [T, S·S], and squared norms [T]."""
    rows = []
    for kind in KINDS:
        for turn in TURNS:
            cover, _, _ = silhouette(Thing(kind=kind, colour="red", x=128.0, y=128.0, radius=52.0, turn=turn))
            rows += [normalised(cover).ravel(), normalised(np.ascontiguousarray(cover[:, ::-1])).ravel()]
    templates = np.stack(rows)
    return templates, np.square(templates).sum(1)


def match(cover: Floats) -> dict[str, float]:
    """Overlap of a silhouette, coverage [h, w], with each kind, best first.

    It is intersection over union, for coverages between 0 and 1 in the form of Tanimoto: a·b / (a·a + b·b - a·b).
    """
    templates, norms = _templates()
    found = normalised(cover).ravel()
    common = templates @ found
    overlap = (common / (norms + found @ found - common)).reshape(len(KINDS), -1).max(1)
    return {list(KINDS)[i]: float(overlap[i]) for i in np.argsort(-overlap, kind="stable")}
