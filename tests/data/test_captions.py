"""Which caption is read: the published numbers, the ways out, dropout, trigger words."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sana.data.captions import CaptionChoice, choose, is_wanted, probabilities
from sana.data.samples import Caption
from sana.errors import InvalidInput


def scored(*scores: float | None) -> list[Caption]:
    return [Caption(text=f"t{i}", score=score, name=f"n{i}") for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((28, 26, 24), (0.677, 0.323, 0)),
        ((30, 29, 27), (0.4852, 0.3457, 0.1692)),
        ((26,), (1,)),
        ((40, 40), (0.5, 0.5)),
    ],
)
def test_the_published_numbers(scores: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert probabilities(scored(*scores)) == pytest.approx(expected, abs=5e-4)


def test_draws_follow_the_probabilities() -> None:
    rng, captions = random.Random(1), scored(30, 29, 27)
    counts = Counter(choose(captions, rng) for _ in range(20_000))
    for text, share in zip(("t0", "t1", "t2"), probabilities(captions), strict=True):
        assert counts[text] / 20_000 == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize(
    ("scores", "choice", "expected"),
    [
        ((20, 24, 22), CaptionChoice(), [0, 1, 0]),  # none reaches the threshold: the best
        ((None, 26, None), CaptionChoice(), [0, 1, 0]),
        ((0, 0), CaptionChoice(threshold=0), [1, 0]),
        ((30, 15), CaptionChoice(threshold=10, temperature=1), [2 / 3, 1 / 3]),
        ((30, 29), CaptionChoice(temperature=0), [0.967376, 0.032624]),  # as 0.01
        ((30, 29), CaptionChoice(mode="first"), [1, 0]),
        ((29, 30), CaptionChoice(mode="weight"), [0.5, 0.5]),
        ((29, 30), CaptionChoice(proportions={"n0": 1, "n1": 3}), [0.25, 0.75]),
        ((29, 30), CaptionChoice(proportions={"other": 1}), [1, 0]),
    ],
)
def test_ways_out(scores: tuple[float, ...], choice: CaptionChoice, expected: list[float]) -> None:
    assert probabilities(scored(*scores), choice) == pytest.approx(expected, abs=1e-4)


def test_without_scores_the_text_that_came_with_the_picture_is_read() -> None:
    captions = [Caption(text="a", name="vlm"), Caption(text="b")]
    assert probabilities(captions, CaptionChoice(mode="score")) == [0, 1]
    assert probabilities(captions) == [0.5, 0.5]
    assert probabilities([Caption(text="a", weight=1), Caption(text="b", weight=3)]) == [0.25, 0.75]
    assert probabilities([Caption(text="a", weight=0), Caption(text="b", weight=0)]) == [1, 0]


def test_missing_captions_are_empty() -> None:
    assert choose([], random.Random(0)) == ""


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.floats(0, 100), st.floats(0, 100), st.integers())
def test_some_caption_is_always_drawn(scores: list[float], threshold: float, temperature: float, seed: int) -> None:
    choice = CaptionChoice(threshold=threshold, temperature=temperature)
    shares = probabilities(scored(*scores), choice)
    assert sum(shares) == pytest.approx(1)
    assert all(share >= 0 for share in shares)
    text = choose(scored(*scores), random.Random(seed), choice)
    drawn = int(text[1:])
    assert shares[drawn] > 0
    assert scores[drawn] >= threshold or scores[drawn] == max(scores)


def test_dropout() -> None:
    rng = random.Random(2)
    dropped = sum(choose(scored(30), rng, CaptionChoice(dropout=0.1)) == "" for _ in range(10_000))
    assert dropped / 10_000 == pytest.approx(0.1, abs=0.01)
    assert choose(scored(30), rng, CaptionChoice(dropout=1)) == ""
    assert all(choose(scored(30), rng) == "t0" for _ in range(1000))


def test_the_random_state_moves_alike_whatever_is_drawn() -> None:
    states = set()
    for choice in (CaptionChoice(), CaptionChoice(dropout=1), CaptionChoice(mode="first", trigger="sks")):
        rng = random.Random(3)
        choose(scored(30, 20), rng, choice)
        states.add(rng.random())
    assert len(states) == 1


@pytest.mark.parametrize(
    ("text", "trigger", "expected"),
    [
        ("a [trigger] in [trigger] snow", "sks dog", "a sks dog in sks dog snow"),
        ("a dog in the snow", "sks", "sks, a dog in the snow"),
        ("a photo of SKS in the snow", "sks", "a photo of SKS in the snow"),
        ("a dog", "", "a dog"),
    ],
)
def test_trigger_words(text: str, trigger: str, expected: str) -> None:
    assert choose([Caption(text=text)], random.Random(0), CaptionChoice(trigger=trigger)) == expected


def test_a_place_for_a_trigger_needs_one() -> None:
    with pytest.raises(InvalidInput, match=r"'a \[trigger\]' has \[trigger\] in it, but no trigger is set"):
        choose([Caption(text="a [trigger]")], random.Random(0))


def test_pictures_whose_captions_all_score_low_can_be_left_out() -> None:
    choice = CaptionChoice(least_best=22)
    assert not is_wanted(scored(21.9, 10), choice)
    assert is_wanted(scored(22, 10), choice)
    assert is_wanted(scored(None), choice)
    assert is_wanted(scored(0), CaptionChoice())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "wieght"}, r"must be one of auto, score, weight, first, not 'wieght'\. Did you mean 'weight'\?"),
        ({"dropout": 1.5}, "`dropout` of the captions must lie from 0 to 1 but is 1.5"),
        ({"threshold": float("nan")}, "`threshold` of the captions must lie from 0 to 100 but is nan"),
        ({"temperature": -1}, "`temperature`"),
        ({"least_best": 101}, "`least_best`"),
        ({"mode": "score", "proportions": {"a": 1}}, "choose by weight"),
        ({"proportions": {"a": -1}}, "numbers of at least 0"),
        ({"proportions": {"a": 0}}, "are all 0"),
    ],
)
def test_choices_that_make_no_sense_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        CaptionChoice(**settings)  # type: ignore[arg-type]
