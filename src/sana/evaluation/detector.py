"""Reads the drawn world back from pixels, exactly and without learning.

A picture is plain paper with things on it. What is neither paper nor shadow is ink; connected ink is a candidate; a candidate is
a thing if it is of one palette colour all over, if its outline is sharp, and if its silhouette fits that of a kind.

Legend: H W picture size; K candidates; T templates; S side of a normalised silhouette; coordinates in pixels, x to the
right and y downwards; pictures are uint8 [H, W, 3], sRGB.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana.data.cutouts import COLOURS, SHADOW_OPACITY, Scene, Thing, silhouette
from sana.data.cutout_shapes import KINDS
from sana.errors import InvalidInput
from sana.evaluation.blobs import grown, label

Floats = NDArray[np.float32]

SIDE = 48
AREA_SIDE = 22.0
"""A normalised silhouette is scaled so that its area is this square's."""

FRAME = 4
MAX_PAPER_SPREAD = 14.0
INK = 32.0
MIN_AREA, MAX_BLOBS = 300, 40
NEAR_PALETTE = 40.0
MIN_SOLID = 0.5
MAX_FOREIGN = 0.12
MAX_EDGE = 5.0
MIN_MATCH, MIN_MARGIN = 0.8, 0.02
TURNS = (-8.0, -4.0, 0.0, 4.0, 8.0)
STRETCHES = (0.94, 1.0, 1.06)

_PALETTE = np.asarray(list(COLOURS.values()), np.float32)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """A thing that was found, its bounding box, and how well its silhouette fits (0 to 1)."""

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
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise InvalidInput(f"A picture is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}.")
    pixels = picture.astype(np.float32)
    frame = np.concatenate([pixels[:FRAME].reshape(-1, 3), pixels[-FRAME:].reshape(-1, 3), pixels[:, :FRAME].reshape(-1, 3), pixels[:, -FRAME:].reshape(-1, 3)])
    paper = np.median(frame, axis=0)
    if np.abs(frame - paper).mean() > MAX_PAPER_SPREAD:
        return []
    found = [read for blob in _blobs(pixels, paper) if (read := _read(blob, paper)) is not None]
    return sorted(found, key=lambda detection: -detection.confidence)


@dataclass(frozen=True, kw_only=True)
class _Blob:
    """A candidate: the pixels of its window, which of them are its own, and where the window lies."""

    pixels: Floats
    own: NDArray[np.bool_]
    left: int
    top: int


def ink_of(pixels: Floats, paper: Floats) -> NDArray[np.bool_]:
    norm = float(paper @ paper)
    along = pixels @ paper / norm
    shade = np.clip(along, 1 - SHADOW_OPACITY * 1.2, 1.1)
    distance = np.square(pixels - shade[..., None] * paper).sum(-1)
    return distance > INK**2


def _blobs(pixels: Floats, paper: Floats) -> Iterator[_Blob]:
    """Connected ink; gaps of up to two pixels do not separate (a boat's mast may be thinner than a blur)."""
    ink = ink_of(pixels, paper)
    labels, count = label(grown(ink))
    areas = np.bincount(labels[ink], minlength=count + 1)
    for number in np.argsort(-areas, kind="stable")[:MAX_BLOBS]:
        if number == 0 or areas[number] < MIN_AREA:
            continue
        inside = labels == number
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        window = slice(top, bottom), slice(left, right)
        yield _Blob(pixels=pixels[window], own=inside[window], left=int(left), top=int(top))


def features(blob, paper):
    flat = blob.pixels[blob.own]
    distances = np.linalg.norm(flat[:, None] - _PALETTE, axis=2)
    near = distances < NEAR_PALETTE
    votes = near.sum(0)
    c = int(votes.argmax())
    line = _PALETTE[c] - paper
    rel = blob.pixels - paper
    alpha = (rel @ line) / float(line @ line)
    alpha = np.where(blob.own, alpha, 0)
    mask = alpha > 0.5
    area = int(mask.sum())
    if area < MIN_AREA: return None
    solid = votes[c] / area
    # foreign: neither on the line paper..colour
    off = np.linalg.norm(rel - np.clip(alpha, 0, 1.2)[..., None] * line, axis=2)
    ink = ink_of(blob.pixels, paper) & blob.own
    foreign = ((off > 60) & ink).sum() / area
    pad = np.pad(mask, 1)
    inner = pad[1:-1,1:-1] & pad[:-2,1:-1] & pad[2:,1:-1] & pad[1:-1,:-2] & pad[1:-1,2:]
    perimeter = int((mask & ~inner).sum())
    band = int(((alpha > 0.4) & (alpha < 0.8)).sum())
    core = np.median(blob.pixels[mask], axis=0)
    cd = float(np.linalg.norm(core - _PALETTE[c]))
    soft = np.clip((alpha - 0.3) / 0.4, 0, 1).astype(np.float32)
    norm = normalised(soft)
    scores = _match(norm)
    return dict(colour=list(COLOURS)[c], area=area, solid=solid, foreign=foreign, edge=band / perimeter, cd=cd, scores=scores, alpha=alpha, votes=votes)

def normalised(cover: Floats) -> Floats:
    """A silhouette, coverage [h, w], moved and scaled to unit centroid and area: [S, S]."""
    total = float(cover.sum())
    ys, xs = np.arange(cover.shape[0]) + 0.5, np.arange(cover.shape[1]) + 0.5
    y, x = float(cover.sum(1) @ ys) / total, float(cover.sum(0) @ xs) / total
    half = SIDE / 2 * total**0.5 / AREA_SIDE
    margin = int(2 * half) + 1
    patch = Image.fromarray(np.pad(cover, margin))
    box = (x + margin - half, y + margin - half, x + margin + half, y + margin + half)
    return np.asarray(patch.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))


@functools.cache
def templates():
    names, rows = [], []
    for kind in KINDS:
        for turn in TURNS:
            cover, _, _ = silhouette(Thing(kind=kind, colour="red", x=100.0, y=100.0, radius=52.0, turn=turn))
            for c in (cover, cover[:, ::-1]):
                names.append(kind); rows.append(normalised(np.ascontiguousarray(c)).ravel())
    return names, np.stack(rows)

def _match(norm):
    names, T = templates()
    v = norm.ravel()
    inter = T @ v
    iou = inter / ((T * T).sum(1) + v @ v - inter)
    best = {}
    for n, s in zip(names, iou): best[n] = max(best.get(n, 0), float(s))
    return sorted(best.items(), key=lambda p: -p[1])
def _read(blob, paper): return None
