"""Draw the twelve pictures that `sana train --demo` learns from: a thing that the built-in model has never seen.

Run from the repository: python recipes/demo/make_rockets.py FOLDER
"""

import math
import random
import sys
from pathlib import Path

from PIL import Image

from sana.data import cutouts
from sana.data.cutout_shapes import KINDS, Shape

SCENES: tuple[tuple[str, cutouts.Relation | None, str, str], ...] = (
    ("red", None, "", ""),
    ("yellow", None, "", ""),
    ("green", None, "", ""),
    ("blue", None, "", ""),
    ("purple", None, "", ""),
    ("orange", None, "", ""),
    ("pink", None, "", ""),
    ("brown", None, "", ""),
    ("blue", "left", "pink", "star"),
    ("yellow", "right", "brown", "tree"),
    ("green", "below", "yellow", "moon"),
    ("purple", "above", "orange", "cat"),
)
"""Colour of the rocket, and what it stands beside."""
WORDS = {"above": "above", "below": "below", "left": "to the left of", "right": "to the right of"}


def rocket() -> Shape:
    """A body with two fins, a flame and a window."""

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> list[tuple[float, float]]:
        turns = [2 * math.pi * i / 64 for i in range(64)]
        return [(cx + rx * math.cos(turn), cy + ry * math.sin(turn)) for turn in turns]

    fins = [[(side * 0.38, 0.1), (side * 0.9, 0.86), (side * 0.3, 0.6)] for side in (-1, 1)]
    flame = [(-0.2, 0.7), (0.2, 0.7), (0.0, 0.98)]
    return [
        (True, ellipse(0, -0.1, 0.42, 0.86)),
        *((True, fin) for fin in fins),
        (True, flame),
        (False, ellipse(0, -0.3, 0.17, 0.17)),
    ]


def main(folder: Path) -> None:
    """Write the pictures with their captions."""
    KINDS["rocket"] = rocket
    rng = random.Random(12)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (colour, relation, other, kind) in enumerate(SCENES, 1):
        groups = [cutouts.Group(kind="rocket", colour=colour, size="large")]
        caption = f"a {colour} rocket"
        if relation is not None:
            groups.append(cutouts.Group(kind=kind, colour=other, size="medium"))
            caption += f" {WORDS[relation]} {'an' if other == 'orange' else 'a'} {other} {kind}"
        name = folder / f"{number:02d}"
        picture = cutouts.render(cutouts.arrange(tuple(groups), relation, rng))
        Image.fromarray(picture).save(name.with_suffix(".png"), optimize=True)
        name.with_suffix(".txt").write_text(caption.replace("a orange", "an orange") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
