"""Samplers: generator functions that walk a state from noise to picture along a grid.

A sampler sees only `velocity(x, i)`, the guided velocity dx/dsigma at step i. It yields a typed `Step` after every
update; `send(latents)` replaces the state before the next step, and stopping is simply not asking for more.

Shapes: x, velocity, noise and latents are all [B, C, H, W]; the mathematics is per element.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sana.errors import InvalidInput, did_you_mean
from sana.flow.path import flow_from_trig, interpolate
from sana.flow.schedules import Grid, flow_dpm_grid, flow_euler_grid, scm_grid

Velocity = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
Update = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(x, velocity, i) -> (x of the next level, x0 predicted at this one)."""
Prediction = tuple[float, Tensor]
"""(sigma, x0 predicted there)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One finished step of a sampling run."""

    index: int
    """Number of this step, from 0."""
    num_steps: int
    """Number of steps of the run."""
    sigma: float
    """Level at which the velocity was evaluated."""
    sigma_next: float
    """Level of `latents`."""
    timestep: float
    """What the network was told."""
    latents: Tensor
    """State after the update."""
    x0: Tensor
    """Clean sample predicted in this step; decode it for a preview."""


Steps = Generator[Step, Tensor | None, None]


class Solver(Protocol):
    """The form of every sampler function."""

    def __call__(self, velocity: Velocity, x: Tensor, grid: Grid, noise: Noise | None = None) -> Steps: ...


def flow_dpm(
    velocity: Velocity,
    x: Tensor,
    grid: Grid,
    noise: Noise | None = None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
) -> Steps:
    """Walk with DPM-Solver++ in multistep form, second order by default; deterministic, `noise` is not used.

    First order in the first step and in a last step that lands on sigma 0. SANA section 3.2 (Flow-DPM-Solver);
    DPM-Solver++, Lu et al. 2022, algorithm 2.
    """
    if order not in (1, 2, 3):
        raise InvalidInput(f"DPM-Solver++ has order 1, 2 or 3, not {order!r}.")
    sigmas = grid.sigmas.tolist()
    history: deque[Prediction] = deque(maxlen=order)

    def update(x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
        x0 = x - sigmas[i] * v
        history.appendleft((sigmas[i], x0))
        allowed = dpm_order(i, grid.num_steps, order, lower_order_final=lower_order_final, ends_at_zero=sigmas[-1] == 0)
        return dpm_update(x, list(history)[:allowed], sigmas[i + 1]), x0

    return walk(velocity, x, grid, update)


def flow_euler(velocity: Velocity, x: Tensor, grid: Grid, noise: Noise | None = None) -> Steps:
    """Walk with Euler steps, x + (sigma_next - sigma) v; deterministic, `noise` is not used."""
    sigmas = grid.sigmas.tolist()

    def update(x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return x + (sigmas[i + 1] - sigmas[i]) * v, x - sigmas[i] * v

    return walk(velocity, x, grid, update)


def scm(velocity: Velocity, x: Tensor, grid: Grid, noise: Noise | None = None) -> Steps:
    """Walk as a consistency model: predict x0, then noise it afresh to the next level with `noise(i)`, standard normal.

    `noise` is called in every step, also in the last, where it counts for nothing: the reference draws there too, and
    a caller's generator must end in the same state. Raises InvalidInput without `noise`. sCM, Lu & Song 2024.
    """
    if noise is None:
        raise InvalidInput("The scm sampler draws new noise in every step. Give it a `noise(i)` function.")
    sigmas = grid.sigmas.tolist()
    draw = noise

    def update(x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
        x0 = x - sigmas[i] * v
        return interpolate(x0, draw(i).to(x0), sigmas[i + 1]), x0

    return walk(velocity, x, grid, update)


def walk(velocity: Velocity, x: Tensor, grid: Grid, update: Update) -> Steps:
    """Walk the grid with any update rule. The state is float32 (float64 stays), whatever the network computes in."""
    x = _state(x)
    sigmas, timesteps = grid.sigmas.tolist(), grid.timesteps.tolist()
    for i in range(grid.num_steps):
        x, x0 = update(x, velocity(x, i).to(x.dtype), i)
        sent = yield Step(
            index=i,
            num_steps=grid.num_steps,
            sigma=sigmas[i],
            sigma_next=sigmas[i + 1],
            timestep=timesteps[i],
            latents=x,
            x0=x0,
        )
        if sent is not None:
            if sent.shape != x.shape:
                raise InvalidInput(
                    f"Replaced latents must keep the shape {list(x.shape)}, but have {list(sent.shape)}."
                )
            x = _state(sent)


def dpm_order(i: int, num_steps: int, order: int, *, lower_order_final: bool, ends_at_zero: bool) -> int:
    """Return the order of step `i`: limited by the predictions at hand, and towards the end by the singularity at 0."""
    available = min(order, i + 1)
    if not ends_at_zero:
        return available
    left = num_steps - i
    if left == 1:
        return 1
    # Third order next to the singular end is unstable when steps are long; the reference draws the line at 15 steps.
    return min(available, 2) if left == 2 and lower_order_final and num_steps < 15 else available


def dpm_update(x: Tensor, history: Sequence[Prediction], sigma_next: float) -> Tensor:
    """Take one DPM-Solver++ step from the level of `history[0]` to `sigma_next`; a prediction per order, newest first.

    With r = sigma_next / sigma the step is r x + (1 - r) D. D is x0 extrapolated in lambda = ln((1 - sigma) / sigma),
    which is infinite at sigma 0 and never formed there. DPM-Solver++, Lu et al. 2022, section 4; alpha = 1 - sigma.
    """
    sigma, x0 = history[0]
    if sigma_next == sigma:
        return x
    # A repeated level carries no slope.
    older = [item for before, item in itertools.pairwise(history) if item[0] > before[0]]
    ratio = sigma_next / sigma
    if not older or sigma_next == 0:
        return torch.lerp(x0, x, ratio)
    h = _half_log_snr(sigma_next) - _half_log_snr(sigma)
    h0 = _half_log_snr(sigma) - _half_log_snr(older[0][0])
    slope = (x0 - older[0][1]) * (h / h0)  # h0 is infinite after a start at sigma 1, and the slope then 0
    if len(older) == 1:
        return torch.lerp(x0 + 0.5 * slope, x, ratio)
    h1 = _half_log_snr(older[0][0]) - _half_log_snr(older[1][0])
    bend = slope - (older[0][1] - older[1][1]) * (h / h1)
    alpha, decay = 1 - sigma_next, math.expm1(-h)
    first = alpha * (decay / h + 1)
    second = alpha * ((decay + h) / h**2 - 0.5)
    # Taylor's formula gives the second term twice this weight; the reference has it so, and equality comes first.
    correction = first * (slope + bend * (h0 / (h0 + h1))) - second * (bend * (h / (h0 + h1)))
    return torch.lerp(x0, x, ratio) + correction


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


def _state(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler as callers choose it by name."""

    name: str
    """The name in code, command line and HTTP."""
    make_grid: Callable[[int, float], Grid]
    """(number of steps, flow shift) -> grid; the scm grid has no shift."""
    run: Solver
    """The sampler function."""
    order: int
    """Order of convergence to the exact path; 0 for a sampler that draws noise."""

    def on(self, grid: Grid) -> "BoundSampler":
        """Bind the sampler to a grid: the form in which the loop takes any sampler, a scheduler object included."""
        return BoundSampler(grid=grid, solver=self.run)


@dataclass(frozen=True, kw_only=True)
class BoundSampler:
    """A sampler and its grid; `flow.schedulers.SchedulerSampler` has the same two members."""

    grid: Grid
    """The levels and timesteps of the run."""
    solver: Solver
    """The sampler function."""

    def first(self, noise: Tensor) -> Tensor:
        """Return the state that stands for pure noise, of standard deviation 1, at the first level.

        Angles may begin anywhere, and there the reference takes the noise for the TrigFlow state as it is.
        """
        return flow_from_trig(noise, self.grid.sigmas[0].item(), 1.0) if self.grid.trig else noise

    def run(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> Steps:
        """Walk from `x`, a state at `grid.sigmas[0]`."""
        return self.solver(velocity, x, self.grid, noise)


def find_sampler(name: str) -> Sampler:
    """Return the sampler of that name. Raises InvalidInput with the choices."""
    if name not in SAMPLERS:
        raise InvalidInput(
            f"There is no sampler '{name}'.{did_you_mean(name, SAMPLERS)} Choose one of: {', '.join(SAMPLERS)}."
        )
    return SAMPLERS[name]


def _scm_grid(num_steps: int, shift: float) -> Grid:
    return scm_grid(num_steps)


SAMPLERS: dict[str, Sampler] = {
    "flow-dpm": Sampler(name="flow-dpm", make_grid=flow_dpm_grid, run=flow_dpm, order=2),
    "flow-euler": Sampler(name="flow-euler", make_grid=flow_euler_grid, run=flow_euler, order=1),
    "scm": Sampler(name="scm", make_grid=_scm_grid, run=scm, order=0),
}
