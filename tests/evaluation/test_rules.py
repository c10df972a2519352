"""GenEval's clauses, one by one, on boxes made by hand."""

import math
from dataclasses import dataclass

import pytest

from sana.data.cutouts import Relation
from sana.evaluation.detector import Detection
from sana.evaluation.prompts import Clause
from sana.evaluation.rules import is_right, relations


@dataclass(frozen=True)
class Box:
    centre: tuple[float, float]
    size: tuple[float, float] = (0.0, 0.0)


def thing(kind: str, colour: str = "red", x: float = 0.0, y: float = 0.0, confidence: float = 1.0) -> Detection:
    return Detection(
        kind=kind, colour=colour, left=x - 10, top=y - 10, right=x + 10, bottom=y + 10, confidence=confidence
    )


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-50, 0), {"left"}),
        ((50, 0), {"right"}),
        ((0, -50), {"above"}),
        ((0, 50), {"below"}),
        ((0, 0), set()),
        ((1e-4, -1e-4), set()),
        ((50, 20), {"right"}),
        # A little to the inner side of 30 degrees the second relation holds too, a little outside it does not.
        ((math.cos(math.radians(31)), math.sin(math.radians(31))), {"right", "below"}),
        ((math.cos(math.radians(29)), math.sin(math.radians(29))), {"right"}),
    ],
)
def test_relation_of_points(offset: tuple[float, float], expected: set[Relation]) -> None:
    assert relations(Box((100 + offset[0], 80 + offset[1])), Box((100, 80))) == expected


@pytest.mark.parametrize(("x", "y"), [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_45_degrees_satisfy_two_relations(x: int, y: int) -> None:
    expected = {"right" if x > 0 else "left", "below" if y > 0 else "above"}
    assert relations(Box((30 * x, 30 * y)), Box((0, 0))) == expected


def test_an_offset_within_a_tenth_of_both_sizes_does_not_count() -> None:
    assert relations(Box((9.99, 0), (40, 40)), Box((0, 0), (60, 60))) == set()
    # 20.5 - 10 = 10.5, over the whole length of 20.5: 0.51 > 0.5. And 19 - 10 = 9, over 19: 0.47.
    assert relations(Box((20.5, 0), (40, 40)), Box((0, 0), (60, 60))) == {"right"}
    assert relations(Box((19, 0), (40, 40)), Box((0, 0), (60, 60))) == set()
    # Widths shorten x only, heights y only.
    assert relations(Box((0, 19), (40, 0)), Box((0, 0), (60, 0))) == {"below"}


def test_at_least_the_count() -> None:
    fish = Clause(kind="fish")
    assert is_right([thing("fish")], [fish])
    assert is_right([thing("fish"), thing("fish"), thing("cat")], [fish])
    assert not is_right([thing("cat")], [fish])
    assert not is_right([], [fish])
    assert not is_right([thing("fish")], [Clause(kind="fish", count=2)])


def test_counting_is_exact_through_the_exclusion() -> None:
    include, exclude = [Clause(kind="fish", count=2)], [Clause(kind="fish", count=3)]
    outcome = [is_right([thing("fish")] * count, include, exclude) for count in range(5)]
    assert outcome == [False, False, True, False, False]


def test_the_colour_is_that_of_the_most_confident() -> None:
    red_fish = [Clause(kind="fish", colour="red")]
    assert is_right([thing("fish", "red"), thing("fish", "blue")], red_fish)
    assert not is_right([thing("fish", "blue"), thing("fish", "red")], red_fish)


def test_attribution_needs_both_colours_at_their_things() -> None:
    wish = [Clause(kind="fish", colour="red"), Clause(kind="cat", colour="blue")]
    assert is_right([thing("cat", "blue"), thing("fish", "red")], wish)
    assert not is_right([thing("cat", "red"), thing("fish", "blue")], wish)
    assert not is_right([thing("fish", "red")], wish)


def test_a_relation_holds_between_all_pairs() -> None:
    wish = [Clause(kind="cat", count=2), Clause(kind="fish", relation="left", target=0)]
    cats = [thing("cat", x=150, y=20), thing("cat", x=150, y=-20)]
    assert is_right([*cats, thing("fish", x=20)], wish)
    assert not is_right([cats[0], thing("cat", x=-100), thing("fish", x=20)], wish)
    assert not is_right([*cats, thing("fish", x=300)], wish)


def test_no_more_than_sixteen_of_a_kind_are_looked_at() -> None:
    crowd = [thing("fish")] * 20
    assert is_right(crowd, [Clause(kind="fish", count=16)])
    assert not is_right(crowd, [Clause(kind="fish", count=17)])
