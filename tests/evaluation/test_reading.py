"""What a prompt of the drawn world asks for, and what of it a picture holds."""

import random

import pytest

from sana.data.cutout_captions import LANGUAGES, caption
from sana.data.cutouts import OPPOSITE, render, sample_scene
from sana.evaluation.detector import detect
from sana.evaluation.prompts import TASKS, Task, prompts_of
from sana.evaluation.reading import Asked, Place, Wish, holds, read
from sana.evaluation.rules import is_right


def placed(wish: Wish) -> set[tuple[str, str, str]]:
    """The places by kinds, each told from both sides."""
    told = {(wish.things[p.one].kind, p.relation, wish.things[p.other].kind) for p in wish.places}
    return told | {(other, OPPOSITE[relation], one) for one, relation, other in told}  # type: ignore[index]


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_of_the_world_are_read_as_they_were_meant(language: str) -> None:
    rng = random.Random(f"read/{language}")
    for _ in range(300):
        scene = sample_scene(rng)
        said = caption(scene, rng, language=language)  # type: ignore[arg-type]
        wish = read(said.text)
        meant = [
            Asked(kind=scene.groups[m.group].kind, count=scene.groups[m.group].count, colour=m.colour)
            for m in said.mentions
        ]
        assert list(wish.things) == meant, said.text
        assert bool(wish.places) == (said.relation is not None and len(scene.groups) == 2), said.text
        if said.relation is not None and len(scene.groups) == 2:
            first, second = scene.groups
            if first.kind != second.kind:
                assert (first.kind, said.relation, second.kind) in placed(wish), said.text


@pytest.mark.parametrize("task", TASKS)
def test_the_prompts_of_the_benchmark_hold_for_their_own_scenes_only(task: Task) -> None:
    prompts = prompts_of(task, 16)
    found = [detect(render(prompt.scene)) for prompt in prompts]
    for prompt, one in zip(prompts, found, strict=True):
        assert all(holds(read(prompt.text), one)), prompt.text
    for prompt in prompts:
        for one in found:
            if all(holds(read(prompt.text), one)):
                assert is_right(one, prompt.include, prompt.exclude), prompt.text


@pytest.mark.parametrize(
    ("prompt", "things", "places"),
    [
        ("a red fish above a yellow boat", [("fish", 1, "red"), ("boat", 1, "yellow")], [(0, "above", 1)]),
        ("A house with three small blue cats to the left of it", [("house", 1, None), ("cat", 3, "blue")],
         [(1, "left", 0)]),
        ("一只紫色的猫在一棵绿色的树的左边", [("cat", 1, "purple"), ("tree", 1, "green")], [(0, "left", 1)]),
        ("🟠🌙 ⬆️ 🟤🏠", [("moon", 1, "orange"), ("house", 1, "brown")], [(0, "above", 1)]),
        ("🔵❤️❤️❤️", [("heart", 3, "blue")], []),
        ("a sun on sky blue paper", [("sun", 1, None)], []),
        ("two 🐟, a heart and a red 树", [("fish", 2, None), ("heart", 1, None), ("tree", 1, "red")], []),
        ("a lighthouse in fog", [], []),
        ("above", [], []),
        ("", [], []),
    ],
)  # fmt: skip
def test_single_prompts(prompt: str, things: list[tuple[str, int, str]], places: list[tuple[int, str, int]]) -> None:
    wish = read(prompt)
    assert [(a.kind, a.count, a.colour) for a in wish.things] == things
    assert list(wish.places) == [Place(*place) for place in places]  # type: ignore[arg-type]


def test_every_demand_is_counted() -> None:
    wish = read("two red fish above a boat")
    assert holds(wish, []) == [False, False, False, False, False, False, False]
    found = detect(render(prompts_of("single object", 1)[0].scene))
    kind, colour = found[0].kind, found[0].colour
    assert holds(read(f"a {colour} {kind}"), found) == [True, True, True, True]
    assert holds(read(f"two {kind}s"), found) == [True, False, False]
    other = next(name for name in ("cat", "fish") if name != kind)
    assert holds(read(f"a {other} above a {kind}"), found) == [False, False, True, True, False, False]
