"""GenEval's rules: whether detections are what a prompt asks for (Ghosh et al. 2023, arXiv 2310.11513).

A thing is found or it is not, so the rules' thresholds of confidence have no counterpart here; confidence only orders.
Coordinates are pixels, x to the right and y downwards.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from sana.data.cutouts import Relation
from sana.evaluation.detector import Detection
from sana.evaluation.prompts import Clause

MAX_PER_KIND = 16
SHRINK = 0.1
"""Share of the two boxes' sizes by which an offset is shortened before it counts."""
DIRECTION = 0.5
"""What remains of the offset, over its whole length, must exceed this: within about 60 degrees of the axis."""


class Boxed(Protocol):
    """Anything with a centre (x, y) and a size (width, height)."""

    @property
    def centre(self) -> tuple[float, float]: ...
    @property
    def size(self) -> tuple[float, float]: ...


def relations(one: Boxed, other: Boxed) -> set[Relation]:
    """Where `one` lies as seen from `other`: no relation, one, or two."""
    offset = [a - b for a, b in zip(one.centre, other.centre, strict=True)]
    slack = [SHRINK * (a + b) for a, b in zip(one.size, other.size, strict=True)]
    rest = [math.copysign(max(abs(d) - s, 0.0), d) for d, s in zip(offset, slack, strict=True)]
    if all(abs(d) < 1e-3 for d in rest):
        return set()
    x, y = (d / math.hypot(*offset) for d in rest)
    holds: dict[Relation, bool] = {
        "left": x < -DIRECTION,
        "right": x > DIRECTION,
        "above": y < -DIRECTION,
        "below": y > DIRECTION,
    }
    return {relation for relation, true in holds.items() if true}


def is_right(found: Sequence[Detection], include: Sequence[Clause], exclude: Sequence[Clause] = ()) -> bool:
    """Whether detections, best first, fulfil every clause of `include` and none of `exclude`."""
    kept: list[Sequence[Detection]] = []
    for clause in include:
        # Only the most confident are looked at: a further thing in the right colour does not help.
        things = _of_kind(found, clause.kind)[: clause.count]
        kept.append(things)
        if len(things) < clause.count:
            return False
        if clause.colour is not None and any(thing.colour != clause.colour for thing in things):
            return False
        if clause.relation is not None:
            pairs = [(thing, target) for thing in things for target in kept[clause.target]]
            if any(clause.relation not in relations(thing, target) for thing, target in pairs):
                return False
    return not any(len(_of_kind(found, clause.kind)) >= clause.count for clause in exclude)


def _of_kind(found: Sequence[Detection], kind: str) -> Sequence[Detection]:
    return [detection for detection in found if detection.kind == kind][:MAX_PER_KIND]
