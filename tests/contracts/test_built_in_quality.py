"""What the two models that share nano's parts reach: the reports of the repository, and the weights again."""

import json
from pathlib import Path
from typing import Any

import pytest

from sana.engine.parts import load
from sana.evaluation import runner

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "recipes" / "nano" / "reports"
OF_THE_TEACHER = {1: 0.85, 2: 0.95, 4: 0.95}
"""Least share of nano's 20-step score by the number of steps, a little below what is reached."""


def read(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((REPORTS / name).read_text(encoding="utf-8"))
    return found


def cells_of(label: str) -> list[list[str]]:
    """The rows of the README's tables that begin with a label, without it."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == label]


def test_few_steps_reach_their_share_of_nanos_twenty() -> None:
    report, teacher = read("sprint.json"), read("geneval.json")
    against = report["against"]
    assert isinstance(against, dict)
    scores = teacher["scores"]
    assert isinstance(scores, dict)
    assert against["scores"]["overall"] == scores["overall"]["score"]["share"]
    runs, ratios = report["runs"], report["ratios"]
    assert isinstance(runs, list)
    assert isinstance(ratios, list)
    assert [run["settings"]["steps"] for run in runs] == list(OF_THE_TEACHER)
    assert {run["settings"]["model"]["name"] for run in runs} == {"nano-sprint"}
    for ratio, least in zip(ratios, OF_THE_TEACHER.values(), strict=True):
        assert ratio["overall"] >= least
    for task, score in scores.items():
        shown = [f"{score['score']['share']:.2f}"]
        for run, ratio in zip(runs, ratios, strict=True):
            found = run["scores"][task]["score"]
            shown += [f"{found['share']:.2f} ± {found['half_width']:.2f}", f"{ratio[task]:.2f}"]
        assert shown in cells_of(task), task


def test_what_is_said_of_other_noises_is_what_was_measured() -> None:
    report: Any = read("other-noises.json")
    scores = [run["scores"]["overall"]["score"]["share"] for run in (report["nano"], *report["nano-sprint"])]
    assert [run["settings"]["steps"] for run in report["nano-sprint"]] == list(OF_THE_TEACHER)
    nano, *few = scores
    told = [f"{number:.2f}" for number in (nano, *few, *(score / nano for score in few))]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = (
        "(`--seed 100`) nano has {}, and nano-sprint {}, {} and {} in one, two and four steps: {}, {} and {} of it."
    )
    assert sentence.format(*told) in text


def test_a_picture_is_followed_and_the_prompt_decides_the_colours() -> None:
    report = read("control.json")
    scores, settings = report["scores"], report["settings"]
    assert isinstance(scores, dict)
    assert isinstance(settings, dict)
    assert settings["scenes"] >= 100
    followed = scores["with control"]
    assert followed["near"]["share"] >= 0.9
    assert followed["strict"]["share"] >= 0.7
    assert followed["things"]["share"] >= 0.9
    (shown,) = cells_of("with control")
    figures = [followed[name] for name in ("near", "strict", "things", "right")]
    assert shown == [f"{figure['share']:.2f} ± {figure['half_width']:.2f}" for figure in figures]


@pytest.mark.slow
def test_the_shipped_student_still_draws_in_few_steps() -> None:
    parts = load("nano-sprint", device="cpu")
    for steps, least in {1: 0.6, 2: 0.7, 4: 0.7}.items():
        report = runner.run("geneval", parts, runner.Settings(prompts=8, images=1, steps=(steps,))).to_dict()
        assert report["scores"]["overall"]["score"]["share"] >= least, steps


@pytest.mark.slow
def test_the_shipped_branch_still_follows() -> None:
    report = runner.run("control", load("nano-controlnet", device="cpu"), runner.Settings(scenes=12)).to_dict()
    assert report["scores"]["with control"]["near"]["share"] >= 0.85
    assert report["scores"]["with control"]["strict"]["share"] >= 0.6
    assert report["scores"]["with control"]["things"]["share"] >= 0.85
