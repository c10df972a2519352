"""Draw the twelve pictures that `sana train --demo` learns from: a thing that the built-in model has never seen.

Run from the repository: python recipes/demo/make_palms.py FOLDER
"""

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
    ("yellow", "right", "brown", "fish"),
    ("green", "below", "yellow", "moon"),
    ("purple", "above", "orange", "cat"),
)
"""Colour of the palm, and what it stands beside."""
WORDS = {"above": "above", "below": "below", "left": "to the left of", "right": "to the right of"}


def palm() -> Shape:
    """A bent trunk, and six leaves that hang from its top."""
    trunk = [(-0.1, -0.3), (0.1, -0.3), (0.16, 0.3), (0.3, 0.96), (-0.08, 0.96), (-0.04, 0.3)]
    leaves = [
        [(0.0, -0.46), (side * 0.34, -0.42 - lift), (side * reach, drop), (side * 0.36, -0.12 - lift), (0.0, -0.2)]
        for side in (-1, 1)
        for lift, reach, drop in ((0.5, 0.78, -0.62), (0.26, 0.98, -0.1), (0.0, 0.7, 0.36))
    ]
    return [(True, trunk), *((True, leaf) for leaf in leaves)]


def main(folder: Path) -> None:
    """Write the pictures with their captions."""
    KINDS["palm"] = palm
    rng = random.Random(12)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (colour, relation, other, kind) in enumerate(SCENES, 1):
        groups = [cutouts.Group(kind="palm", colour=colour, size="large")]
        caption = f"a {colour} palm tree"
        if relation is not None:
            groups.append(cutouts.Group(kind=kind, colour=other, size="medium"))
            caption += f" {WORDS[relation]} {'an' if other == 'orange' else 'a'} {other} {kind}"
        name = folder / f"{number:02d}"
        picture = cutouts.render(cutouts.arrange(tuple(groups), relation, rng))
        Image.fromarray(picture).save(name.with_suffix(".png"), optimize=True)
        name.with_suffix(".txt").write_text(caption.replace("a orange", "an orange") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
