"""The drawn world: paper cut-outs on plain paper, with everything about a scene known exactly.

A scene holds one to four things. It is a pure function of a `random.Random`, its picture is a pure function of the
scene, and the words for it are made in `cutout_captions`. Some combinations are held out (`is_held_out`): training
never draws them.

Coordinates are pixels of a 256 x 256 picture, x to the right and y downwards; a thing's radius is half its bounding
square.
"""

import functools
import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sana.data.cutout_shapes import KINDS, Shape

SIZE = 256
WORLD = 1
"""Version of shapes, scenes and captions; raised when a seed no longer gives the same ones."""
SUPERSAMPLE = 4
SHADOW_OFFSET = (3, 4)
SHADOW_OPACITY = 0.22

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 44),
    "orange": (242, 124, 18),
    "yellow": (248, 206, 30),
    "green": (38, 150, 72),
    "blue": (34, 92, 208),
    "purple": (126, 54, 168),
    "pink": (240, 116, 176),
    "brown": (118, 72, 42),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "cream": (250, 243, 226),
    "sky": (212, 230, 244),
    "mint": (216, 240, 222),
    "grey": (226, 226, 230),
}
Relation = Literal["left", "right", "above", "below"]
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
RADII: dict[str, tuple[float, float]] = {"small": (29.0, 32.0), "medium": (37.0, 41.0), "large": (47.0, 52.0)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` equal things: what one noun phrase names."""

    kind: str
    colour: str
    count: int = 1
    size: str = "medium"


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One cut-out: its kind, colour, centre and radius (pixels), and turn (degrees)."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn (`things`) and what may be said of it (`groups`, `relation` of the first group to the second)."""

    groups: tuple[Group, ...]
    things: tuple[Thing, ...]
    relation: Relation | None
    background: str


# --- held-out combinations


def _share(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:6], "big") / 2**48


def is_held_out(groups: Sequence[Group], relation: Relation | None) -> bool:
    """Whether training must not draw this: 8 % of the colour-kind pairs, 5 % of the pairs of kinds, and 10 % each of
    the (kind, relation, kind) triples and of the pairs of coloured kinds."""
    if any(_share("paint", g.colour, g.kind) < 0.08 for g in groups):
        return True
    for first, second in itertools.pairwise(groups):
        kinds = sorted((first.kind, second.kind))
        if kinds[0] != kinds[1] and _share("together", *kinds) < 0.05:
            return True
        painted = sorted((f"{first.colour} {first.kind}", f"{second.colour} {second.kind}"))
        if _share("painted", *painted) < 0.10:
            return True
        if relation is not None:
            ends = (first.kind, second.kind) if relation in ("left", "above") else (second.kind, first.kind)
            axis = "across" if relation in ("left", "right") else "upright"
            if _share("place", axis, *ends) < 0.10:
                return True
    return False


# --- drawing scenes

ROW_3 = ((46.0, 128.0), (128.0, 128.0), (210.0, 128.0))
TRIANGLES = (((128.0, 74.0), (70.0, 182.0), (186.0, 182.0)), ((70.0, 74.0), (186.0, 74.0), (128.0, 182.0)))
SQUARE = ((72.0, 72.0), (184.0, 72.0), (72.0, 184.0), (184.0, 184.0))
PAIRS: dict[Relation, tuple[tuple[float, float], tuple[float, float]]] = {
    "left": ((68.0, 128.0), (188.0, 128.0)),
    "above": ((128.0, 68.0), (128.0, 188.0)),
}


def _places(groups: tuple[Group, ...], relation: Relation | None, rng: random.Random) -> list[tuple[float, float]]:
    """Centres for the things of the groups, in order. Rows of three hold small things only: others would touch."""
    counts = tuple(group.count for group in groups)
    if counts == (1,):
        return [(rng.uniform(92, 164), rng.uniform(92, 164))]
    if counts == (2,):
        return list(PAIRS[rng.choice(("left", "above"))])
    if counts == (4,):
        return list(SQUARE)
    if sum(counts) == 3 and len(counts) != 2:
        all_small = all(group.size == "small" for group in groups)
        places = list(rng.choice((ROW_3, *TRIANGLES) if all_small else TRIANGLES))
        rng.shuffle(places)
        return places
    across = relation in ("left", "right")
    first, second = PAIRS["left" if across else "above"]
    if relation in ("right", "below"):
        first, second = second, first
    places = []
    for (x, y), count in zip((first, second), counts, strict=True):
        offsets = (0.0,) if count == 1 else (-56.0, 56.0)
        places += [(x, y + offset) if across else (x + offset, y) for offset in offsets]
    return places


SHAPES_OF_SCENES: tuple[tuple[tuple[int, ...], float], ...] = (
    ((1,), 0.22),
    ((1, 1), 0.40),
    ((2,), 0.07),
    ((3,), 0.09),
    ((4,), 0.08),
    ((2, 1), 0.05),
    ((1, 2), 0.03),
    ((1, 1, 1), 0.06),
)


def sample_scene(rng: random.Random, *, counts: tuple[int, ...] | None = None, held_out: bool = False) -> Scene:
    """Draw a scene: `counts` things per group (drawn if None); `held_out` chooses the side of the split."""
    if counts is None:
        shapes, weights = zip(*SHAPES_OF_SCENES, strict=True)
        counts = rng.choices(shapes, weights)[0]
    while True:
        kinds = rng.sample(list(KINDS), len(counts))
        colours = [rng.choice(list(COLOURS)) for _ in counts]
        allowed = ("small", "medium", "large") if counts in ((1,), (1, 1)) else ("small", "medium")
        sizes = [rng.choice(allowed) for _ in counts]
        relation: Relation | None = rng.choice(list(OPPOSITE)) if len(counts) == 2 else None
        groups = tuple(
            Group(kind=kind, colour=colour, count=count, size=size)
            for kind, colour, count, size in zip(kinds, colours, counts, sizes, strict=True)
        )
        if is_held_out(groups, relation) == held_out:
            return arrange(groups, relation, rng)


def arrange(groups: tuple[Group, ...], relation: Relation | None, rng: random.Random) -> Scene:
    """Place the things of `groups` (with `relation` between the first and the second) on a background drawn from
    `rng`.
    """
    places = _places(groups, relation, rng)
    slack = 8.0 if len(places) == 2 else 5.0
    things = []
    for group in groups:
        radius = rng.uniform(*RADII[group.size])
        for _ in range(group.count):
            x, y = places.pop(0)
            dx, dy, turn = rng.uniform(-slack, slack), rng.uniform(-slack, slack), rng.uniform(-8.0, 8.0)
            things.append(Thing(kind=group.kind, colour=group.colour, x=x + dx, y=y + dy, radius=radius, turn=turn))
    return Scene(groups=groups, things=tuple(things), relation=relation, background=rng.choice(list(BACKGROUNDS)))


# --- pictures


@functools.cache
def _shape(kind: str) -> Shape:
    return KINDS[kind]()


def silhouette(thing: Thing, margin: int = 0) -> tuple[NDArray[np.float32], int, int]:
    """Coverage in [0, 1] of a thing on a patch, and the patch's left and top pixel. Anti-aliased by box
    supersampling.
    """
    reach = math.ceil(thing.radius * 1.25) + margin
    left, top = math.floor(thing.x) - reach, math.floor(thing.y) - reach
    side = 2 * reach + 1
    patch = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE), 0)
    draw = ImageDraw.Draw(patch)
    cos, sin = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
    scale, cx, cy = thing.radius * SUPERSAMPLE, (thing.x - left) * SUPERSAMPLE, (thing.y - top) * SUPERSAMPLE
    for adds, polygon in _shape(thing.kind):
        points = [(cx + scale * (x * cos - y * sin), cy + scale * (x * sin + y * cos)) for x, y in polygon]
        draw.polygon(points, fill=255 if adds else 0)
    return np.asarray(patch.reduce(SUPERSAMPLE), dtype=np.float32) / 255.0, left, top


def _blend(
    canvas: NDArray[np.float32], cover: NDArray[np.float32], left: int, top: int, paint: NDArray[np.float32]
) -> None:
    """Lay `paint` over the canvas where the patch covers it; what falls outside the canvas is cut off."""
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + cover.shape[1], SIZE), min(top + cover.shape[0], SIZE)
    alpha = cover[y0 - top : y1 - top, x0 - left : x1 - left, None]
    canvas[y0:y1, x0:x1] += alpha * (paint - canvas[y0:y1, x0:x1])


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: uint8 [256, 256, 3], sRGB. Every thing casts a soft shadow down and to the right."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        cover, left, top = silhouette(thing, margin=4)
        soft = Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(2))
        shade = np.asarray(soft, dtype=np.float32) * (SHADOW_OPACITY / 255.0)
        _blend(canvas, shade, left + SHADOW_OFFSET[0], top + SHADOW_OFFSET[1], np.zeros(3, np.float32))
        _blend(canvas, cover, left, top, np.asarray(COLOURS[thing.colour], np.float32))
    return (canvas + 0.5).astype(np.uint8)
