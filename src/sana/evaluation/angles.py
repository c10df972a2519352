"""The search for the angles that a SANA-Sprint model draws best with (arXiv 2503.09641, section 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sana.engine.parts import Parts
from sana.errors import InvalidInput
from sana.evaluation.drawing import drawer, resolve
from sana.evaluation.geneval import evaluate
from sana.flow.schedules import MAX_ANGLE, trig_grid

FIRST = (MAX_ANGLE, 1.565, 1.55, 1.52)
"""Candidates for the first angle, pure noise or nearly so."""
LATER = tuple(round(0.1 * k, 1) for k in range(15, 1, -1))
"""Candidates for the later ones."""
MOST_STEPS = 8

Judge = Callable[[Sequence[float]], float]
"""Angles of a run, with the 0 at the end, to how good its pictures are."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best run of some number of steps."""

    angles: tuple[float, ...]
    score: float


def search(
    judge: Judge, steps: int, first: Sequence[float] = FIRST, later: Sequence[float] = LATER
) -> dict[int, Found]:
    """Find angles for 1 to `steps` steps, greedily: each number of steps adds one to the angles of the one before it.

    Of equally good candidates the largest is taken. Errors: InvalidInput for an impossible number of steps.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise InvalidInput(f"`steps` must be a whole number from 1 to {MOST_STEPS} but is {steps}.")
    found: dict[int, Found] = {}
    fixed: tuple[float, ...] = ()
    for count in range(1, steps + 1):
        candidates = [angle for angle in (later if fixed else first) if not fixed or angle < fixed[-1]]
        if not candidates:
            break
        runs = [(*fixed, angle, 0.0) for angle in sorted(candidates, reverse=True)]
        best = max((Found(angles=run, score=judge(run)) for run in runs), key=lambda one: one.score)
        found[count] = best
        fixed = best.angles[:-1]
    return found


def geneval_judge(parts: Parts, *, prompts: int, images: int, seed: int, batch_size: int) -> Judge:
    """Return a judge that draws the prompts of the drawn world and counts what the detector finds right.

    Errors: InvalidInput for a model that is not drawn with angles.
    """
    if not parts.transformer.config.guidance_embeds:
        raise InvalidInput(f"{parts.name} is no SANA-Sprint model, so it has no angles. Name a distilled one.")

    def judge(angles: Sequence[float]) -> float:
        order = resolve(parts, steps=len(angles) - 1, sampler="scm")
        draw = drawer(parts, order, grid=trig_grid(torch.tensor(angles)))
        share = evaluate(draw, prompts=prompts, images=images, seed=seed, batch_size=batch_size).score().share
        return 0.0 if share is None else share

    return judge
