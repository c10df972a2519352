"""Who may judge candidates: the exact detector of the drawn world, a CLIP model, or a function of one's own."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sana.errors import InvalidInput, did_you_mean
from sana.evaluation.selection import Judge, Opinion

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MODEL = "openai/clip-vit-base-patch32"
"""Taken where no other is named: 151 million parameters, MIT licence."""
CLIP_MATCH = 0.25
"""Least cosine of picture and prompt that counts as a match; it goes into records and changes no choice."""


class ExactJudge:
    """Reads prompt and picture of the drawn world; the score is how many of the prompt's demands are fulfilled."""

    name = "exact"

    def judge(self, prompt: str, picture: "Image") -> Opinion:
        """Return the opinion. Errors: InvalidInput for a prompt that names nothing of the drawn world."""
        import numpy as np

        from sana.data.cutouts import SIZE
        from sana.evaluation.detector import detect
        from sana.evaluation.reading import holds, read

        wish = read(prompt)
        if not wish.things:
            raise InvalidInput(
                f"The judge `exact` knows the drawn world only and finds nothing of it in {prompt[:80]!r}. "
                "Take another judge, such as clip."
            )
        square = picture.convert("RGB")
        square = square if square.size == (SIZE, SIZE) else square.resize((SIZE, SIZE))
        demands = holds(wish, detect(np.asarray(square)))
        return Opinion(matches=all(demands), score=float(sum(demands)))


class ClipJudge:
    """The cosine of a CLIP model's embeddings of picture and prompt; English, and 77 tokens at most are read."""

    def __init__(self, model: str = CLIP_MODEL, *, device: str = "cpu") -> None:
        """Load a model from the hub or a folder.

        Raises:
            ModelNotFound, CheckpointError: it cannot be had, or is no CLIP.
        """
        from sana.evaluation.clip_score import ClipScorer

        self.name = f"clip {model}"
        self._scorer = ClipScorer(model, device=device)

    def judge(self, prompt: str, picture: "Image") -> Opinion:
        """Return the opinion."""
        seen, read = self._scorer.pictures([picture.convert("RGB")]), self._scorer.texts([prompt])
        score = float((seen * read).sum())
        return Opinion(matches=score >= CLIP_MATCH, score=score)


@dataclass(frozen=True)
class OwnJudge:
    """A function of prompt and picture that gives a score, a yes or no, both, or an `Opinion`."""

    name: str
    function: Callable[[str, "Image"], Any]

    def judge(self, prompt: str, picture: "Image") -> Opinion:
        """Return the opinion. Errors: InvalidInput for an answer of another kind."""
        answer = self.function(prompt, picture)
        if isinstance(answer, Opinion):
            return answer
        if isinstance(answer, bool):
            return Opinion(matches=answer, score=0.0)
        if isinstance(answer, int | float):
            return Opinion(matches=False, score=float(answer))
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], int | float):
            return Opinion(matches=bool(answer[0]), score=float(answer[1]))
        raise InvalidInput(
            f"The judge {self.name} answered {str(answer)[:40]!r}. Let it give a number, a yes or no, or (yes, number)."
        )


def find_judge(word: str) -> Judge:
    """Return the judge of a word: exact, clip, clip:MODEL, or MODULE:FUNCTION.

    Raises:
        InvalidInput: there is none; ModelNotFound: its model cannot be had.
    """
    name, _, more = word.partition(":")
    if name in JUDGES:
        if more and name != "clip":
            raise InvalidInput(f"The judge `{name}` takes no {more[:40]!r}. Write: {name}")
        return JUDGES[name](more) if more else JUDGES[name]()
    if not more:
        hint = did_you_mean(name[:40], JUDGES)
        known = f"{', '.join(JUDGES)}, clip:MODEL, and MODULE:FUNCTION"
        raise InvalidInput(f"There is no judge '{name[:40]}'.{hint} There are {known}.")
    try:
        function = getattr(importlib.import_module(name), more, None)
    except ImportError as error:
        raise InvalidInput(f"The judge {word[:80]} cannot be imported ({error}). Check its module.") from error
    if not callable(function):
        raise InvalidInput(f"The module {name} has no function {more[:40]}, which was to judge.")
    return OwnJudge(word, function)


JUDGES: dict[str, Callable[..., Judge]] = {"exact": ExactJudge, "clip": ClipJudge}
