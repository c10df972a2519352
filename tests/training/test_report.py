"""What a run tells about itself: the page, and the trackers."""

import errno
import json
import math
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_loop import Regression, run, settings

from sana.errors import InvalidInput, MissingDependency
from sana.training.config import TRACKERS as NAMES
from sana.training.config import OptimizerSettings
from sana.training.curve import append_line, read_lines, read_series
from sana.training.loop import Trainer
from sana.training.players import use_checkpointing
from sana.training.report import _log_ticks, _ticks, write_report
from sana.training.trackers import TRACKERS


class Page(HTMLParser):
    """Counts elements and keeps what they point to; complains about what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_curves_previews_and_settings_and_needs_nothing_else(tmp_path: Path) -> None:
    trainer = run(tmp_path / "toy", "adamw")
    text = (tmp_path / "toy" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.seen["svg"] == 2  # the loss and the held-out figure
    assert page.seen["img"] == 3
    assert all((tmp_path / "toy" / link).is_file() for link in page.links)
    assert not re.search(r"https?:|<script|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "finished, 12 steps" in text
    assert f"<dd>{trainer.best['figure']:.4g}</dd>" in text
    assert page.seen["details"] == 2
    assert "samples per second" in text


def test_names_from_elsewhere_are_only_shown(tmp_path: Path) -> None:
    folder = tmp_path / "a<script>b"
    folder.mkdir()
    append_line(folder / "metrics.jsonl", {"step": 1, "loss": 1.0, "held_out": {"<b>": 2.0}})
    write_report(folder, {"objective": "<i>", "run": {"steps": 4}, "optimizer": {"x": "<u>"}}, {})
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|b>2|i>|u>)", text.replace("<b>loss", "").replace("<b>&lt;", ""))
    assert "step 1 of 4" in text


def test_a_page_of_a_run_that_has_not_begun_and_of_one_that_is_not_finite(tmp_path: Path) -> None:
    tables = {"objective": "toy", "run": {"steps": 4}}
    (tmp_path / "metrics.jsonl").touch()
    write_report(tmp_path, tables, {})
    append_line(tmp_path / "metrics.jsonl", {"step": 1, "loss": math.nan, "seconds": 0.0, "samples": 8})
    write_report(tmp_path, tables, {})
    assert "step 1 of 4" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.32), (-5, 1e4), (3, 3), (0, 0), (22.1, 33.8), (1e-9, 2e-9)])
def test_ticks_are_few_round_and_around_the_range(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert _log_ticks(low, low + abs(high - low) % 4)


def test_the_registry_and_the_settings_name_the_same_trackers() -> None:
    assert tuple(TRACKERS) == NAMES


def test_tensorboard_gets_figures_and_pictures(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, report=("tensorboard",))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("held_out")] == [0, 6, 12]
    assert [event.step for event in events.Images("preview")] == [0, 6, 12]


def test_wandb_gets_figures_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake: Any = types.ModuleType("wandb")
    fake.Image = lambda picture: picture.size
    session = types.SimpleNamespace(
        log=lambda values, step: calls.append((str(step), values)), finish=lambda: calls.append(("finish", None))
    )
    fake.init = lambda **options: calls.append(("init", options)) or session
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path / "toy", report=("wandb",))
    run(tmp_path / "stopped", stop=5, report=("wandb",))
    run(tmp_path / "stopped", report=("wandb",), log_every=2)
    assert [what["resume"] for when, what in calls if when == "init"] == ["allow"] * 3
    whole, begun, resumed = (what["id"] for when, what in calls if when == "init")
    assert begun == resumed != whole
    assert re.fullmatch(r"[0-9a-f]{16}", whole)
    calls = calls[: calls.index(("finish", None)) + 1]
    assert calls[0][1]["name"] == "toy"
    assert calls[0][1]["config"]["run"]["steps"] == 12
    assert ("6", {"preview": (4, 4)}) in calls
    assert sum("loss" in (values or {}) for step, values in calls if step.isdigit()) == 12
    assert calls[-1] == ("finish", None)


class Deaf:
    """A tracker whose disk is full."""

    def __init__(self, folder: Path, settings: Any) -> None:
        self.calls: list[str] = []
        HEARD.append(self.calls)

    def figures(self, *_: Any) -> None:
        self._refuse("figures")

    def picture(self, *_: Any) -> None:
        self._refuse("picture")

    def close(self) -> None:
        self._refuse("close")

    def _refuse(self, what: str) -> None:
        self.calls.append(what)
        raise OSError(errno.ENOSPC, "No space left on device")


HEARD: list[list[str]] = []


def test_wandb_without_a_login_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class UsageError(Exception):
        pass

    def refuse(**_: Any) -> Any:
        raise UsageError("api_key not configured (no-tty).\n call wandb.login(key=[your_api_key])")

    fake: Any = types.ModuleType("wandb")
    fake.init, fake.errors = refuse, types.SimpleNamespace(Error=UsageError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sentence = (
        r"run\.report names wandb, which refuses: api_key not configured \(no-tty\)\. call .*\. Log in with `wandb"
    )
    with pytest.raises(InvalidInput, match=sentence):
        run(tmp_path, report=("wandb",))


def test_a_log_is_json_where_a_number_is_none(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    append_line(log, {"step": 1, "loss": math.nan, "seconds": 1.0, "samples": 8, "held_out": {"a": math.inf, "b": 1.0}})
    append_line(log, {"step": 2, "loss": 0.5, "seconds": 1.0, "samples": 8})

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in log.read_text().splitlines()]
    assert (lines[0]["loss"], lines[0]["held_out"]) == (None, {"a": None, "b": 1.0})
    first, second = read_lines(log)
    assert math.isnan(first["loss"])
    assert math.isnan(first["held_out"]["a"])
    assert second["loss"] == 0.5
    assert read_series(log) == {"loss": [(2, 0.5)], "b": [(1, 1.0)]}


def test_a_tracker_that_fails_costs_one_warning_and_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", Deaf)
    HEARD.clear()
    assert run(tmp_path, report=("wandb",)).step == 12
    (calls,) = HEARD
    assert [calls.count(what) for what in ("figures", "picture", "close")] == [13, 3, 1]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["wandb misses a part of the log ([Errno 28] No space left on device); the training goes on"]


def test_a_tracker_that_cannot_be_opened_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", "runs/events")

    monkeypatch.setitem(TRACKERS, "tensorboard", refuse)
    assert run(tmp_path, report=("tensorboard",)).step == 12
    assert "tensorboard is told nothing of this run (runs/events: Read-only file system)" in caplog.text


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_tracker_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"run.report = \['{name}'\] needs: pip install 'sanakit\[{name}\]'"):
        Trainer(Regression(), settings(report=(name,)), OptimizerSettings(), tmp_path)
    run(tmp_path)  # the folder is free again


def test_checkpointing_without_a_model_that_can_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"run.checkpointing has no effect on 'regression'"):
        use_checkpointing(Regression())
