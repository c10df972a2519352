"""Captions say nothing untrue: each is read back by a parser that knows words, not scenes."""

import random
import re
from collections import Counter
from dataclasses import dataclass, field

import pytest

from sana.data.cutout_captions import (
    COLOURS_EMOJI,
    COLOURS_ZH,
    EMOJI,
    LANGUAGES,
    NOUNS_ZH,
    OPENINGS_EN,
    OPENINGS_ZH,
    RELATIONS_EMOJI,
    RELATIONS_EN,
    RELATIONS_ZH,
    Caption,
    Language,
    caption,
)
from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import BACKGROUNDS, COLOURS, OPPOSITE, Relation, Scene, sample_scene

Word = tuple[str, str]
"""What a word says: the sort of statement and its value."""


def lexicon() -> dict[str, Word]:
    words: dict[str, Word] = {}
    for kind in KINDS:
        plural = "fish" if kind == "fish" else kind + "s"
        words |= dict.fromkeys((kind, plural, NOUNS_ZH[kind][1]), ("kind", kind))
        words |= dict.fromkeys((EMOJI[kind], EMOJI[kind].rstrip("\ufe0f")), ("emoji", kind))
        words.setdefault(NOUNS_ZH[kind][0], ("filler", ""))
    for colour in COLOURS:
        words |= dict.fromkeys((colour, COLOURS_ZH[colour], COLOURS_EMOJI[colour]), ("colour", colour))
    numbers = {1: ("a", "an", "one", "一"), 2: ("two", "2", "两"), 3: ("three", "3", "三"), 4: ("four", "4", "四")}
    for number, spelled in numbers.items():
        words |= dict.fromkeys(spelled, ("number", str(number)))
    for size, spelled in {"small": ("small", "小"), "large": ("large", "big", "大")}.items():
        words |= dict.fromkeys(spelled, ("size", size))
    for relation in OPPOSITE:
        phrases = (*RELATIONS_EN[relation], *RELATIONS_ZH[relation], RELATIONS_EMOJI[relation])
        words |= dict.fromkeys(phrases, ("relation", relation))
    papers = {
        "cream": ("cream", "米色"),
        "sky": ("sky blue", "天蓝色"),
        "mint": ("mint", "薄荷色"),
        "grey": ("grey", "灰色"),
    }
    for paper, (english, chinese) in papers.items():
        words |= dict.fromkeys((f"on {english} paper", f"，{chinese}的纸"), ("paper", paper))
    words |= dict.fromkeys(filter(None, map(str.strip, (*OPENINGS_EN, *OPENINGS_ZH))), ("opening", ""))
    words |= dict.fromkeys(("的", "在", "it", "them"), ("filler", ""))
    words |= dict.fromkeys((",", "、", "and", "和"), ("joint", ""))
    words["with"] = ("with", "")
    return words


LEXICON = lexicon()
PATTERN = re.compile("|".join(map(re.escape, sorted(LEXICON, key=len, reverse=True))))


@dataclass
class Said:
    """A noun phrase as read."""

    kind: str = ""
    colour: str | None = None
    size: str | None = None
    number: int | None = None
    emoji: int = 0
    end: int = 0

    @property
    def count(self) -> int:
        return self.number or self.emoji


@dataclass
class Sentence:
    """A caption as read."""

    phrases: list[Said] = field(default_factory=list)
    relation: Relation | None = None
    inverted: bool = False
    paper: str | None = None


def words_of(text: str) -> list[tuple[Word, int]]:
    """The words in order, each with its end; every character but spaces must belong to one."""
    found, position = [], 0
    while position < len(text):
        if text[position] == " ":
            position += 1
            continue
        match = PATTERN.match(text, position)
        assert match, f"cannot read {text[position:]!r} of {text!r}"
        position = match.end()
        # A Latin word ends where a word ends: "a" is not the beginning of "above".
        if match.group()[-1].isascii() and match.group()[-1].isalnum():
            after = text[position : position + 1]
            assert not (after.isascii() and after.isalnum()), f"half a word at {text[position:]!r} of {text!r}"
        found.append((LEXICON[match.group()], position))
    return found


def read(text: str) -> Sentence:
    sentence, said = Sentence(), Said()
    for (sort, value), end in words_of(text):
        if sort == "emoji" and sentence.phrases and value == sentence.phrases[-1].kind and said == Said():
            sentence.phrases[-1].emoji += 1
            sentence.phrases[-1].end = end
        elif sort in ("kind", "emoji"):
            said.kind, said.emoji, said.end = value, int(sort == "emoji"), end
            sentence.phrases.append(said)
            said = Said()
        elif sort == "number":
            assert said.number is None
            said.number = int(value)
        elif sort in ("colour", "size"):
            assert getattr(said, sort) is None
            setattr(said, sort, value)
        elif sort == "relation":
            assert sentence.relation is None
            sentence.relation = value  # type: ignore[assignment]
        elif sort == "with":
            sentence.inverted = True
        elif sort == "paper":
            sentence.paper = value
    assert said == Said(), f"a phrase without a noun in {text!r}"
    return sentence


def drawn_captions(language: Language | None, count: int) -> list[tuple[Scene, Caption]]:
    rng = random.Random(f"captions/{language}")
    scenes = [sample_scene(rng, held_out=index % 5 == 0) for index in range(count)]
    return [(scene, caption(scene, rng, language=language)) for scene in scenes]


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_said_is_true_and_what_is_recorded_is_said(language: Language) -> None:
    for scene, said in drawn_captions(language, 1500):
        sentence = read(said.text)
        assert len(sentence.phrases) == len(said.mentions) == len(scene.groups)
        assert {mention.group for mention in said.mentions} == set(range(len(scene.groups)))
        for phrase, mention in zip(sentence.phrases, said.mentions, strict=True):
            group = scene.groups[mention.group]
            assert (phrase.kind, phrase.count) == (group.kind, group.count), said.text
            assert phrase.colour == mention.colour
            assert phrase.colour in (None, group.colour)
            assert phrase.size == mention.size
            assert phrase.size in (None, group.size)
            assert phrase.end == mention.end
        assert sentence.paper == said.background
        assert sentence.paper in (None, scene.background)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_relation_is_true_whichever_end_comes_first(language: Language) -> None:
    orders = Counter()
    for scene, said in drawn_captions(language, 1500):
        sentence = read(said.text)
        assert (sentence.relation is None) == (said.relation is None)
        assert said.relation in (None, scene.relation)
        if sentence.relation is None:
            continue
        moved = said.mentions[1 if sentence.inverted else 0].group
        assert scene.relation == (sentence.relation if moved == 0 else OPPOSITE[sentence.relation]), said.text
        orders[said.mentions[0].group] += 1
    assert min(orders[0], orders[1]) > 0.35 * sum(orders.values())


def test_a_caption_depends_on_scene_and_seed_only() -> None:
    scene = sample_scene(random.Random(1))
    one, same, other = (caption(scene, random.Random(seed)).text for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_a_recorded_caption() -> None:
    scene = sample_scene(random.Random(0))
    assert caption(scene, random.Random(1), language="en", plain=True).text == "four red hearts"
    assert caption(scene, random.Random(1), language="zh", plain=True).text == "四颗红色的心"
    assert caption(scene, random.Random(1), language="emoji", plain=True).text == "🔴❤️❤️❤️❤️"
    assert caption(scene, random.Random(1), language="mixed", plain=True).text == "4 red ❤️"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("said", [True, False])
def test_what_must_be_said_or_left_out(language: Language, said: bool) -> None:
    rng = random.Random(2)
    for _ in range(200):
        scene = sample_scene(rng, counts=(1, 1))
        text = caption(scene, rng, language=language, colours=said, relation=said, plain=True).text
        sentence = read(text)
        assert (sentence.relation is not None) is said
        assert all((phrase.colour is not None) is said for phrase in sentence.phrases)
        assert sentence.paper is None
        assert not any(phrase.size for phrase in sentence.phrases)
        assert not any(sort == "opening" for (sort, _), _ in words_of(text))


def test_languages_occur_as_often_as_they_should() -> None:
    texts = [said.text for _, said in drawn_captions(None, 3000)]
    latin, chinese = re.compile("[a-z]"), re.compile("[一-鿿]")
    emoji = re.compile("|".join({mark.rstrip("\ufe0f") for mark in (*EMOJI.values(), *COLOURS_EMOJI.values())}))
    scripts = Counter(
        "".join(name for name, script in (("l", latin), ("c", chinese), ("e", emoji)) if script.search(text))
        for text in texts
    )
    assert scripts["e"] / len(texts) == pytest.approx(0.15, abs=0.03)
    # Mixed captions that happen to use one script only count among the plain ones.
    assert 0.38 < scripts["l"] / len(texts) < 0.5
    assert 0.23 < scripts["c"] / len(texts) < 0.35
    assert sum(scripts[key] for key in ("lc", "le", "ce", "lce")) / len(texts) > 0.1


def test_things_are_left_out_as_often_as_they_should() -> None:
    drawn = drawn_captions("en", 3000)
    with_colour = [said.mentions[0].colour is not None for _, said in drawn]
    assert sum(with_colour) / len(drawn) == pytest.approx(0.85, abs=0.03)
    with_relation = [said.relation is not None for scene, said in drawn if scene.relation]
    assert sum(with_relation) / len(with_relation) == pytest.approx(0.8, abs=0.03)
    with_paper = Counter(said.background for _, said in drawn)
    assert with_paper[None] / len(drawn) == pytest.approx(0.75, abs=0.03)
    assert set(with_paper) == {None, *BACKGROUNDS}


def test_articles_fit_the_next_word() -> None:
    texts = [f" {said.text} " for _, said in drawn_captions("en", 2000)]
    assert not [text for text in texts if re.search(" a [aeiou]| an [^aeiou]", text)]
    assert any(" an orange" in text for text in texts)


def test_every_word_is_used() -> None:
    texts = [said.text for language in LANGUAGES for _, said in drawn_captions(language, 2000)]
    used = {word for text in texts for word in PATTERN.findall(text)}
    assert set(LEXICON) - used <= {"them"}
