"""GenEval on the drawn world: does a picture hold what its prompt asks for?

The rules are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513) with `detector.detect` in place of its detector and of
its colour classifier; a thing is found or not, so there is no further threshold of confidence.

Pictures are uint8 [H, W, 3].
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana.data.cutout_captions import LANGUAGES
from sana.data.cutouts import Relation, render
from sana.evaluation.detector import Detection, detect
from sana.evaluation.prompts import TASKS, Clause, Prompt, Task, all_prompts
from sana.evaluation.scores import Score, mean_of, table
from sana.evaluation.sheet import Panel, draw_sheet

Picture = NDArray[np.uint8]
Draw = Callable[[list[str], list[int]], Iterable[Picture]]
"""Prompts and seeds, one of each per picture, to pictures [256, 256, 3]."""
Progress = Callable[[int, int], None]
"""Called with how many pictures are done, and of how many."""

MAX_PER_KIND = 16
SHRINK = 0.1
"""Share of both boxes' sizes that an offset must exceed before it counts."""
DIRECTION = 0.5
SHEET_COLUMNS = 8


class Boxed(Protocol):
    """Anything with a centre (x, y) and a size (width, height), in pixels."""

    @property
    def centre(self) -> tuple[float, float]: ...
    @property
    def size(self) -> tuple[float, float]: ...


def relations(one: Boxed, other: Boxed) -> set[Relation]:
    """Where `one` lies as seen from `other`: none, one or two relations."""
    offset = [a - b for a, b in zip(one.centre, other.centre, strict=True)]
    slack = [SHRINK * (a + b) for a, b in zip(one.size, other.size, strict=True)]
    shrunk = [math.copysign(max(abs(d) - s, 0.0), d) for d, s in zip(offset, slack, strict=True)]
    if all(abs(d) < 1e-3 for d in shrunk):
        return set()
    x, y = (d / math.hypot(*offset) for d in shrunk)
    holds: dict[Relation, bool] = {
        "left": x < -DIRECTION,
        "right": x > DIRECTION,
        "above": y < -DIRECTION,
        "below": y > DIRECTION,
    }
    return {relation for relation, true in holds.items() if true}


def is_right(found: Sequence[Detection], include: Sequence[Clause], exclude: Sequence[Clause] = ()) -> bool:
    """Whether detections, best first, fulfil every clause of `include` and none of `exclude`."""
    by_kind: dict[str, list[Detection]] = {}
    for detection in found:
        by_kind.setdefault(detection.kind, []).append(detection)
    kept: list[list[Detection]] = []
    for clause in include:
        # Only the most confident are looked at, as GenEval does: a second thing in the right colour does not help.
        things = by_kind.get(clause.kind, [])[:MAX_PER_KIND][: clause.count]
        kept.append(things)
        if len(things) < clause.count:
            return False
        if clause.colour is not None and any(thing.colour != clause.colour for thing in things):
            return False
        if clause.relation is not None:
            pairs = [(thing, target) for thing in things for target in kept[clause.target]]
            if any(clause.relation not in relations(thing, target) for thing, target in pairs):
                return False
    return not any(len(by_kind.get(clause.kind, [])) >= clause.count for clause in exclude)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One prompt and its pictures: which are right, and which would be right for another prompt of the task."""

    prompt: Prompt
    right: tuple[bool, ...]
    right_for_another: tuple[bool, ...]
    ceiling: bool | None
    """Whether the true picture is right after encoding and decoding; None without an autoencoder."""
    truth: bool
    """Whether the true picture is right."""


@dataclass(frozen=True, kw_only=True)
class GenevalReport:
    """The scores, what they were made of, and a sheet of sample pictures."""

    verdicts: tuple[Verdict, ...]
    settings: dict[str, Any]
    sheet: Image.Image | None = None

    def score(self, task: Task | None = None, language: str | None = None, what: str = "right") -> Score:
        """Share of right pictures; over several tasks the unweighted mean of the tasks.

        Args:
            task, language: which prompts; None is all.
            what: the field of `Verdict` that counts as right.
        """
        if task is None:
            return mean_of([self.score(one, language, what) for one in TASKS])
        flags: list[bool] = []
        for verdict in self.verdicts:
            if verdict.prompt.task == task and language in (None, verdict.prompt.language):
                value = getattr(verdict, what)
                flags += value if isinstance(value, tuple) else [] if value is None else [value]
        return Score.of(flags)

    def columns(self) -> dict[str, Callable[[Task | None], Score]]:
        """What the table shows of each task, by heading."""
        by_language = {
            language: (lambda task, language=language: self.score(task, language)) for language in LANGUAGES
        }
        return {
            "score": self.score,
            **by_language,
            "shuffled captions": lambda task: self.score(task, what="right_for_another"),
            "autoencoder ceiling": lambda task: self.score(task, what="ceiling"),
            "ground truth": lambda task: self.score(task, what="truth"),
        }

    def table(self) -> str:
        """A markdown table: tasks down, the score with its 95 % half-width, languages and controls across."""
        columns = self.columns()
        rows = [[task, *(str(make(task)) for make in columns.values())] for task in TASKS]
        return table(["task", *columns], [*rows, ["overall", *(str(make(None)) for make in columns.values())]])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the same model, settings and machine give the same bytes."""
        names: list[Task | None] = [*TASKS, None]
        scores = {
            task or "overall": {name: make(task).to_dict() for name, make in self.columns().items()} for task in names
        }
        prompts = [
            {
                "task": verdict.prompt.task,
                "language": verdict.prompt.language,
                "text": verdict.prompt.text,
                "meaning": verdict.prompt.meaning,
                "right": list(verdict.right),
            }
            for verdict in self.verdicts
        ]
        return {"metric": "geneval", "settings": self.settings, "scores": scores, "prompts": prompts}


def evaluate(
    draw: Draw,
    *,
    prompts: int = 50,
    images: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    restore: Callable[[list[Picture]], list[Picture]] | None = None,
    progress: Progress | None = None,
) -> GenevalReport:
    """Draw `images` pictures of each of `prompts` prompts per task and judge them.

    Args:
        draw: the model; picture i of every prompt is drawn with seed `seed` + i.
        batch_size: pictures per call of `draw`.
        restore: an autoencoder's round trip, for the score that it would leave to a perfect model.
        progress: told after every batch.
    """
    asked = all_prompts(prompts)
    jobs = [(prompt.text, seed + image) for prompt in asked for image in range(images)]
    found: list[list[Detection]] = []
    kept: dict[int, Picture] = {}
    shown = {index * images for index in _shown(prompts)}
    for first in range(0, len(jobs), batch_size):
        texts, seeds = zip(*jobs[first : first + batch_size], strict=True)
        for picture in draw(list(texts), list(seeds)):
            if len(found) in shown:
                kept[len(found)] = picture
            found.append(detect(picture))
        if progress is not None:
            progress(len(found), len(jobs))
    truths, ceilings = _controls(asked, restore)
    verdicts = tuple(
        Verdict(
            prompt=prompt,
            right=tuple(is_right(one, prompt.include, prompt.exclude) for one in group),
            right_for_another=tuple(is_right(one, other.include, other.exclude) for one in group),
            ceiling=ceiling,
            truth=truth,
        )
        for prompt, other, group, truth, ceiling in zip(
            asked, _others(asked), _grouped(found, images), truths, ceilings, strict=True
        )
    )
    settings = {"prompts": prompts, "images": images, "seed": seed}
    return GenevalReport(verdicts=verdicts, settings=settings, sheet=_sheet(verdicts, kept, images))


def _grouped(found: list[list[Detection]], images: int) -> list[list[list[Detection]]]:
    return [found[i : i + images] for i in range(0, len(found), images)]


def _others(asked: Sequence[Prompt]) -> list[Prompt]:
    """For each prompt the next one of its task, counted around, that asks for something else: shuffled captions."""
    others = []
    for index, prompt in enumerate(asked):
        around = [other for other in (*asked[index + 1 :], *asked[:index]) if other.task == prompt.task]
        wish = (prompt.include, prompt.exclude)
        others.append(next((other for other in around if (other.include, other.exclude) != wish), prompt))
    return others
