"""The prompt set: fixed, paired across the languages, and asking for what training never draws."""

import random
import re
from collections import Counter
from itertools import product

import pytest

from sana.data.cutout_captions import LANGUAGES, caption
from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import COLOURS, Group, is_held_out, sample_scene
from sana.errors import InvalidInput
from sana.evaluation.prompts import TASKS, Clause, Prompt, Task, all_prompts, prompts_of


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return all_prompts(50)


def of(asked: list[Prompt], task: Task) -> list[Prompt]:
    return [prompt for prompt in asked if prompt.task == task]


def test_fifty_prompts_of_each_task_always_the_same(asked: list[Prompt]) -> None:
    assert Counter(prompt.task for prompt in asked) == dict.fromkeys(TASKS, 50)
    assert all_prompts(50) == asked
    assert [prompt.text for prompt in prompts_of("position", 2)] == [
        "a photo of a sun on the left side of a mushroom",
        "一张图片，一个太阳在一朵蘑菇的左侧",
    ]


@pytest.mark.parametrize("task", TASKS)
def test_a_smaller_set_begins_a_larger_one(task: Task) -> None:
    assert prompts_of(task, 7) == prompts_of(task, 21)[:7]


def test_every_scene_is_asked_for_in_every_language(asked: list[Prompt]) -> None:
    for task in TASKS:
        prompts = of(asked, task)
        for start in range(0, 48, 4):
            four = prompts[start : start + 4]
            assert [prompt.language for prompt in four] == list(LANGUAGES)
            assert len({prompt.scene for prompt in four}) == 1
            assert len({(prompt.include, prompt.exclude) for prompt in four}) == 1
        assert Counter(prompt.language for prompt in prompts) == {"en": 13, "zh": 13, "emoji": 12, "mixed": 12}


def test_languages_look_like_themselves(asked: list[Prompt]) -> None:
    chinese, latin, emoji = re.compile("[一-鿿]"), re.compile("[a-z]"), re.compile("[⌀-⯿️🌀-🫿]")
    for prompt in asked:
        scripts = {script for script in (chinese, latin, emoji) if script.search(prompt.text)}
        expected = {"en": {latin}, "zh": {chinese}, "emoji": {emoji}}.get(prompt.language)
        assert scripts == expected if expected else len(scripts) >= 2, prompt.text


def paint_is_new(group: Group) -> bool:
    return is_held_out((group,), None)


def in_all_colours(prompt: Prompt, *, with_relation: bool) -> list[bool]:
    first, second = (group.kind for group in prompt.scene.groups)
    relation = prompt.scene.relation if with_relation else None
    return [
        is_held_out((Group(kind=first, colour=one), Group(kind=second, colour=other)), relation)
        for one, other in product(COLOURS, repeat=2)
    ]


def test_single_objects_cover_all_kinds(asked: list[Prompt]) -> None:
    prompts = of(asked, "single object")
    assert {prompt.include[0].kind for prompt in prompts} == set(KINDS)
    assert all(prompt.include[0] == Clause(kind=prompt.scene.groups[0].kind) for prompt in prompts)


def test_counting_asks_for_two_to_four_exactly(asked: list[Prompt]) -> None:
    prompts = of(asked, "counting")
    counts = Counter(prompt.include[0].count for prompt in prompts)
    assert set(counts) == {2, 3, 4}
    assert max(counts.values()) - min(counts.values()) <= 4
    for prompt in prompts:
        (wish,), (excess,) = prompt.include, prompt.exclude
        assert excess == Clause(kind=wish.kind, count=wish.count + 1)
        assert wish.colour is None


def test_wording_of_single_objects_and_counts_is_new(asked: list[Prompt]) -> None:
    """Openings are taken from a large sample of training captions."""
    rng = random.Random(0)
    seen = {caption(sample_scene(rng, counts=(n,)), rng).text for n in (1, 2, 3, 4) for _ in range(1500)}
    prompts = [prompt for task in ("single object", "counting") for prompt in of(asked, task)]
    assert not {prompt.text for prompt in prompts if prompt.language != "emoji"} & seen
    # The sample is large enough: it holds most of the same sentences with one opening less.
    plainer = {re.sub("^(draw |there is |画|剪纸，(?=画)|一张图片，(?=画))", "", prompt.text) for prompt in prompts}
    assert len(plainer & seen) > 20


def test_two_objects_are_never_drawn_together(asked: list[Prompt]) -> None:
    for prompt in of(asked, "two objects"):
        assert all(in_all_colours(prompt, with_relation=False))
        assert all(clause.colour is None and clause.relation is None for clause in prompt.include)


def test_colours_are_new_to_their_kinds(asked: list[Prompt]) -> None:
    for prompt in of(asked, "colours"):
        (clause,) = prompt.include
        assert paint_is_new(Group(kind=clause.kind, colour=clause.colour or ""))
        assert clause.count == 1


def test_positions_are_new_to_kinds_that_are_drawn_together(asked: list[Prompt]) -> None:
    prompts = of(asked, "position")
    for prompt in prompts:
        assert all(in_all_colours(prompt, with_relation=True))
        assert not all(in_all_colours(prompt, with_relation=False))
        target, moved = prompt.include
        assert (moved.relation, moved.target) == (prompt.scene.relation, 0)
        assert (moved.kind, target.kind) == tuple(group.kind for group in prompt.scene.groups)
        assert target.colour is moved.colour is None
    assert len({prompt.scene.relation for prompt in prompts}) == 4


def test_attributed_colours_are_new_together_but_not_alone(asked: list[Prompt]) -> None:
    for prompt in of(asked, "colour attribution"):
        first, second = prompt.scene.groups
        assert is_held_out((first, second), None)
        assert not paint_is_new(first)
        assert not paint_is_new(second)
        assert not all(in_all_colours(prompt, with_relation=False))
        assert first.colour != second.colour
        assert [(c.kind, c.colour) for c in prompt.include] == [
            (first.kind, first.colour),
            (second.kind, second.colour),
        ]


def test_the_meaning_is_plain_english(asked: list[Prompt]) -> None:
    for prompt in asked:
        assert prompt.meaning.isascii()
        for clause in prompt.include:
            assert clause.kind in prompt.meaning
            assert clause.colour is None or clause.colour in prompt.meaning


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(InvalidInput, match="position"):
        prompts_of("reading", 5)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="1 or more"):
        prompts_of("counting", 0)
