"""GenEval of several numbers of steps, and beside another report."""

import json
from pathlib import Path
from typing import Any

import pytest

from sana.engine.parts import Parts
from sana.errors import InvalidInput
from sana.evaluation.comparison import Comparison, read_reference
from sana.evaluation.geneval import GenevalReport, Verdict
from sana.evaluation.prompts import TASKS, all_prompts
from sana.evaluation.runner import Settings, run, save, save_sheet

SAME = {"prompts": 4, "images": 1, "seed": 0}


def made(steps: int, share: float) -> GenevalReport:
    """A report in which that share of each task is right."""
    verdicts = [
        Verdict(prompt=prompt, right=[number % 4 < 4 * share], shuffled=[], ceiling=[], truth=[True])
        for number, prompt in enumerate(all_prompts(4))
    ]
    return GenevalReport(verdicts=verdicts, settings={**SAME, "steps": steps, "model": {"name": "teacher"}})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save(made(20, 0.75), tmp_path / "teacher.json")


def test_each_run_is_told_as_a_share_of_the_other_report(teacher: Path) -> None:
    reference = read_reference(teacher, SAME)
    both = Comparison(runs=[made(1, 0.5), made(2, 0.75)], reference=reference)
    lines = both.table().splitlines()
    assert lines[0].replace(" ", "") == "|task|teacher,20steps|1step|ratio|2steps|ratio|"
    assert lines[-1].replace(" ", "") == "|overall|0.75|0.50±0.20|0.67|0.75±0.17|1.00|"
    record = json.loads(json.dumps(both.to_dict(), allow_nan=False))
    assert [column["overall"] for column in record["ratios"]] == [pytest.approx(2 / 3), 1]
    assert [one["settings"]["steps"] for one in record["runs"]] == [1, 2]
    assert record["against"]["scores"] == dict.fromkeys([*TASKS, "overall"], 0.75)
    assert record["settings"] == SAME
    assert both.sheet is None


def test_of_a_reference_that_got_nothing_right_there_is_no_share(tmp_path: Path) -> None:
    reference = read_reference(save(made(20, 0), tmp_path / "none.json"), SAME)
    both = Comparison(runs=[made(1, 0.5)], reference=reference)
    assert both.to_dict()["ratios"][0]["overall"] is None
    assert both.table().splitlines()[-1].replace(" ", "").endswith("|-|")


@pytest.mark.parametrize("damage", ["absent", "text", "no scores", "several runs"])
def test_what_is_no_report_is_refused(damage: str, teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    if damage == "text":
        file.write_text("words")
    elif damage == "no scores":
        file.write_text('{"metric": "autoencoder", "settings": {}}')
    elif damage == "several runs":
        save(Comparison(runs=[made(1, 0.5), made(2, 0.5)]), file)
    sentence = (
        "There is no file .*other.json" if damage == "absent" else "other.json is no report of one run of geneval"
    )
    with pytest.raises(InvalidInput, match=sentence):
        read_reference(file, SAME)


@pytest.mark.parametrize(("name", "value"), [("prompts", 5), ("images", 2), ("seed", 1)])
def test_scores_of_other_prompts_or_seeds_do_not_compare(name: str, value: int, teacher: Path) -> None:
    with pytest.raises(InvalidInput, match=f"made with `{name}` {SAME[name]}, not with {value}, so"):
        read_reference(teacher, {**SAME, name: value})


def test_several_numbers_of_steps_are_measured_each(tiny_parts: Parts, tmp_path: Path) -> None:
    def measured(**more: Any) -> Any:
        return run("geneval", tiny_parts, Settings(prompts=1, images=1, guidance=1.0, **more), tell)

    done: list[tuple[int, int]] = []

    def tell(*step: int) -> None:
        done.append((step[0], step[1]))

    both = measured(steps=(1, 2))
    assert done == [(6, 12), (12, 12)]
    alone = measured(steps=(2,))
    assert both.to_dict()["runs"][1] == alone.to_dict()
    assert both.sheet.height > 2 * alone.sheet.height
    file = save(alone, tmp_path / "alone.json")
    again = measured(steps=(1,), against=file)
    assert again.to_dict()["against"]["settings"]["steps"] == 2
    assert "tiny, 2 steps" in again.table()
    save_sheet(again, tmp_path / "sheet.png")
