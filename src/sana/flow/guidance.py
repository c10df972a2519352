"""Guidance: closures around a velocity that turn a conditional network into a guided one.

Shapes: x and every velocity [B, C, H, W]; a batched predictor returns up to three groups of B rows, in the order
unconditional, conditional, perturbed.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.samplers import Velocity
from sana.flow.schedules import Grid

Interval = tuple[float, float]


class BatchedVelocity(Protocol):
    """A predictor that computes all branches in one forward pass."""

    def __call__(self, x: Tensor, i: int, *, guided: bool, perturbed: bool = False) -> Tensor:
        """Return B unconditional rows if `guided`, then B conditional ones, then B perturbed ones if `perturbed`."""
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


def guided_velocity(
    predict: BatchedVelocity,
    scale: float,
    guided_steps: Sequence[bool] | None = None,
    pag_scales: Sequence[float] | None = None,
) -> Velocity:
    """Guide with one predictor that runs all branches as one batch: u + g (c - u) + s (c - p), or c + s (c - p).

    The loop makes it once per run: `guided_velocity(plan.predictor, plan.guidance, guided_steps(grid, interval),
    pag_scales(grid, plan.pag_scale, plan.pag_adaptive_scale))`. A step computes only the rows that count: no
    unconditional ones at scale 1, no perturbed ones where s is 0, and the conditional ones alone in a step that
    `guided_steps` leaves out. Source: perturbed-attention guidance, arXiv 2403.17377, eq. 15 on top of eq. 2.
    """

    def velocity(x: Tensor, i: int) -> Tensor:
        acts = guided_steps is None or guided_steps[i]
        guided = acts and scale != 1
        strength = pag_scales[i] if acts and pag_scales is not None else 0.0
        if strength == 0:
            groups = predict(x, i, guided=guided).chunk(1 + guided)
        else:
            groups = predict(x, i, guided=guided, perturbed=True).chunk(2 + guided)
        conditional = groups[int(guided)]
        out = combine(groups[0], conditional, scale) if guided else conditional
        return out if strength == 0 else out + strength * (conditional - groups[-1])

    return velocity


def pag_scales(grid: Grid, scale: float, adaptive_scale: float = 0.0) -> tuple[float, ...] | None:
    """Return the strength s of perturbed-attention guidance for each step, or None when it is off.

    s = scale, or with an adaptive scale a > 0: max(scale - a (1000 - t), 0) at timestep t.
    Raises InvalidInput for a scale that is negative or not finite.
    """
    for name, value in (("pag_scale", scale), ("pag_adaptive_scale", adaptive_scale)):
        if not 0 <= value < math.inf:
            raise InvalidInput(f"`{name}` is {value}; give 0 (off) or a positive number, such as 3.0.")
    if scale == 0:
        return None
    if adaptive_scale == 0:
        return (scale,) * grid.num_steps
    return tuple(max(scale - adaptive_scale * (1000 - t), 0.0) for t in grid.timesteps.tolist())


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
