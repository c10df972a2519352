"""What a run tells about itself in its folder: the log, the curve, previews, the report; and trackers elsewhere.

The weights matter, not the log: a disk that refuses costs a line, and a message, but no training.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sana.checkpoints.storage import publish
from sana.training.curve import append_line, draw_curve
from sana.training.report import write_report
from sana.training.trackers import TRACKERS

PREVIEWS = "previews"
_log = logging.getLogger(__name__)


class Records:
    """Writes the log of the run in `folder`; `tables` are its settings."""

    def __init__(self, folder: Path, tables: Mapping[str, Any]) -> None:
        """Open the trackers that the settings name.

        Errors: MissingDependency when the library of one is not installed.
        """
        self.folder, self.tables = folder, tables
        self.trackers = [TRACKERS[name](folder, tables) for name in tables["run"]["report"]]

    def keep_preview(self, step: int, picture: Image.Image) -> None:
        """Keep a picture of how far the run is."""
        target = self.folder / PREVIEWS / f"{step:08d}.png"
        with self._surviving(f"the preview of step {step} is not kept"):
            target.parent.mkdir(exist_ok=True)
            publish(target, lambda beside: picture.save(beside, "PNG"))
        for tracker in self.trackers:
            tracker.picture(step, picture)

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
        for tracker in self.trackers:
            tracker.figures(line["step"], numbers)

    def close(self, best: Mapping[str, Any]) -> None:
        """Bring the report up to date and let the trackers finish."""
        if (self.folder / "metrics.jsonl").is_file():
            with self._surviving("the report is not renewed"):
                write_report(self.folder, self.tables, best)
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("%s (%s: %s)", what, error.filename, error.strerror)
