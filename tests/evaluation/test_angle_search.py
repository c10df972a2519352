"""The greedy search for angles, and the command around it."""

import itertools
from collections.abc import Sequence

import pytest

from sana.errors import InvalidInput
from sana.evaluation.angles import FIRST, LATER, search

BEST = (1.55, 0.9, 0.4)


def test_each_number_of_steps_adds_the_best_angle_to_those_before() -> None:
    asked: list[tuple[float, ...]] = []

    def judge(angles: Sequence[float]) -> float:
        asked.append(tuple(angles))
        assert angles[-1] == 0
        return -sum(abs(angle - best) for angle, best in zip(angles[:-1], BEST, strict=False))

    found = search(judge, 3)
    assert {steps: one.angles for steps, one in found.items()} == {
        1: (1.55, 0.0), 2: (1.55, 0.9, 0.0), 3: (1.55, 0.9, 0.4, 0.0)
    }  # fmt: skip
    assert all(before > after for angles in asked for before, after in itertools.pairwise(angles))
    assert len(asked) == len(FIRST) + len(LATER) + sum(angle < 0.9 for angle in LATER)


def test_of_equals_the_largest_is_taken_and_the_search_ends_where_no_angle_is_left() -> None:
    found = search(lambda _: 1.0, 5, first=(1.5, 1.57), later=(0.5, 0.9))
    assert [one.angles[:-1] for one in found.values()] == [(1.57,), (1.57, 0.9), (1.57, 0.9, 0.5)]


@pytest.mark.parametrize("steps", [0, 9])
def test_an_impossible_number_of_steps_is_refused(steps: int) -> None:
    with pytest.raises(InvalidInput, match="from 1 to 8"):
        search(lambda _: 1.0, steps)
