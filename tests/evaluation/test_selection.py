"""The best of many: the bracket, its arithmetic, and the pictures that come out."""

import random
from collections.abc import Sequence

import pytest
from PIL import Image

from sana.engine.generate import generate_images
from sana.engine.metadata import read_metadata
from sana.engine.parts import Parts
from sana.engine.request import Request, Result
from sana.errors import InvalidInput
from sana.evaluation.selection import Bracket, Opinion, draw_best


def opinions(count: int, rng: random.Random) -> list[Opinion]:
    return [Opinion(matches=rng.random() < 0.5, score=float(rng.randrange(5))) for _ in range(count)]


def played(given: Sequence[Opinion], keep: int) -> list[int]:
    bracket = Bracket(len(given), keep)
    out = [bracket.add(index, opinion) for index, opinion in enumerate(given)]
    assert sum(one is not None for one in out) == len(given) - keep  # the matches that were played
    winners = [winner for winner in bracket.winners if winner is not None]
    assert sorted([*winners, *(one for one in out if one is not None)]) == list(range(len(given)))
    return winners


def by_rounds(given: Sequence[Opinion], keep: int) -> list[int]:
    """Neighbours against neighbours, round after round, for powers of two."""
    left = list(range(len(given)))
    while len(left) > keep:
        left = [b if given[b].beats(given[a]) else a for a, b in zip(left[::2], left[1::2], strict=True)]
    return left


@pytest.mark.parametrize(("count", "keep"), [(2, 1), (8, 1), (8, 4), (32, 4), (64, 2)])
def test_powers_of_two_are_played_in_rounds_of_neighbours(count: int, keep: int) -> None:
    rng = random.Random(0)
    for _ in range(200):
        given = opinions(count, rng)
        assert played(given, keep) == by_rounds(given, keep)


@pytest.mark.parametrize(("count", "keep"), [(3, 1), (7, 1), (5, 4), (7, 3), (11, 2), (100, 7)])
def test_any_number_has_as_many_winners_as_asked_and_the_best_is_among_them(count: int, keep: int) -> None:
    rng = random.Random(1)
    for _ in range(100):
        given = opinions(count, rng)
        winners = played(given, keep)
        assert len(winners) == keep
        assert not any(
            one.beats(given[max(winners, key=lambda w: (given[w].matches, given[w].score))]) for one in given
        )


def test_the_winners_need_not_be_the_best() -> None:
    given = [Opinion(matches=True, score=score) for score in (9.0, 8.0, 1.0, 0.0)]
    assert played(given, 2) == [0, 2]


def test_a_yes_goes_before_every_no_and_the_earlier_of_equals_stays() -> None:
    yes, sure_no, no = (Opinion(matches=m, score=s) for m, s in ((True, -5.0), (False, -9.0), (False, 3.0)))
    assert played([no, yes], 1) == [1]
    assert played([sure_no, no], 1) == [1]
    assert played([no, no], 1) == [0]


def test_with_a_perfect_judge_one_of_n_is_right_as_often_as_arithmetic_says() -> None:
    rng, trials, right = random.Random(2), 10_000, 0
    for _ in range(trials):
        given = [Opinion(matches=rng.random() < 0.3, score=0.0) for _ in range(8)]
        right += given[played(given, 1)[0]].matches
    assert pytest.approx(0.942, abs=5e-4) == 1 - 0.7**8
    assert right / trials == pytest.approx(1 - 0.7**8, abs=0.007)  # three standard deviations


class BySeed:
    """Prefers the picture drawn third."""

    name = "third"

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []

    def judge(self, prompt: str, picture: Image.Image) -> Opinion:
        self.seen.append((prompt, picture.tobytes()))
        return Opinion(matches=True, score=-abs(len(self.seen) - 3.0))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_winner_is_the_picture_of_its_own_seed_and_its_record_draws_it_again(
    tiny_parts: Parts, tmp_path: object, batch_size: int
) -> None:
    from pathlib import Path

    from sana.engine.images import save_png

    request = Request(prompt="a fox", seed=5, steps=2, batch_size=batch_size)
    judge = BySeed()
    events = list(draw_best(tiny_parts, request, judge, 4))
    (result,) = [event for event in events if isinstance(event, Result)]
    assert sum(not isinstance(event, Result) for event in events) == 2 * 4 // batch_size
    assert [prompt for prompt, _ in judge.seen] == ["a fox"] * 4
    assert len({pixels for _, pixels in judge.seen}) == 4
    assert list(result.seeds) == [7]
    alone = generate_images(tiny_parts, request.replace(seed=7))
    assert result.images[0].tobytes() == alone.images[0].tobytes()
    file = save_png(result, 0, Path(str(tmp_path)) / "a.png")
    metadata = read_metadata(file)
    assert metadata.record is not None
    assert metadata.record["selection"] == {
        "judge": "third", "candidates": 4, "first_seed": 5, "seed": 7, "matches": True, "score": 0.0,
    }  # fmt: skip
    again = generate_images(tiny_parts, metadata.request())
    assert again.images[0].tobytes() == result.images[0].tobytes()


def test_several_winners_come_each_with_its_seed(tiny_parts: Parts) -> None:
    *_, result = draw_best(tiny_parts, Request(prompt="a fox", seed=0, steps=1, count=2), BySeed(), 5)
    assert isinstance(result, Result)
    assert list(result.seeds) == [2, 3]
    assert [one["seed"] for one in result.selection] == [2, 3]
    assert len(result.images) == 2


@pytest.mark.parametrize(
    ("count", "candidates", "words"),
    [(1, 1, "from 2 to 2048, not 1"), (1, 4096, "from 2 to 2048"), (4, 4, "nothing to choose for 4 pictures")],
)
def test_no_choice_is_refused(tiny_parts: Parts, count: int, candidates: int, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        next(draw_best(tiny_parts, Request(prompt="a fox", count=count), BySeed(), candidates))
    with pytest.raises(InvalidInput, match="past 9007199254740991"):
        next(draw_best(tiny_parts, Request(prompt="a fox", seed=2**53 - 2), BySeed(), 8))


def test_a_judge_that_gives_no_number_is_named(tiny_parts: Parts) -> None:
    class Broken(BySeed):
        def judge(self, prompt: str, picture: Image.Image) -> Opinion:
            return Opinion(matches=True, score=float("nan"))

    with pytest.raises(InvalidInput, match="The judge third gave the score nan"):
        list(draw_best(tiny_parts, Request(prompt="a fox", seed=0, steps=1), Broken(), 2))
