"""Reads a prompt of the drawn world: which things it asks for, how many, in which colour, and where.

English, Chinese, emoji and mixtures of them, in the wordings that `data.cutout_captions` uses and near ones; whatever
else stands there is passed over.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sana.data.cutout_captions import (
    COLOURS_EMOJI,
    COLOURS_ZH,
    EMOJI,
    NOUNS_ZH,
    NUMBERS_EN,
    NUMBERS_ZH,
    PLURALS,
    RELATIONS_EMOJI,
    RELATIONS_EN,
    RELATIONS_ZH,
    SIZES_ZH,
)
from sana.data.cutouts import COLOURS, Relation
from sana.evaluation.detector import Detection
from sana.evaluation.rules import relations

_SELECTOR = "\ufe0f"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Things of one kind that a prompt asks for."""

    kind: str
    count: int = 1
    colour: str | None = None


class Place(NamedTuple):
    """The things number `one` are in `relation` to those number `other`."""

    one: int
    relation: Relation
    other: int


@dataclass(frozen=True, kw_only=True)
class Wish:
    """All that a prompt asks for."""

    things: tuple[Asked, ...]
    places: tuple[Place, ...] = field(default=())


def read(prompt: str) -> Wish:
    """Return what a prompt asks for; no things at all where it names none of the drawn world."""
    things: list[Asked] = []
    found: list[tuple[int, Relation, str]] = []  # how many things stood before it
    count, colour, last = None, None, None
    for kind, value, text in _tokens(prompt):
        if kind == "number":
            count = int(value)
        elif kind == "colour":
            colour = value
        elif kind == "thing":
            repeated = last == (kind, value) and text == EMOJI[value].rstrip(_SELECTOR)
            if repeated and things and count is None and colour is None:
                things[-1] = Asked(kind=value, count=things[-1].count + 1, colour=things[-1].colour)
            else:
                things.append(Asked(kind=value, count=count or 1, colour=colour))
            count = colour = None
        elif kind in ("relation", "behind"):
            found.append((len(things), value, kind))  # type: ignore[arg-type]
        elif kind == "it" and found:
            found[-1] = (*found[-1][:2], "it")
        if kind == "other":
            count = colour = None
        last = (kind, value)
    ends = {"relation": (-1, 0), "behind": (-2, -1), "it": (-1, -2)}
    placed = [Place(at + ends[how][0], relation, at + ends[how][1]) for at, relation, how in found]
    inside = range(len(things))
    return Wish(things=tuple(things), places=tuple(p for p in placed if p.one in inside and p.other in inside))


def holds(wish: Wish, found: Sequence[Detection]) -> list[bool]:
    """Return which of a prompt's demands the things that were found fulfil.

    For each of its things: one is there, one is there in its colour, and they are as many. For each place: all of them
    are there. At last: nothing else is there.
    """
    groups = [[one for one in found if one.kind == a.kind and a.colour in (None, one.colour)] for a in wish.things]
    answers = []
    for asked, group in zip(wish.things, groups, strict=True):
        answers.append(any(one.kind == asked.kind for one in found))
        if asked.colour is not None:
            answers.append(bool(group))
        same = [a for a in wish.things if a.kind == asked.kind and asked.colour in (None, a.colour)]
        answers.append(len(group) == sum(a.count for a in same))
    for place in wish.places:
        pairs = [(one, other) for one in groups[place.one] for other in groups[place.other]]
        answers.append(bool(pairs) and all(place.relation in relations(*pair) for pair in pairs))
    return [*answers, len(found) == sum(asked.count for asked in wish.things)]


def _tokens(prompt: str) -> Iterator[tuple[str, str, str]]:
    """Yield what each known word is, which, and the word; runs of unknown letters are "other"."""
    text, known = prompt.lower().replace(_SELECTOR, ""), _lexicon()
    for match in _pattern().finditer(text):
        word = " ".join(match[0].split())
        kind, value = known.get(word, ("other", ""))
        if kind != "skip":
            yield kind, value, word


@functools.cache
def _lexicon() -> dict[str, tuple[str, str]]:
    words: dict[str, tuple[str, str]] = {}
    for kind, (measure, noun) in NOUNS_ZH.items():
        singular = dict.fromkeys((kind, PLURALS.get(kind, kind + "s"), noun, EMOJI[kind]), ("thing", kind))
        words |= {measure: ("skip", ""), **singular}
    for colour in COLOURS:
        named = (colour, COLOURS_ZH[colour], COLOURS_ZH[colour].rstrip("色"), COLOURS_EMOJI[colour])
        words |= dict.fromkeys(named, ("colour", colour))
    for number, names in NUMBERS_EN.items():
        words |= dict.fromkeys((*names, NUMBERS_ZH[number], str(number)), ("number", str(number)))
    words |= {"an": ("number", "1"), "二": ("number", "2"), "it": ("it", "")}
    for relation, phrases in RELATIONS_EN.items():
        words |= dict.fromkeys(phrases, ("relation", relation))
        words |= dict.fromkeys((f"的{place}" for place in RELATIONS_ZH[relation]), ("behind", relation))
        words |= {RELATIONS_EMOJI[relation]: ("relation", relation)}
    words |= dict.fromkeys(("small", "medium", "large", "big", *SIZES_ZH.values(), "的"), ("skip", ""))
    return {word.replace(_SELECTOR, ""): meaning for word, meaning in words.items()}


@functools.cache
def _pattern() -> re.Pattern[str]:
    """Return what splits a prompt: known words, the longest first, else a run of letters or a single sign."""
    latin = [word for word in _lexicon() if word.isascii()]
    others = [word for word in _lexicon() if not word.isascii()]

    def joined(words: Sequence[str]) -> str:
        escaped = (r"\s+".join(map(re.escape, word.split())) for word in sorted(words, key=len, reverse=True))
        return "|".join(escaped)

    return re.compile(rf"(?<![a-z0-9])(?:{joined(latin)})(?![a-z0-9])|{joined(others)}|[a-z0-9]+|[^\sa-z0-9]")
