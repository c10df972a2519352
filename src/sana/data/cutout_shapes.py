"""The outlines of the paper cut-outs: unit polygons in [-1, 1]^2, y downwards.

A shape is a list of cuts made in order: `(True, polygon)` adds paper, `(False, polygon)` takes it away.
"""

import math
from collections.abc import Callable

Polygon = list[tuple[float, float]]
Shape = list[tuple[bool, Polygon]]


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> Polygon:
    points = max(8, int(64 * (end - start) / 360))
    angles = [math.radians(start + (end - start) * i / points) for i in range(points + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _fish() -> Shape:
    tail = [(0.32, 0.0), (0.98, -0.6), (0.84, 0.0), (0.98, 0.6)]
    return [(True, _ellipse(-0.22, 0, 0.76, 0.54)), (True, tail), (False, _ellipse(-0.56, -0.12, 0.11, 0.11))]


def _boat() -> Shape:
    hull = [(-0.98, 0.38), (0.98, 0.38), (0.58, 0.92), (-0.6, 0.92)]
    sails = [[(-0.1, -0.95), (-0.1, 0.24), (-0.8, 0.24)], [(0.06, -0.7), (0.06, 0.24), (0.72, 0.24)]]
    return [(True, hull), *((True, sail) for sail in sails), (True, _box(-0.1, -0.95, 0.06, 0.4))]


def _house() -> Shape:
    roof = [(0.0, -0.95), (0.98, -0.08), (-0.98, -0.08)]
    return [
        (True, _box(-0.72, -0.12, 0.72, 0.92)),
        (True, roof),
        (True, _box(0.42, -0.85, 0.66, -0.2)),
        (False, _box(-0.18, 0.34, 0.2, 0.93)),
    ]


def _tree() -> Shape:
    tiers = ((-0.98, -0.3, 0.5), (-0.6, 0.16, 0.66), (-0.2, 0.62, 0.82))
    cuts: Shape = [(True, [(0.0, top), (half, bottom), (-half, bottom)]) for top, bottom, half in tiers]
    return [*cuts, (True, _box(-0.16, 0.6, 0.16, 0.98))]


def _sun() -> Shape:
    rays: Shape = []
    for i in range(10):
        tip, side = math.pi * i / 5, 0.2
        corners = [(0.98, tip), (0.56, tip + side), (0.56, tip - side)]
        rays.append((True, [(r * math.cos(a), r * math.sin(a)) for r, a in corners]))
    return [(True, _ellipse(0, 0, 0.56, 0.56)), *rays]


def _star() -> Shape:
    angles = [math.radians(-90 + 36 * i) for i in range(10)]
    return [
        (True, [((0.98, 0.42)[i % 2] * math.cos(a), (0.98, 0.42)[i % 2] * math.sin(a)) for i, a in enumerate(angles)])
    ]


def _heart() -> Shape:
    angles = [2 * math.pi * i / 96 for i in range(96)]
    heights = [
        0.78 * math.cos(a) - 0.3 * math.cos(2 * a) - 0.12 * math.cos(3 * a) - 0.06 * math.cos(4 * a) for a in angles
    ]
    return [(True, [(0.98 * math.sin(a) ** 3, -0.1 - h) for a, h in zip(angles, heights, strict=True)])]


def _cat() -> Shape:
    ear = [(-0.84, -0.98), (-0.84, 0.14), (-0.12, -0.46)]
    eyes: Shape = [(False, _ellipse(side * 0.34, 0.08, 0.12, 0.15)) for side in (-1, 1)]
    nose = [(-0.12, 0.36), (0.12, 0.36), (0.0, 0.52)]
    return [(True, _ellipse(0, 0.22, 0.88, 0.72)), (True, ear), (True, [(-x, y) for x, y in ear]), *eyes, (False, nose)]


def _flower() -> Shape:
    angles = [math.pi * (2 * i / 5 - 0.5) for i in range(5)]
    petals: Shape = [(True, _ellipse(0.57 * math.cos(a), 0.57 * math.sin(a), 0.39, 0.39)) for a in angles]
    return [(True, _ellipse(0, 0, 0.5, 0.5)), *petals, (False, _ellipse(0, 0, 0.25, 0.25))]


def _moon() -> Shape:
    return [(True, _ellipse(-0.02, 0, 0.94, 0.94)), (False, _ellipse(0.42, -0.14, 0.74, 0.76))]


def _mushroom() -> Shape:
    stem = [(-0.28, 0.0), (0.28, 0.0), (0.4, 0.94), (-0.4, 0.94)]
    dots: Shape = [(False, _ellipse(-0.42, -0.3, 0.17, 0.17)), (False, _ellipse(0.26, -0.46, 0.2, 0.2))]
    return [(True, _ellipse(0, 0.08, 0.98, 1.02, 180, 360)), (True, stem), *dots]


def _umbrella() -> Shape:
    dome = _ellipse(0, 0.0, 0.98, 0.94, 180, 360)
    scallops: Shape = [(False, _ellipse(cx, 0.02, 0.3, 0.2)) for cx in (-0.66, 0.0, 0.66)]
    hook = [(True, _ellipse(0.2, 0.68, 0.28, 0.28, 0, 180)), (False, _ellipse(0.2, 0.66, 0.12, 0.12, 0, 180))]
    return [(True, dome), *scallops, (True, _box(-0.08, -0.4, 0.08, 0.7)), *hook]


KINDS: dict[str, Callable[[], Shape]] = {
    "fish": _fish,
    "boat": _boat,
    "house": _house,
    "tree": _tree,
    "sun": _sun,
    "star": _star,
    "heart": _heart,
    "cat": _cat,
    "flower": _flower,
    "moon": _moon,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
}
