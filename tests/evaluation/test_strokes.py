"""Strokes of control pictures and how well they lie on each other."""

from typing import get_args, get_type_hints

import numpy as np
import pytest

from sana.errors import InvalidInput
from sana.evaluation.runner import Settings
from sana.evaluation.strokes import STROKED, control_picture, overlap, strokes


def line(column: int, width: int = 1) -> np.ndarray:
    mask = np.zeros((32, 32), bool)
    mask[:, column : column + width] = True
    return mask


def test_without_tolerance_it_is_intersection_over_union() -> None:
    one, other = line(10, 4), line(12, 6)
    assert overlap(one, other) == (one & other).sum() / (one | other).sum() == 2 / 8
    assert overlap(one, one) == 1
    assert overlap(one, line(20)) == 0


def test_pixels_may_miss_each_other_by_the_tolerance_and_no_more() -> None:
    one = line(10)
    assert [overlap(one, line(10 + shift), 2) for shift in range(5)] == [1, 1, 1, 0, 0]
    # Of 3 columns beside 1: two are near enough, one is not; the mean of 2 and 1 is met, 1 is not.
    assert overlap(one, line(11, 3), 2) == pytest.approx(1.5 / 2.5)
    assert overlap(one, line(8, 5), 2) == overlap(line(8, 5), one, 2) == 1


def test_nothing_drawn_follows_nothing_and_nothing_follows_it() -> None:
    empty = np.zeros((32, 32), bool)
    assert overlap(empty, line(3), 2) == overlap(line(3), empty, 2) == 0
    assert overlap(empty, empty, 2) == 1


@pytest.mark.parametrize("kind", STROKED)
def test_strokes_lie_where_the_picture_changes_whatever_their_colour(kind: str) -> None:
    picture = np.full((256, 256, 3), 240, np.uint8)
    picture[80:180, 60:140] = (30, 60, 200)
    found = strokes(kind, picture)
    assert 0.001 < found.mean() < 0.1
    assert found[100:160, 57:63].any(axis=1).all()
    assert not found[:70].any()
    assert not found[95:165, 75:125].any()
    assert not strokes(kind, np.full_like(picture, 99)).any()


def test_kinds_without_strokes_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"kind soft-edge has no strokes .* canny, scribble, ink"):
        control_picture("soft-edge", np.zeros((64, 64, 3), np.uint8))
    choices, _ = get_args(get_type_hints(Settings)["control"])
    assert get_args(choices) == tuple(STROKED)
