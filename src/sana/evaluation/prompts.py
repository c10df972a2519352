"""The prompts of the benchmark: GenEval's six tasks on the drawn world, asking for what training never drew.

Prompt p of a task is about scene p // 4 in language p % 4: every scene is asked for in each of the four languages, so
that their scores compare (the last scene of an odd count lacks some). What is held out, per task:

- two objects: the pair of kinds; colours: the colour of the kind; position: the kinds in this relation; colour
  attribution: the pair of coloured kinds.
- single object and counting name nothing but a kind and a number, and every one was drawn: there it is the wording, two
  openings of the training captions in a row. Emoji have no openings and stay as they are.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from sana.data.cutout_captions import LANGUAGES, NUMBERS_ZH, Language, caption
from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import COLOURS, OPPOSITE, Group, Relation, Scene, arrange, is_held_out
from sana.errors import InvalidInput

Task = Literal["single object", "two objects", "counting", "colours", "position", "colour attribution"]

Item = TypeVar("Item")

OPENINGS = {
    (False, False): ("a photo of ",),
    (False, True): ("draw a picture of ", "draw a photo of ", "draw an image of ", "there is a photo of "),
    (True, False): ("一张图片，",),
    (True, True): ("画一张图片，", "画剪纸，", "剪纸，画", "一张图片，画"),
}
"""By whether the sentence is Chinese, and whether training must not know the wording."""


@dataclass(frozen=True, kw_only=True)
class Clause:
    """At least `count` things of a kind, all of `colour` and all in `relation` to all things of another clause."""

    kind: str
    count: int = 1
    colour: str | None = None
    relation: Relation | None = None
    target: int = 0
    """Which clause of the prompt the relation is to; an earlier one."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, the scene it was made from, and what a picture must and must not hold to be right."""

    task: Task
    text: str
    language: Language
    scene: Scene
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @property
    def meaning(self) -> str:
        """The same in plain English."""
        return _caption(self.task, self.scene, "en", random.Random(0))


def prompts_of(task: Task, count: int = 50) -> list[Prompt]:
    """The first `count` prompts of a task, always the same; a smaller set is the beginning of a larger one.

    Raises:
        InvalidInput: the task is unknown or the count below 1.
    """
    if task not in _SCENES or count < 1:
        raise InvalidInput(f"There are no {count} prompts of {task!r}. Ask for 1 or more of: {', '.join(_SCENES)}.")
    scenes = itertools.islice(_SCENES[task](random.Random(f"geneval/{task}")), -(-count // len(LANGUAGES)))
    prompts = [_prompt(task, scene, number, language) for number, scene in enumerate(scenes) for language in LANGUAGES]
    return prompts[:count]


def all_prompts(count: int = 50) -> list[Prompt]:
    """`count` prompts of each task, task after task."""
    return [prompt for task in TASKS for prompt in prompts_of(task, count)]


# --- words ----------------------------------------------------------------------------------------------------------


def _prompt(task: Task, scene: Scene, number: int, language: Language) -> Prompt:
    rng = random.Random(f"geneval/{task}/{number}/{language}")
    text = _caption(task, scene, language, rng)
    while language == "mixed" and not _is_mixed(text):
        text = _caption(task, scene, language, rng)
    if language != "emoji":
        openings = OPENINGS[text[0] in NUMBERS_ZH.values(), task in ("single object", "counting")]
        text = rng.choice(openings) + text
    include, exclude = _clauses(task, scene)
    return Prompt(task=task, text=text, language=language, scene=scene, include=include, exclude=exclude)


def _caption(task: Task, scene: Scene, language: Language, rng: random.Random) -> str:
    colours = task in ("colours", "colour attribution")
    said = caption(scene, rng, language=language, colours=colours, relation=task == "position", plain=True)
    return said.text


def _is_mixed(text: str) -> bool:
    """Whether at least two of Latin, Chinese and emoji occur."""
    latin = any(character.isascii() and character.isalpha() for character in text)
    chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
    emoji = any(ord(character) >= 0x2300 and not "\u3000" <= character <= "\u9fff" for character in text)
    return latin + chinese + emoji >= 2


def _clauses(task: Task, scene: Scene) -> tuple[tuple[Clause, ...], tuple[Clause, ...]]:
    """What GenEval's rules ask for, and what they exclude."""
    coloured = task in ("colours", "colour attribution")
    clauses = [Clause(kind=g.kind, count=g.count, colour=g.colour if coloured else None) for g in scene.groups]
    if task == "position":
        first, second = clauses
        return (second, Clause(kind=first.kind, relation=scene.relation, target=0)), ()
    if task == "counting":
        (only,) = clauses
        return (only,), (Clause(kind=only.kind, count=only.count + 1),)
    return tuple(clauses), ()


# --- scenes ---------------------------------------------------------------------------------------------------------


def is_new_paint(colour: str, kind: str) -> bool:
    """Whether training never draws this kind in this colour."""
    return is_held_out((Group(kind=kind, colour=colour),), None)


@functools.cache
def are_new(first: str, second: str, relation: Relation | None) -> bool:
    """Whether training never draws these kinds together, or never in this relation, whatever their colours."""
    colours = itertools.product(COLOURS, repeat=2)
    return all(is_held_out((Group(kind=first, colour=a), Group(kind=second, colour=b)), relation) for a, b in colours)


def _group(rng: random.Random, kind: str, *, colour: str | None = None, count: int = 1) -> Group:
    """A group; a colour that will not be said is one that training draws this kind in."""
    colour = colour or rng.choice([name for name in COLOURS if not is_new_paint(name, kind)])
    return Group(kind=kind, colour=colour, count=count, size=rng.choice(("small", "medium")))


def _endless(items: Iterable[Item], rng: random.Random) -> Iterator[Item]:
    """All items in shuffled order, then again in another order."""
    pool = list(items)
    while True:
        yield from rng.sample(pool, len(pool))


def _single(rng: random.Random) -> Iterator[Scene]:
    for kind in _endless(KINDS, rng):
        yield arrange((_group(rng, kind),), None, rng)


def _two(rng: random.Random) -> Iterator[Scene]:
    for first, second in _endless((pair for pair in itertools.combinations(KINDS, 2) if are_new(*pair, None)), rng):
        groups = [_group(rng, first), _group(rng, second)]
        yield arrange(tuple(rng.sample(groups, 2)), rng.choice(list(OPPOSITE)), rng)


def _counting(rng: random.Random) -> Iterator[Scene]:
    for count, kind in zip(itertools.cycle((2, 3, 4)), _endless(KINDS, rng), strict=False):
        yield arrange((_group(rng, kind, count=count),), None, rng)


def _colours(rng: random.Random) -> Iterator[Scene]:
    for colour, kind in _endless((paint for paint in itertools.product(COLOURS, KINDS) if is_new_paint(*paint)), rng):
        yield arrange((_group(rng, kind, colour=colour),), None, rng)


def _position(rng: random.Random) -> Iterator[Scene]:
    """The four relations in turn, between kinds that training draws together."""
    pairs = [pair for pair in itertools.permutations(KINDS, 2) if not are_new(*pair, None)]
    new = {relation: _endless([pair for pair in pairs if are_new(*pair, relation)], rng) for relation in OPPOSITE}
    for relation in itertools.cycle(OPPOSITE):
        first, second = next(new[relation])
        yield arrange((_group(rng, first), _group(rng, second)), relation, rng)


def _attribution(rng: random.Random) -> Iterator[Scene]:
    """Both coloured kinds and both kinds are drawn in training, but never these two together."""
    while True:
        (first, second), (one, other) = rng.sample(list(KINDS), 2), rng.sample(list(COLOURS), 2)
        groups = (_group(rng, first, colour=one), _group(rng, second, colour=other))
        known = not (are_new(first, second, None) or is_new_paint(one, first) or is_new_paint(other, second))
        if known and is_held_out(groups, None):
            yield arrange(groups, rng.choice(list(OPPOSITE)), rng)


_SCENES: dict[Task, Callable[[random.Random], Iterator[Scene]]] = {
    "single object": _single,
    "two objects": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "colour attribution": _attribution,
}
TASKS: tuple[Task, ...] = tuple(_SCENES)
