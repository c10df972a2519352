"""Which caption of a picture is read, as a function of a random state: by CLIP score, by weight, with trigger words.

By score, captions below a threshold are left aside and the others drawn with a probability in proportion to
`score ** (1 / temperature)`: the power form of the released code, not the softmax of the paper (SANA, section 3.3).
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from sana.data.samples import Caption
from sana.errors import InvalidInput, did_you_mean

Mode = Literal["auto", "score", "weight", "first"]
LEAST_TEMPERATURE = 0.01
PLACEHOLDER = "[trigger]"


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """How one of several captions is chosen, and what is made of it."""

    mode: Mode = "auto"
    """By `score`, by `weight`, or always the `first`; `auto` is by score where a caption has one, else by weight."""
    threshold: float = 25.0
    """CLIP score from which on a caption is drawn; if none reaches it, the best one is taken."""
    temperature: float = 0.1
    """How evenly captions are drawn by score: small favours the best, large makes all alike."""
    proportions: Mapping[str, float] = field(default_factory=dict)
    """Weight by name of the captioner, for mode `weight`, instead of the weights of the captions."""
    dropout: float = 0.0
    """Share of the draws that give the empty caption."""
    trigger: str = ""
    """Words that stand for what is learned: they replace `[trigger]`, or precede a caption that lacks them."""
    least_best: float = 0.0
    """Pictures whose best caption scores lower are left out; 0 keeps all. Published: 22 for SANA-1.5 and Sprint."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            known = ", ".join(get_args(Mode))
            hint = did_you_mean(str(self.mode), get_args(Mode))
            raise InvalidInput(f"`mode` of the captions must be one of {known}, not {self.mode!r}.{hint}")
        for name, most in (("threshold", 100.0), ("least_best", 100.0), ("dropout", 1.0), ("temperature", 1e6)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise InvalidInput(f"`{name}` of the captions must lie from 0 to {most:g} but is {value}.")
        if self.proportions and self.mode not in ("auto", "weight"):
            raise InvalidInput("`proportions` of captioners choose by weight. Set `mode` to weight, or drop them.")
        if any(not 0 <= weight < float("inf") for weight in self.proportions.values()):
            raise InvalidInput("`proportions` of captioners must be numbers of at least 0.")
        if self.proportions and not any(self.proportions.values()):
            raise InvalidInput("`proportions` of captioners are all 0, so no caption could be chosen. Raise one.")


DEFAULT = CaptionChoice()


def probabilities(captions: Sequence[Caption], choice: CaptionChoice = DEFAULT) -> list[float]:
    """Return how likely each caption is to be drawn, before dropout; their sum is 1."""
    mode = choice.mode
    if mode == "auto":
        has_score = any(caption.score is not None for caption in captions)
        mode = "score" if has_score and not choice.proportions else "weight"
    if mode == "first":
        return _only(captions, 0)
    weights = _by_score(captions, choice) if mode == "score" else _by_weight(captions, choice)
    return [weight / sum(weights) for weight in weights]


def choose(captions: Sequence[Caption], rng: random.Random, choice: CaptionChoice = DEFAULT) -> str:
    """Return the text that is read this time, empty when it is dropped.

    The state advances by two draws, whatever comes out.

    Raises:
        InvalidInput: a caption has `[trigger]` in it, and there is no trigger.
    """
    is_dropped, place = rng.random() < choice.dropout, rng.random()
    if is_dropped or not captions:
        return ""
    shares = probabilities(captions, choice)
    last = max(i for i, share in enumerate(shares) if share)  # the sum may end a hair below 1
    index = next((i for i, total in enumerate(itertools.accumulate(shares)) if place < total), last)
    return triggered(captions[index].text, choice.trigger)


def triggered(text: str, trigger: str) -> str:
    """Return a caption with the trigger words in it.

    Raises:
        InvalidInput: it has a place for them, and there are none.
    """
    if PLACEHOLDER in text:
        if not trigger:
            raise InvalidInput(f"The caption '{text[:60]}' has {PLACEHOLDER} in it, but no trigger is set. Set one.")
        return text.replace(PLACEHOLDER, trigger)
    if not trigger or trigger.lower() in text.lower():
        return text
    return f"{trigger}, {text}" if text else trigger


def is_wanted(captions: Sequence[Caption], choice: CaptionChoice) -> bool:
    """Tell whether the best caption scores enough for its picture to be kept; what has no score is kept."""
    scores = [caption.score for caption in captions if caption.score is not None]
    return not scores or max(scores) >= choice.least_best


def _by_score(captions: Sequence[Caption], choice: CaptionChoice) -> list[float]:
    scores = [-1.0 if caption.score is None else caption.score for caption in captions]
    best = max(scores)
    if best < 0:  # no scores: the text that came with the picture
        return _only(captions, next((i for i, caption in enumerate(captions) if caption.name == "prompt"), 0))
    if best < choice.threshold or best == 0:
        return _only(captions, scores.index(best))
    power = 1 / max(choice.temperature, LEAST_TEMPERATURE)
    return [(score / best) ** power if score >= choice.threshold and score >= 0 else 0.0 for score in scores]


def _by_weight(captions: Sequence[Caption], choice: CaptionChoice) -> list[float]:
    weights = [caption.weight for caption in captions]
    if choice.proportions:
        weights = [choice.proportions.get(caption.name, 0.0) for caption in captions]
    return weights if any(weights) else _only(captions, 0)


def _only(captions: Sequence[Caption], index: int) -> list[float]:
    return [float(i == index) for i in range(len(captions))]
