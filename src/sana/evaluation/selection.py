"""The best of many: candidates of one prompt from different seeds, and a judge that knows which to keep.

Source: inference-time scaling of SANA-1.5 (arXiv 2501.18427, section 4), a single elimination between neighbours.
"""

import dataclasses
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sana.engine.request import MAX_SEED, Request, Result
from sana.errors import InvalidInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from sana.engine.generate import Reply
    from sana.engine.latents import Finished
    from sana.engine.parts import Parts
    from sana.flow.samplers import Step

MOST_CANDIDATES = 2048


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What a judge says of one picture."""

    matches: bool
    """Whether it shows what the prompt asks for."""
    score: float
    """How surely it does; higher is better. For a judge that answers in words: the logit of "yes", or minus that of
    "no"."""

    def beats(self, other: "Opinion") -> bool:
        """Whether this picture wins against the other: yes goes before no, then the score decides."""
        return (self.matches, self.score) > (other.matches, other.score)


class Judge(Protocol):
    """Looks at pictures."""

    @property
    def name(self) -> str:
        """What records call it."""
        ...

    def judge(self, prompt: str, picture: "Image") -> Opinion:
        """Return the opinion of one picture."""
        ...


class Bracket:
    """A single elimination, pair by pair as candidates come, that ends with `keep` winners after `count - keep` pairs.

    The candidates in a row are cut into `keep` stretches, whose lengths differ by one at most, and each has a winner.
    Where both numbers are powers of two these are the matches between neighbours, neighbours of neighbours and so on,
    until `keep` are left; where they are not, somebody has no partner in a round and goes on. Of equals the earlier
    wins. The very best always survives, but the winners need not be the best `keep`.
    """

    def __init__(self, count: int, keep: int) -> None:
        self.count, self.keep = count, keep
        self.winners: list[int | None] = [None] * keep
        self._opinions: dict[int, Opinion] = {}

    def add(self, candidate: int, opinion: Opinion) -> int | None:
        """Take in the next candidate; return which is out for that, itself or an earlier one."""
        place = candidate * self.keep // self.count
        champion = self.winners[place]
        self._opinions[candidate] = opinion
        if champion is None:
            self.winners[place] = candidate
            return None
        out = champion if opinion.beats(self._opinions[champion]) else candidate
        if out == champion:
            self.winners[place] = candidate
        del self._opinions[out]
        return out


def check_candidates(candidates: int, keep: int) -> None:
    """Refuse numbers of candidates among which nothing is chosen.

    Raises:
        InvalidInput: there are too few, or too many.
    """
    if not 2 <= candidates <= MOST_CANDIDATES:
        raise InvalidInput(f"`best_of` must be a number of candidates from 2 to {MOST_CANDIDATES}, not {candidates}.")
    if candidates <= keep:
        raise InvalidInput(f"`best_of` {candidates} leaves nothing to choose for {keep} pictures. Raise it.")


def draw_best(
    parts: "Parts",
    request: Request,
    judge: Judge,
    candidates: int,
    *,
    rescue: "Callable[[Finished], None] | None" = None,
) -> "Generator[Step | Result, Reply, Result]":
    """Draw candidates and keep the best `request.count` of them; yield the steps, and at the end one `Result`.

    Candidate i is the picture of seed + i, the same as alone. Of the pictures only those of candidates that are still
    in are kept in memory. `Result.selection` says how each winner was chosen.

    Args:
        rescue: as in `engine.generate.generate`.

    Raises:
        InvalidInput: there is nothing to choose; the judge cannot judge this prompt.
        And what `engine.generate.generate` raises.
    """
    from sana.engine.generate import generate

    keep = request.count
    check_candidates(candidates, keep)
    if request.seed is not None and request.seed + candidates - 1 > MAX_SEED:
        raise InvalidInput(f"`seed` plus `best_of` goes past {MAX_SEED}, the largest seed. Lower one of them.")
    order = request.replace(count=candidates)
    bracket, held, done = Bracket(candidates, keep), {}, 0
    loop = generate(parts, order, rescue=rescue, keep=False)
    reply = None
    while True:
        try:
            event = loop.send(reply)
        except StopIteration as end:
            finished: Result = end.value
            break
        reply = None
        if not isinstance(event, Result):
            reply = yield event
            continue
        for image, seed in zip(event.images, event.seeds, strict=True):
            opinion = _asked(judge, request.prompt, image)
            held[done] = (image, seed, opinion)
            out = bracket.add(done, opinion)
            held.pop(out, None) if out is not None else None
            done += 1
    kept = [held[winner] for winner in bracket.winners if winner is not None]
    first = finished.settings.seed
    chosen = [_record(judge, opinion, seed, first, candidates) for _, seed, opinion in kept]
    result = dataclasses.replace(
        finished, images=[image for image, _, _ in kept], seeds=[seed for _, seed, _ in kept], selection=chosen
    )
    yield result
    return result


def _asked(judge: Judge, prompt: str, picture: "Image") -> Opinion:
    opinion = judge.judge(prompt, picture)
    if not math.isfinite(opinion.score):
        raise InvalidInput(f"The judge {judge.name} gave the score {opinion.score}. Let it give finite numbers.")
    return opinion


def _record(judge: Judge, opinion: Opinion, seed: int, first: int, candidates: int) -> dict[str, Any]:
    """Return what the record of a picture says of the choice."""
    return {
        "judge": judge.name,
        "candidates": candidates,
        "first_seed": first,
        "seed": seed,
        "matches": opinion.matches,
        "score": opinion.score,
    }
