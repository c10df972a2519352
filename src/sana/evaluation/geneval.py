"""GenEval on the drawn world: how often a picture holds what its prompt asks for.

Pictures are uint8 [256, 256, 3].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from sana.data.cutout_captions import LANGUAGES
from sana.data.cutouts import render
from sana.errors import InvalidInput
from sana.evaluation.detector import Detection, detect
from sana.evaluation.prompts import TASKS, Prompt, Task, all_prompts
from sana.evaluation.rules import is_right
from sana.evaluation.scores import Score, table
from sana.evaluation.seams import Draw, Picture, Progress, Restore
from sana.evaluation.sheet import Panel, draw_sheet

SHEET_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One prompt and what was judged for it, a flag per picture."""

    prompt: Prompt
    right: Sequence[bool]
    shuffled: Sequence[bool]
    """Whether the same pictures are right for another prompt of the task."""
    ceiling: Sequence[bool]
    """Whether the true picture is right after encoding and decoding; empty without an autoencoder."""
    truth: Sequence[bool]
    """Whether the true picture is right."""


@dataclass(frozen=True, kw_only=True)
class GenevalReport:
    """All verdicts, the scores made of them, and a sheet of sample pictures."""

    verdicts: Sequence[Verdict]
    settings: Mapping[str, Any]
    sheet: Image.Image | None = field(default=None, compare=False)

    def score(self, task: Task | None = None, language: str | None = None, flags: str = "right") -> Score:
        """Share of true `flags`, a field of `Verdict`; over all tasks (None) their unweighted mean."""
        if task is None:
            return Score.mean_of([self.score(one, language, flags) for one in TASKS])
        chosen = [v for v in self.verdicts if v.prompt.task == task and language in (None, v.prompt.language)]
        return Score.of([flag for verdict in chosen for flag in getattr(verdict, flags)])

    def scores(self, task: Task | None) -> dict[str, Score]:
        """What the table shows of a task (None: of all), by heading."""
        return {
            "score": self.score(task),
            **{language: self.score(task, language) for language in LANGUAGES},
            "shuffled captions": self.score(task, flags="shuffled"),
            "autoencoder ceiling": self.score(task, flags="ceiling"),
            "ground truth": self.score(task, flags="truth"),
        }

    def table(self) -> str:
        """Tasks down; the score with its 95 % half-width, the languages and the controls across."""
        rows = []
        for task in (*TASKS, None):
            scores = self.scores(task)
            first = scores.pop("score")
            rows.append([task or "overall", first.with_width, *map(str, scores.values())])
        return table(["task", "score", *scores], rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the same model, settings and machine give the same."""
        scores = {task or "overall": self.scores(task) for task in (*TASKS, None)}
        return {
            "metric": "geneval",
            "settings": dict(self.settings),
            "scores": {task: {name: one.to_dict() for name, one in row.items()} for task, row in scores.items()},
            "prompts": [
                {
                    "task": verdict.prompt.task,
                    "language": verdict.prompt.language,
                    "text": verdict.prompt.text,
                    "meaning": verdict.prompt.meaning,
                    "right": list(verdict.right),
                }
                for verdict in self.verdicts
            ],
        }


def evaluate(
    draw: Draw,
    *,
    prompts: int = 50,
    images: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    restore: Restore | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> GenevalReport:
    """Draw `images` pictures of each of `prompts` prompts per task and judge them.

    Args:
        draw: the model; picture i of every prompt is drawn with seed `seed` + i.
        batch_size: pictures per call of `draw`.
        restore: an autoencoder, for the score that it leaves to a perfect model.
        settings: what else the report should record.
        progress: told after every batch.

    Raises:
        InvalidInput: a number is below 1, or `draw` gave another number of pictures than it was asked for.
    """
    if min(prompts, images, batch_size) < 1:
        raise InvalidInput("`prompts`, `images` and `batch_size` must be 1 or more. Raise them.")
    asked = all_prompts(prompts)
    jobs = [(prompt.text, seed + image) for prompt in asked for image in range(images)]
    found: list[list[Detection]] = []
    samples: dict[int, Picture] = {}
    shown = {index * images: index for index in _sampled(asked, prompts)}
    for first in range(0, len(jobs), batch_size):
        texts, seeds = zip(*jobs[first : first + batch_size], strict=True)
        pictures = list(draw(list(texts), list(seeds)))
        if len(pictures) != len(texts):
            raise InvalidInput(f"{len(pictures)} pictures were drawn for {len(texts)} prompts. Draw one for each.")
        found += map(detect, pictures)
        samples.update({shown[job]: one for job, one in enumerate(pictures, first) if job in shown})
        if progress is not None:
            progress(len(found), len(jobs))
    groups = [found[start : start + images] for start in range(0, len(found), images)]
    verdicts = _verdicts(asked, groups, restore)
    record = {"prompts": prompts, "images": images, "seed": seed, **(settings or {})}
    report = GenevalReport(verdicts=verdicts, settings=record)
    return dataclasses.replace(report, sheet=_sheet(report, samples))


def _verdicts(
    asked: Sequence[Prompt], groups: Sequence[Sequence[list[Detection]]], restore: Restore | None
) -> list[Verdict]:
    scenes = list(dict.fromkeys(prompt.scene for prompt in asked))
    pictures = [render(scene) for scene in scenes]
    truth = dict(zip(scenes, map(detect, pictures), strict=True))
    ceiling = {} if restore is None else dict(zip(scenes, map(detect, restore(pictures)), strict=True))

    def judge(prompt: Prompt | None, found: Sequence[list[Detection]]) -> list[bool]:
        return [] if prompt is None else [is_right(one, prompt.include, prompt.exclude) for one in found]

    return [
        Verdict(
            prompt=prompt,
            right=judge(prompt, group),
            shuffled=judge(_another(prompt, asked), group),
            ceiling=judge(prompt, [ceiling[prompt.scene]] if ceiling else []),
            truth=judge(prompt, [truth[prompt.scene]]),
        )
        for prompt, group in zip(asked, groups, strict=True)
    ]


def _another(prompt: Prompt, asked: Sequence[Prompt]) -> Prompt | None:
    """The next prompt of the task, counted around, that asks for something else; None if there is none."""
    index = asked.index(prompt)
    others = [other for other in (*asked[index:], *asked[:index]) if other.task == prompt.task]
    return next((o for o in others if (o.include, o.exclude) != (prompt.include, prompt.exclude)), None)


def _sampled(asked: Sequence[Prompt], prompts: int) -> list[int]:
    """Which prompts the sheet shows: of each task the first scenes, each in the next language."""
    columns = [index for index in range(prompts) if index // 4 < SHEET_COLUMNS and index % 4 == index // 4 % 4]
    return [start + column for start in range(0, len(asked), prompts) for column in columns]


def _sheet(report: GenevalReport, samples: Mapping[int, Picture]) -> Image.Image:
    rows: dict[str, list[Panel]] = {}
    for index, picture in samples.items():
        verdict = report.verdicts[index]
        prompt = verdict.prompt
        panel = Panel(picture=picture, tag=prompt.language, caption=prompt.meaning, right=verdict.right[0])
        rows.setdefault(f"{prompt.task}   {report.score(prompt.task)}", []).append(panel)
    return draw_sheet(rows)
