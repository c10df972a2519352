"""`--best-of`: candidates of which a judge keeps some; its flags, what they must fit, and the loop that draws so."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from sana.apps.cli.arguments import Group, Spelling
from sana.apps.cli.settings import FLAG, Settings
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.evaluation.selection import Judge, check_candidates

if TYPE_CHECKING:
    from sana.engine.parts import Parts


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How many pictures are drawn for those that are kept, and who keeps them."""

    best_of: Annotated[int | None, Spelling(value="N")] = None
    """Draw N candidates from the seed on, and keep the best, or the best --count."""
    judge: Annotated[str | None, Spelling(value="NAME")] = None
    """Who judges them: exact (nano's world), clip or clip:MODEL, or MODULE:FUNCTION of prompt and picture; left out,
    exact for the built-in models, clip for others."""


CHOOSING = Group(title="the best of many", options=Choosing)


def check(own: Settings, request: Request, seeds: Sequence[int]) -> None:
    """Refuse choices that leave nothing to choose, and a judge without candidates.

    Raises:
        InvalidInput: naming the setting.
    """
    candidates, judge = own.values.get("best_of"), own.values.get("judge")
    if candidates is None:
        if judge is not None and own.origins["judge"] == FLAG:
            raise InvalidInput("`judge` has no effect without `best_of`. Say how many candidates to judge, or drop it.")
        return
    if len(seeds) > 1:
        raise InvalidInput("`best_of` draws candidates from one `seed` on. Give one, and `count` for how many stay.")
    check_candidates(candidates, request.count)
    if own.values.get("skip_existing") and request.count > 1:
        raise InvalidInput(
            "`skip_existing` cannot tell which of several winners of `best_of` is missing. Keep one, or drop it."
        )


class Judges:
    """The judges of an order, each loaded once."""

    def __init__(self) -> None:
        self._known: dict[str, Judge] = {}

    def of(self, settings: Mapping[str, Any], parts: "Parts") -> Judge:
        """Return the judge that settings name, or the one that suits the model.

        Raises:
            InvalidInput, ModelNotFound: there is none of that name, or it cannot be loaded.
        """
        from sana.evaluation.judges import find_judge

        drawn = parts.card is not None and parts.card.draws_cutouts
        word = settings.get("judge") or ("exact" if drawn else "clip")
        if word not in self._known:
            with _importing_from_here():
                self._known[word] = find_judge(word)
        return self._known[word]


@contextlib.contextmanager
def _importing_from_here() -> Iterator[None]:
    """Let a judge be a file in the current folder, as `python -m` would."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.pop(0)


def told(selection: Mapping[str, Any]) -> str:
    """Return in words how a picture was chosen."""
    verdict = "it matches" if selection["matches"] else "it does not match"
    return f"best of {selection['candidates']}: {verdict}, score {selection['score']:.4g} by {selection['judge']}"
