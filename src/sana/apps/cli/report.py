"""What a drawing command tells of its work when it ends: its document, and how it failed."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sana.engine.request import Result
from sana.errors import SanaError

_LEFT_OUT = ("skipped", "jobs", "sheet", "failed", "selection")
"""Of the document, where they are empty."""


class BatchFailed(SanaError):
    """A batch went to its end, but some pictures could not be drawn."""

    exit_code = 6


class PartialBatch(SanaError):
    """Some of the pictures were written before the error."""

    exit_code = 6


@dataclass(kw_only=True)
class Report:
    """What was done so far; becomes the JSON document."""

    files: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Files that were there already."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    """Settings, files and seeds of each of several prompts or points of a sweep."""
    sheet: str | None = None
    selection: list[dict[str, Any]] = field(default_factory=list)
    """For each file how its picture was chosen among candidates, where it was."""
    failed: list[dict[str, Any]] = field(default_factory=list)
    """Pictures of a batch that could not be drawn, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document."""
        timings = {stage: round(seconds, 4) for stage, seconds in self.timings.items()}
        document = {**dataclasses.asdict(self), "timings": timings}
        return {name: value for name, value in document.items() if value or name not in _LEFT_OUT}

    def add(self, result: Result) -> None:
        """Take in what a finished call of the engine took."""
        for stage, seconds in result.timings.items():
            self.timings[stage] = self.timings.get(stage, 0.0) + seconds
