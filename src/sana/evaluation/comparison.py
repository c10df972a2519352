"""Runs of GenEval side by side: one column for each number of steps, and what share of another report each reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from sana.checkpoints.layout import read_json
from sana.errors import CheckpointError, InvalidInput
from sana.evaluation.geneval import GenevalReport
from sana.evaluation.prompts import TASKS, Task
from sana.evaluation.scores import table
from sana.evaluation.sheet import INK, MARGIN, PAPER

SAME = ("prompts", "images", "seed")
"""Settings in which reports must agree for their scores to be compared."""
ROWS: tuple[Task | None, ...] = (*TASKS, None)
"""Of the tables; None is all tasks together."""
TITLE = 40
"""Height in pixels of the line above the sheet of a run."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Another report, as it was kept in a file."""

    title: str
    """Its model and steps."""
    shares: Mapping[str, float]
    """Scores by task, and overall."""
    settings: Mapping[str, Any]

    def ratio(self, report: GenevalReport, task: Task | None) -> float | None:
        """What share of this score a report reaches; None of nothing."""
        share, whole = report.score(task).share, self.shares[_name(task)]
        return share / whole if share is not None and whole else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Reports of one model that differ in the number of steps, beside another report or without."""

    runs: Sequence[GenevalReport]
    reference: Reference | None = None

    @property
    def sheet(self) -> Image.Image | None:
        """The sheets of all runs, one below the other."""
        sheets = {_steps(run.settings["steps"]): run.sheet for run in self.runs if run.sheet is not None}
        if not sheets:
            return None
        width = max(one.width for one in sheets.values())
        whole = Image.new("RGB", (width, sum(TITLE + one.height for one in sheets.values())), PAPER)
        top = 0
        for title, one in sheets.items():
            ImageDraw.Draw(whole).text((MARGIN, top + TITLE // 3), title, INK, ImageFont.load_default(22))
            whole.paste(one, (0, top + TITLE))
            top += TITLE + one.height
        return whole

    def table(self) -> str:
        """Tasks down, runs across; behind each the share of the reference that it reaches."""
        head = ["task", *([self.reference.title] if self.reference else [])]
        for run in self.runs:
            head += [_steps(run.settings["steps"]), *(["ratio"] if self.reference else [])]
        return table(head, [self._row(task) for task in ROWS])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        whole: dict[str, Any] = {"metric": "geneval", "settings": {key: self.runs[0].settings[key] for key in SAME}}
        whole["runs"] = [run.to_dict() for run in self.runs]
        if self.reference is not None:
            against = self.reference
            whole["against"] = {"settings": dict(against.settings), "scores": dict(against.shares)}
            whole["ratios"] = [{_name(task): against.ratio(run, task) for task in ROWS} for run in self.runs]
        return whole

    def _row(self, task: Task | None) -> list[str]:
        cells = [_name(task), *([f"{self.reference.shares[_name(task)]:.2f}"] if self.reference else [])]
        for run in self.runs:
            cells.append(run.score(task).with_width)
            if self.reference is not None:
                ratio = self.reference.ratio(run, task)
                cells.append("-" if ratio is None else f"{ratio:.2f}")
        return cells


def read_reference(file: str | Path, settings: Mapping[str, Any]) -> Reference:
    """Read a report of one run of GenEval that was made with the same prompts, pictures and seeds as `settings` say.

    Raises:
        InvalidInput: the file cannot be read, is no such report, or was made with other ones.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InvalidInput(f"There is no file {file} to compare with. Check the name.")
    try:
        kept = read_json(path)
        told, scores = dict(kept["settings"]), kept["scores"]
        shares = {_name(task): float(scores[_name(task)]["score"]["share"]) for task in ROWS}
        title = f"{told['model']['name']}, {_steps(told['steps'])}"
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{file} is no report of one run of geneval. Make it with: sana evaluate geneval -m MODEL -o FILE.json"
        ) from error
    for name in SAME:
        if told.get(name) != settings[name]:
            raise InvalidInput(
                f"{file} was made with `{name}` {told.get(name)}, not with {settings[name]}, so the scores do not"
                " compare. Give the same here, or make it again."
            )
    return Reference(title=title, shares=shares, settings=told)


def _name(task: Task | None) -> str:
    return task or "overall"


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"
