"""The benchmark on models whose every picture is known: perfect, swapped, mirrored, blank."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sana.data.cutouts import SIZE, Scene, render
from sana.errors import InvalidInput
from sana.evaluation.detector import detect
from sana.evaluation.geneval import GenevalReport, evaluate
from sana.evaluation.prompts import TASKS, Prompt, all_prompts, prompts_of
from sana.evaluation.rules import is_right

Picture = NDArray[np.uint8]
PROMPTS = 24


@pytest.fixture(scope="module")
def pictures() -> dict[str, Picture]:
    """The true picture of every prompt, by its text."""
    prompts = all_prompts(PROMPTS)
    rendered = {scene: render(scene) for scene in {prompt.scene for prompt in prompts}}
    return {prompt.text: rendered[prompt.scene] for prompt in prompts}


@pytest.fixture(scope="module")
def perfect(pictures: dict[str, Picture]) -> GenevalReport:
    def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
        return [pictures[prompt] for prompt in prompts]

    return evaluate(draw, prompts=PROMPTS, images=1, seed=7)


def correct(prompt: Prompt, scene: Scene, change: Callable[[Picture], Picture] = lambda picture: picture) -> bool:
    return is_right(detect(np.ascontiguousarray(change(render(scene)))), prompt.include, prompt.exclude)


def with_swapped_colours(scene: Scene) -> Scene:
    first, second = scene.groups
    colours = {first.kind: second.colour, second.kind: first.colour}
    return dataclasses.replace(
        scene, things=tuple(dataclasses.replace(t, colour=colours[t.kind]) for t in scene.things)
    )


def test_true_pictures_score_one_in_all_tasks(perfect: GenevalReport) -> None:
    for task in (*TASKS, None):
        assert perfect.score(task).share == 1
        assert perfect.score(task, flags="truth").share == 1
    assert perfect.score().total == len(TASKS) * PROMPTS


def test_true_pictures_fail_for_shuffled_captions(perfect: GenevalReport) -> None:
    shuffled = perfect.score(flags="shuffled")
    assert shuffled.total == len(TASKS) * PROMPTS
    assert shuffled.share is not None
    assert shuffled.share < 0.1


def test_swapped_colours_fail_in_attribution_but_not_in_counting() -> None:
    for prompt in prompts_of("colour attribution", 20)[::4]:
        assert correct(prompt, prompt.scene)
        assert not correct(prompt, with_swapped_colours(prompt.scene))
    for prompt in prompts_of("counting", 20)[::4]:
        (group,) = prompt.scene.groups
        other = "pink" if group.colour != "pink" else "blue"
        things = tuple(dataclasses.replace(thing, colour=other) for thing in prompt.scene.things)
        assert correct(prompt, dataclasses.replace(prompt.scene, things=things))


def test_mirrored_pictures_turn_left_into_right() -> None:
    for prompt in prompts_of("position", 32)[::4]:
        across = prompt.scene.relation in ("left", "right")
        assert correct(prompt, prompt.scene)
        assert correct(prompt, prompt.scene, lambda picture: picture[:, ::-1]) is not across


def test_blank_pictures_score_nothing() -> None:
    blank = np.full((SIZE, SIZE, 3), 240, np.uint8)
    report = evaluate(lambda prompts, seeds: [blank] * len(prompts), prompts=2, images=2)
    assert report.score().share == 0
    assert report.score(flags="shuffled").share in (0, None)


def test_every_prompt_is_drawn_with_every_seed_in_batches() -> None:
    calls: list[tuple[list[str], list[int]]] = []
    steps: list[tuple[int, int]] = []

    def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
        calls.append((prompts, seeds))
        return [np.zeros((SIZE, SIZE, 3), np.uint8)] * len(prompts)

    evaluate(draw, prompts=1, images=3, seed=5, batch_size=4, progress=lambda *done: steps.append(done))
    assert [len(prompts) for prompts, _ in calls] == [4, 4, 4, 4, 2]
    texts = [text for prompts, _ in calls for text in prompts]
    assert texts == [prompt.text for prompt in all_prompts(1) for _ in range(3)]
    assert [seed for _, seeds in calls for seed in seeds] == [5, 6, 7] * 6
    assert steps == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]


def test_each_flag_belongs_to_its_prompt_and_seed(pictures: dict[str, Picture]) -> None:
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)

    def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
        return [pictures[p] if (seed == 1) == (p == "🏠") else blank for p, seed in zip(prompts, seeds, strict=True)]

    report = evaluate(draw, prompts=4, images=3, batch_size=5)
    for verdict in report.verdicts:
        inverse = verdict.prompt.text != "🏠"
        assert list(verdict.right) == [inverse, not inverse, inverse]
    assert report.score("single object", "emoji").share == pytest.approx(1 / 3)
    assert report.score("single object", "zh").share == pytest.approx(2 / 3)
    assert report.score("single object").share == pytest.approx(7 / 12)


def test_the_ceiling_is_judged_on_restored_pictures(pictures: dict[str, Picture]) -> None:
    def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
        return [pictures[prompt] for prompt in prompts]

    def restore(originals: list[Picture]) -> list[Picture]:
        return [np.full_like(picture, 230) if index % 2 else picture for index, picture in enumerate(originals)]

    assert evaluate(draw, prompts=8, images=1).score(flags="ceiling").share is None
    report = evaluate(draw, prompts=8, images=1, restore=restore)
    assert report.score(flags="ceiling").share == 0.5
    assert report.score().share == 1


def test_the_report_is_a_table_json_and_a_sheet(perfect: GenevalReport) -> None:
    lines = perfect.table().splitlines()
    headings = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert headings[:6] == ["task", "score", "en", "zh", "emoji", "mixed"]
    assert headings[6:] == ["shuffled captions", "autoencoder ceiling", "ground truth"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*TASKS, "overall"]
    assert "1.00 ± 0.00" in lines[-1]
    record = json.loads(json.dumps(perfect.to_dict(), allow_nan=False))
    assert record["settings"] == {"prompts": PROMPTS, "images": 1, "seed": 7}
    assert record["scores"]["overall"]["score"] == {
        "share": 1.0,
        "half_width": 0.0,
        "pictures": len(TASKS) * PROMPTS,
    }
    assert record["scores"]["position"]["zh"]["pictures"] == PROMPTS / 4
    assert record["scores"]["position"]["autoencoder ceiling"]["share"] is None
    assert record["prompts"][1] == {
        "task": "single object",
        "language": "zh",
        "text": "一张图片，画一座房子",
        "meaning": "a house",
        "right": [True],
    }
    sheet = perfect.sheet
    assert sheet is not None
    assert sheet.width > 6 * 168
    assert sheet.height > 6 * 168


def test_the_sheet_shows_the_first_picture_of_each_prompt(pictures: dict[str, Picture]) -> None:
    blank = np.full((SIZE, SIZE, 3), 240, np.uint8)

    def sheet(images: int, blank_from: int, batch_size: int) -> Picture:
        def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
            return [pictures[p] if seed < blank_from else blank for p, seed in zip(prompts, seeds, strict=True)]

        drawn = evaluate(draw, prompts=8, images=images, batch_size=batch_size).sheet
        assert drawn is not None
        # Without the headings, which hold the score.
        return np.asarray(drawn)[60:250]

    assert np.array_equal(sheet(1, 1, 5), sheet(3, 1, 7))
    assert not np.array_equal(sheet(1, 1, 5), sheet(1, 0, 5))


def test_two_runs_give_the_same_report(perfect: GenevalReport, pictures: dict[str, Picture]) -> None:
    def draw(prompts: list[str], seeds: list[int]) -> list[Picture]:
        return [pictures[prompt] for prompt in prompts]

    again = evaluate(draw, prompts=PROMPTS, images=1, seed=7, batch_size=5)
    assert json.dumps(again.to_dict()) == json.dumps(perfect.to_dict())


def test_bad_orders_are_refused() -> None:
    with pytest.raises(InvalidInput, match="1 or more"):
        evaluate(lambda prompts, seeds: [], prompts=0)
    with pytest.raises(InvalidInput, match="0 pictures were drawn for 24"):
        evaluate(lambda prompts, seeds: [], prompts=1)
