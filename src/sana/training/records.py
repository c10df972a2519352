"""What a run tells about itself in its folder: the log, the curve, previews, the report; and trackers elsewhere.

The weights matter, not the log: a disk that refuses costs a line, and a message, but no training.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sana.checkpoints.storage import publish
from sana.training.curve import append_line, draw_curve
from sana.training.report import write_report
from sana.training.trackers import TRACKERS, Tracker

PREVIEWS = "previews"
_log = logging.getLogger(__name__)


class Records:
    """Writes the log of the run in `folder`; `tables` are its settings."""

    def __init__(self, folder: Path, tables: Mapping[str, Any]) -> None:
        """Open the trackers that the settings name.

        Errors: MissingDependency when the library of one is not installed.
        """
        self.folder, self.tables = folder, tables
        self.trackers: dict[str, Tracker] = {}
        self._failing = set[str]()
        for name in tables["run"]["report"]:
            with self._surviving(f"{name} is told nothing of this run"):
                self.trackers[name] = TRACKERS[name](folder, tables)

    def keep_preview(self, step: int, picture: Image.Image) -> None:
        """Keep a picture of how far the run is."""
        target = self.folder / PREVIEWS / f"{step:08d}.png"
        with self._surviving(f"the preview of step {step} is not kept"):
            target.parent.mkdir(exist_ok=True)
            publish(target, lambda beside: picture.save(beside, "PNG"))
        self._tell(lambda tracker: tracker.picture(step, picture))

    def write(self, line: Mapping[str, Any], best: Mapping[str, Any]) -> None:
        """Add a line to the log; one with held-out figures also renews curve and report."""
        log = self.folder / "metrics.jsonl"
        with self._surviving(f"step {line['step']} is not in the log"):
            append_line(log, line)
            if "held_out" in line:
                picture = draw_curve(log, str(self.tables["objective"]))
                publish(self.folder / "loss.png", lambda beside: picture.save(beside, "PNG"))
                write_report(self.folder, self.tables, best)
        flat = {**line, **line.get("held_out", {})}
        numbers = {name: float(value) for name, value in flat.items() if isinstance(value, float | int)}
        numbers.pop("step")
        self._tell(lambda tracker: tracker.figures(line["step"], numbers))

    def close(self, best: Mapping[str, Any]) -> None:
        """Bring the report up to date and let the trackers finish."""
        if (self.folder / "metrics.jsonl").is_file():
            with self._surviving("the report is not renewed"):
                write_report(self.folder, self.tables, best)
        self._tell(lambda tracker: tracker.close())
        self.trackers = {}

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell all trackers something; of one that cannot hear it the first failure is mentioned."""
        for name, tracker in self.trackers.items():
            try:
                what(tracker)
            except OSError as error:
                if name not in self._failing:
                    _log.warning("%s misses a part of the log (%s); the training goes on", name, error)
                self._failing.add(name)

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("%s (%s)", what, f"{error.filename}: {error.strerror}" if error.filename else error)
