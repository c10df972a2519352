"""Is a control picture followed while the prompt decides the colours?

A scene that training never drew gives the control picture; the prompt asks for the same things in other colours. What
is drawn is compared with both: its strokes with those of the control picture, its things with the prompt. Beside it
stand the true picture of what is asked, before and after the autoencoder, which is all that can be reached, and what
the same prompt gives without the control picture, since things are often where they always are.

Pictures are uint8 [256, 256, 3].
"""

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sana.data.cutout_captions import LANGUAGES, Language, caption
from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import COLOURS, Scene, render, sample_scene
from sana.engine.control_maps import Mask
from sana.errors import InvalidInput
from sana.evaluation.detector import detect
from sana.evaluation.scores import Score, table
from sana.evaluation.seams import Draw, Follow, Picture, Progress, Restore
from sana.evaluation.sheet import Panel, draw_sheet
from sana.evaluation.strokes import control_picture, overlap, strokes

TOLERANCE = 2
"""Pixels, of 256, by which strokes may miss each other. Strokes of kind ink are 5 wide: true pictures that are shifted
by 1, 2, 3, 4 or 8 pixels reach 1.00, 1.00, 0.83, 0.67 and 0.30 with it, those of other scenes 0.10; without tolerance
it is 0.77, 0.60, 0.46, 0.34, 0.17 and 0.05, and 0.87 where nothing but the autoencoder has changed the picture."""
SHEET_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Order:
    """A scene whose strokes are to be followed, and the recoloured one that the prompt asks for."""

    scene: Scene
    wanted: Scene
    language: Language
    text: str

    @property
    def meaning(self) -> str:
        """The prompt in plain English."""
        return _said(self.wanted, "en", random.Random(0))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found in the picture of an order."""

    near: float
    """Overlap of its strokes with those of the control picture, within `TOLERANCE`."""
    strict: float
    """The same without tolerance."""
    things: float
    """Share of the things that are there in the colour that was asked for."""
    right: bool
    """Whether all of them are, and no others."""


COLUMNS = {
    "near": f"edge IoU within {TOLERANCE} px",
    "strict": "strict edge IoU",
    "things": "things in their colour",
    "right": "pictures all right",
}
"""Headings by field of `Outcome`."""


@dataclass(frozen=True, kw_only=True)
class ControlReport:
    """The outcomes of all orders, by how the pictures were made, and a sheet of sample pictures."""

    orders: Sequence[Order]
    outcomes: Mapping[str, Sequence[Outcome]]
    settings: Mapping[str, Any]
    sheet: Image.Image | None = field(default=None, compare=False)

    def score(self, made: str, name: str) -> Score:
        """The mean of a field of `Outcome` over the pictures that were made so."""
        return Score.of_values([float(getattr(one, name)) for one in self.outcomes[made]])

    def table(self) -> str:
        """A row for each way to make the pictures."""
        rows = [[made, *(self.score(made, name).with_width for name in COLUMNS)] for made in self.outcomes]
        return table(["pictures", *COLUMNS.values()], rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the same model, settings and machine give the same."""
        return {
            "metric": "control",
            "settings": dict(self.settings),
            "scores": {made: {n: self.score(made, n).to_dict() for n in COLUMNS} for made in self.outcomes},
            "scenes": [
                {
                    "language": order.language,
                    "text": order.text,
                    "meaning": order.meaning,
                    "outcomes": {made: _record(found[number]) for made, found in self.outcomes.items()},
                }
                for number, order in enumerate(self.orders)
            ],
        }


def orders_of(count: int, seed: int = 0) -> list[Order]:
    """The first `count` orders of a seed; a smaller set is the beginning of a larger one.

    The kinds take turns in being there for sure: of some, hardly anything is held out.
    """
    numbered = zip(range(count), itertools.cycle(KINDS), strict=False)
    return [_order(kind, random.Random(f"{seed}/control/{number}")) for number, kind in numbered]


def evaluate_control(
    follow: Follow,
    draw: Draw,
    *,
    kind: str,
    scenes: int = 100,
    seed: int = 0,
    batch_size: int = 32,
    restore: Restore | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ControlReport:
    """Draw recoloured scenes under the control pictures of the scenes, and without, and judge them.

    Args:
        follow: the model with its control network; scene i is drawn with seed `seed` + i.
        draw: the model without, which gets the same prompts and seeds.
        kind: of the control pictures, one of `strokes.STROKED`.
        restore: an autoencoder, for what it leaves to a perfect model.
        settings: what else the report should record.
        progress: told after every batch.

    Raises:
        InvalidInput: a number is below 1, or the kind has no strokes.
    """
    if min(scenes, batch_size) < 1:
        raise InvalidInput("`scenes` and `batch_size` must be 1 or more. Raise them.")
    orders = orders_of(scenes, seed)
    sources = [render(order.scene) for order in orders]
    maps = [control_picture(kind, picture) for picture in sources]
    drawn: dict[str, list[Picture]] = {"with control": [], "without control": []}
    for first in range(0, scenes, batch_size):
        here = slice(first, first + batch_size)
        texts, seeds = [order.text for order in orders[here]], [*range(seed, seed + scenes)][here]
        for made, pictures in (
            ("with control", follow(texts, seeds, maps[here])),
            ("without control", draw(texts, seeds)),
        ):
            drawn[made] += pictures
            if progress is not None:
                progress(sum(map(len, drawn.values())), 2 * scenes)
    truth = [render(order.wanted) for order in orders]
    drawn["true"] = truth
    if restore is not None:
        drawn["true, through the autoencoder"] = list(restore(truth))
    steering = [strokes(kind, picture) for picture in sources]
    outcomes = {made: [*_judged(orders, steering, pictures, kind)] for made, pictures in drawn.items()}
    record = {"scenes": scenes, "seed": seed, "kind": kind, "tolerance": TOLERANCE, **(settings or {})}
    report = ControlReport(orders=orders, outcomes=outcomes, settings=record)
    return dataclasses.replace(report, sheet=_sheet(report, maps, drawn))


def _order(kind: str, rng: random.Random) -> Order:
    scenes = iter(lambda: sample_scene(rng, held_out=True), None)
    scene = next(scene for scene in scenes if any(group.kind == kind for group in scene.groups))
    new = {group.kind: rng.choice([name for name in COLOURS if name != group.colour]) for group in scene.groups}
    wanted = dataclasses.replace(
        scene,
        groups=tuple(dataclasses.replace(group, colour=new[group.kind]) for group in scene.groups),
        things=tuple(dataclasses.replace(thing, colour=new[thing.kind]) for thing in scene.things),
    )
    language = rng.choice(LANGUAGES)
    return Order(scene=scene, wanted=wanted, language=language, text=_said(wanted, language, rng))


def _said(scene: Scene, language: Language, rng: random.Random) -> str:
    return caption(scene, rng, language=language, colours=True, relation=True, plain=True).text


def _judged(
    orders: Sequence[Order], steering: Sequence[Mask], pictures: Sequence[Picture], kind: str
) -> Iterator[Outcome]:
    for order, wanted, picture in zip(orders, steering, pictures, strict=True):
        drawn = strokes(kind, picture)
        asked = Counter((thing.kind, thing.colour) for thing in order.wanted.things)
        found = Counter((one.kind, one.colour) for one in detect(picture))
        yield Outcome(
            near=overlap(wanted, drawn, TOLERANCE),
            strict=overlap(wanted, drawn),
            things=(asked & found).total() / asked.total(),
            right=asked == found,
        )


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        name: value if isinstance(value, bool) else round(value, 6)
        for name, value in dataclasses.asdict(outcome).items()
    }


def _sheet(report: ControlReport, maps: Sequence[Picture], drawn: Mapping[str, Sequence[Picture]]) -> Image.Image:
    """Columns are scenes: the control picture, what was drawn with it, what was drawn without."""
    shown = report.orders[:SHEET_COLUMNS]
    rows = {
        f"control pictures   {report.settings['kind']}": [
            Panel(picture=maps[number], tag="", caption=_said(order.scene, "en", random.Random(0)))
            for number, order in enumerate(shown)
        ]
    }
    for made in ("with control", "without control"):
        found = report.outcomes[made]
        heading = f"{made}   edge IoU {report.score(made, 'near')}   right {report.score(made, 'right')}"
        rows[heading] = [
            Panel(
                picture=drawn[made][number],
                tag=f"{found[number].near:.2f} {order.language}",
                caption=order.meaning,
                right=found[number].right,
            )
            for number, order in enumerate(shown)
        ]
    return draw_sheet(rows)
