"""Exact captions of the drawn world, in English, Chinese, emoji, and all three mixed.

A caption may leave things out (a colour, the relation, the background) but never says anything untrue. Next to the
text it tells where each noun phrase ends and what has been said, so that a language model can be asked whether it
understood.
"""

import random
from dataclasses import dataclass
from typing import Literal

from sana.data.cutouts import OPPOSITE, Group, Relation, Scene

Language = Literal["en", "zh", "emoji", "mixed"]
LANGUAGES: tuple[Language, ...] = ("en", "zh", "emoji", "mixed")

PLURALS = {"fish": "fish"}
NOUNS_ZH = {
    "fish": ("条", "鱼"), "boat": ("艘", "船"), "house": ("座", "房子"), "tree": ("棵", "树"), "sun": ("个", "太阳"),
    "star": ("颗", "星星"), "heart": ("颗", "心"), "cat": ("只", "猫"), "flower": ("朵", "花"), "moon": ("个", "月亮"),
    "mushroom": ("朵", "蘑菇"), "umbrella": ("把", "伞"),
}  # fmt: skip
EMOJI = {
    "fish": "🐟", "boat": "⛵", "house": "🏠", "tree": "🌲", "sun": "☀️", "star": "⭐", "heart": "❤️", "cat": "🐱",
    "flower": "🌼", "moon": "🌙", "mushroom": "🍄", "umbrella": "☂️",
}  # fmt: skip
COLOURS_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "brown": "棕色",
}  # fmt: skip
COLOURS_EMOJI = {
    "red": "🔴", "orange": "🟠", "yellow": "🟡", "green": "🟢", "blue": "🔵", "purple": "🟣",
    "pink": "🩷", "brown": "🟤",
}  # fmt: skip
SIZES_ZH = {"small": "小", "large": "大"}
NUMBERS_EN = {1: ("a", "a", "one"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
NUMBERS_ZH = {1: "一", 2: "两", 3: "三", 4: "四"}
RELATIONS_EN: dict[Relation, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
RELATIONS_ZH: dict[Relation, tuple[str, ...]] = {
    "left": ("左边", "左侧"), "right": ("右边", "右侧"), "above": ("上面", "上方"), "below": ("下面", "下方"),
}  # fmt: skip
RELATIONS_EMOJI: dict[Relation, str] = {"left": "⬅️", "right": "➡️", "above": "⬆️", "below": "⬇️"}
PAPERS_EN = {"cream": "cream", "sky": "sky blue", "mint": "mint", "grey": "grey"}
PAPERS_ZH = {"cream": "米色", "sky": "天蓝色", "mint": "薄荷色", "grey": "灰色"}
OPENINGS_EN = (
    "",
    "",
    "",
    "",
    "a picture of ",
    "a photo of ",
    "an image of ",
    "a paper cut-out of ",
    "there is ",
    "draw ",
)
OPENINGS_ZH = ("", "", "", "一张图片，", "剪纸，", "画")


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A noun phrase: where it ends in the text, which group of the scene it names, and what it says of it."""

    end: int
    group: int
    colour: str | None
    size: str | None


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text, its noun phrases in order, and the relation and background it states (None: not said)."""

    text: str
    mentions: tuple[Mention, ...]
    relation: Relation | None
    """Of the scene's first group to its second, whichever is named first."""
    background: str | None


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A group's words, before they are placed in a sentence."""

    words: str
    group: int
    colour: str | None
    size: str | None


def _article(number: str, following: str) -> str:
    return "an" if number == "a" and following[:1] in "aeiou" else number


def _english(group: Group, colour: str | None, size: str | None, rng: random.Random, mix: bool) -> str:
    noun = PLURALS.get(group.kind, group.kind + "s") if group.count > 1 else group.kind
    shade = colour
    if mix:
        noun = rng.choice((noun, EMOJI[group.kind], NOUNS_ZH[group.kind][1]))
        shade = colour and rng.choice((colour, COLOURS_ZH[colour], COLOURS_EMOJI[colour]))
    words = [word for word in (size and {"large": rng.choice(("large", "big"))}.get(size, size), shade, noun) if word]
    return " ".join([_article(rng.choice(NUMBERS_EN[group.count]), words[0]), *words])


def _chinese(group: Group, colour: str | None, size: str | None, rng: random.Random, mix: bool) -> str:
    measure, noun = NOUNS_ZH[group.kind]
    shade = COLOURS_ZH[colour] if colour else ""
    if mix:
        noun = rng.choice((noun, EMOJI[group.kind], group.kind))
        shade = rng.choice((shade, COLOURS_EMOJI[colour], colour)) if colour else ""
    return NUMBERS_ZH[group.count] + measure + (SIZES_ZH[size] if size else "") + (shade + "的" if shade else "") + noun


def _emoji(group: Group, colour: str | None, rng: random.Random) -> str:
    thing = EMOJI[group.kind] if rng.random() < 0.8 else EMOJI[group.kind].rstrip("\ufe0f")
    return (COLOURS_EMOJI[colour] if colour else "") + thing * group.count


def _phrases(scene: Scene, language: Language, rng: random.Random, colours: bool, sizes: bool) -> list[Phrase]:
    chinese_frame = language == "zh"
    phrases = []
    for index, group in enumerate(scene.groups):
        colour = group.colour if colours else None
        size = group.size if sizes and group.size != "medium" and language != "emoji" else None
        if language == "emoji":
            words = _emoji(group, colour, rng)
        else:
            write = _chinese if chinese_frame else _english
            words = write(group, colour, size, rng, False)
        phrases.append(Phrase(words=words, group=index, colour=colour, size=size))
    return phrases


def _mixed_phrases(scene: Scene, rng: random.Random, colours: bool, sizes: bool, chinese_frame: bool) -> list[Phrase]:
    phrases = []
    for index, group in enumerate(scene.groups):
        colour = group.colour if colours else None
        size = group.size if sizes and group.size != "medium" else None
        words = (_chinese if chinese_frame else _english)(group, colour, size, rng, True)
        phrases.append(Phrase(words=words, group=index, colour=colour, size=size))
    return phrases


Part = str | Phrase


def _sentence(phrases: list[Phrase], relation: Relation | None, frame: Language, rng: random.Random) -> list[Part]:
    """The parts of the sentence in order; with a relation, either end may come first."""
    joints: dict[str, tuple[str, str]] = {"en": (", ", " and "), "zh": ("、", "和"), "emoji": (" ", " ")}
    comma, last = joints[frame]
    if relation is None or len(phrases) != 2:
        parts: list[Part] = [phrases[0]]
        for number, phrase in enumerate(phrases[1:], 2):
            parts += [last if number == len(phrases) else comma, phrase]
        return parts
    first, second = phrases
    if rng.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    if frame == "emoji":
        return [first, f" {RELATIONS_EMOJI[relation]} ", second]
    if frame == "zh":
        return [first, "在", second, "的" + rng.choice(RELATIONS_ZH[relation])]
    if rng.random() < 0.12:
        return [
            second,
            " with ",
            first,
            f" {RELATIONS_EN[relation][-2 if relation in ('left', 'right') else 0]} it",
        ]
    return [first, f" {rng.choice(RELATIONS_EN[relation])} ", second]


def caption(
    scene: Scene,
    rng: random.Random,
    *,
    language: Language | None = None,
    colours: bool | None = None,
    relation: bool | None = None,
    plain: bool = False,
) -> Caption:
    """Describe a scene. What is None is drawn: colours are said in 85 % of the captions, the relation in 80 %.

    `plain` leaves out sizes, background and openings.
    """
    language = language or rng.choices(LANGUAGES, (0.4, 0.25, 0.15, 0.2))[0]
    colours = rng.random() < 0.85 if colours is None else colours
    says_relation = scene.relation if (rng.random() < 0.8 if relation is None else relation) else None
    sizes = not plain and rng.random() < 0.4
    frame: Language = rng.choice(("en", "zh")) if language == "mixed" else language
    if language == "mixed":
        phrases = _mixed_phrases(scene, rng, colours, sizes, frame == "zh")
    else:
        phrases = _phrases(scene, language, rng, colours, sizes)
    parts = _sentence(phrases, says_relation, frame, rng)
    background = None
    if not plain:
        if frame != "emoji":
            parts.insert(0, rng.choice(OPENINGS_EN if frame == "en" else OPENINGS_ZH))
        if frame != "emoji" and rng.random() < 0.25:
            background = scene.background
            paper = f" on {PAPERS_EN[background]} paper" if frame == "en" else f"，{PAPERS_ZH[background]}的纸"
            parts.append(paper)
    text, mentions = "", []
    for part in parts:
        text += part.words if isinstance(part, Phrase) else part
        if isinstance(part, Phrase):
            mentions.append(Mention(end=len(text), group=part.group, colour=part.colour, size=part.size))
    return Caption(text=text, mentions=tuple(mentions), relation=says_relation, background=background)
