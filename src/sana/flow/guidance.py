"""Guidance: closures around a velocity that turn a conditional network into a guided one.

Shapes: x and every velocity [B, C, H, W]; a batched predictor returns [2 B, C, H, W], unconditional rows first.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.samplers import Velocity
from sana.flow.schedules import Grid

Interval = tuple[float, float]


class BatchedVelocity(Protocol):
    """A predictor that computes both branches in one forward pass."""

    def __call__(self, x: Tensor, i: int, *, guided: bool) -> Tensor:
        """Return 2 B velocities, unconditional rows first, or with `guided` False only the B conditional ones."""
        ...


def combine(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Return u + g (c - u). Classifier-free guidance, Ho & Salimans 2022, with g = 1 meaning no guidance."""
    return unconditional + scale * (conditional - unconditional)


def cfg(
    unconditional: Velocity, conditional: Velocity, scale: float, guided_steps: Sequence[bool] | None = None
) -> Velocity:
    """Guide with two functions. At scale 1 the conditional itself is returned and the unconditional is never called.

    `guided_steps[i]` False leaves step i unguided (see `guided_steps`); None guides every step.
    """
    if scale == 1:
        return conditional

    def velocity(x: Tensor, i: int) -> Tensor:
        if guided_steps is not None and not guided_steps[i]:
            return conditional(x, i)
        return combine(unconditional(x, i), conditional(x, i), scale)

    return velocity


def cfg_batched(predict: BatchedVelocity, scale: float, guided_steps: Sequence[bool] | None = None) -> Velocity:
    """Guide with one predictor that runs both branches as one batch; unguided steps run the conditional rows only."""

    def velocity(x: Tensor, i: int) -> Tensor:
        if scale == 1 or (guided_steps is not None and not guided_steps[i]):
            return predict(x, i, guided=False)
        unconditional, conditional = predict(x, i, guided=True).chunk(2)
        return combine(unconditional, conditional, scale)

    return velocity


def guided_steps(grid: Grid, interval: Interval | None) -> tuple[bool, ...]:
    """Return for each step whether it lies in the guidance interval, lo < sigma < hi.

    A bound at the end of [0, 1] cuts nothing: (0, 1) and None both guide every step, also the one at sigma 1.
    Raises InvalidInput when the interval is empty or leaves [0, 1]. Kynkäänniemi et al. 2024.
    """
    if interval is None:
        return (True,) * grid.num_steps
    low, high = interval
    if not 0 <= low < high <= 1:
        raise InvalidInput(
            f"A guidance interval must satisfy 0 <= lo < hi <= 1, but is ({low}, {high}). The default is (0, 1)."
        )
    return tuple((low == 0 or sigma > low) and (high == 1 or sigma < high) for sigma in grid.sigmas[:-1].tolist())
