"""Sigma grids: the levels a sampler visits, and the timesteps the network is told at each of them.

The timesteps are data. They are made once, exactly as the reference makes them (truncated to integers for the
DPM grid, shifted twice and real-valued for the Euler grid), and never recomputed from the stored sigmas, whose
float32 rounding lands on the other side of an integer now and then.

Shapes: n steps; sigmas are [n + 1] (the last one ends the path), timesteps are [n].
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.path import angle_from_sigma, sigma_from_angle

NUM_TRAIN_TIMESTEPS = 1000
MAX_ANGLE = 1.57080
MIDDLE_ANGLE = 1.3

PURE_NOISE = 0.99
"""Sigma from which on a picture that is noised to it leaves no trace."""
_SIGMA_CEILING = 1 + 1e-5  # the published first angle 1.57080 lies 4e-6 beyond pi/2

Numbers = Sequence[float] | Tensor
Value = TypeVar("Value", float, Tensor, npt.NDArray[np.float64])


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The levels of one sampling run, checked once so that samplers can trust them. Raises InvalidInput."""

    sigmas: Tensor
    """Noise levels [n + 1], float32 on the CPU, never rising, from at most 1 down to at least 0."""
    timesteps: Tensor
    """What the network is told at each step [n], int64 or float32 on the CPU."""
    trig: bool = False
    """Whether the levels are those of TrigFlow angles, and the timesteps the levels themselves (SANA-Sprint)."""

    def __post_init__(self) -> None:
        sigmas, timesteps = self.sigmas, self.timesteps
        if sigmas.ndim != 1 or timesteps.ndim != 1 or len(sigmas) < 2 or len(sigmas) != len(timesteps) + 1:
            raise InvalidInput(
                f"A grid needs one timestep per step and one sigma more, but got sigmas {list(sigmas.shape)} "
                f"and timesteps {list(timesteps.shape)}. Give n + 1 sigmas and n timesteps."
            )
        if sigmas.dtype != torch.float32 or timesteps.dtype not in (torch.int64, torch.float32):
            raise InvalidInput(
                f"A grid holds float32 sigmas and int64 or float32 timesteps, not {sigmas.dtype} and "
                f"{timesteps.dtype}. Convert them."
            )
        if sigmas.device.type != "cpu" or timesteps.device.type != "cpu":
            raise InvalidInput(
                "A grid stays on the CPU, so that reading a level never waits for a device. Move it with .cpu()."
            )
        levels = sigmas.tolist()
        if not all(math.isfinite(level) for level in [*levels, *timesteps.tolist()]):
            raise InvalidInput("The sigmas and timesteps of a grid must be finite numbers.")
        if any(after > before for before, after in itertools.pairwise(levels)):
            raise InvalidInput(
                f"The sigmas of a grid must fall from noise to picture, but are {_short(levels)}. Sort them downwards."
            )
        if levels[0] > _SIGMA_CEILING or levels[-1] < 0:
            raise InvalidInput(
                f"Sigmas lie between 0 and 1, but run from {levels[0]:g} to {levels[-1]:g}. Divide timesteps by 1000."
            )

    @property
    def num_steps(self) -> int:
        """Number of model evaluations."""
        return len(self.timesteps)

    def tail(self, strength: float) -> "Grid":
        """Return the last `strength` (0 to 1) of the steps, for image-to-image; the run starts at its `sigmas[0]`.

        Steps are counted and a start within the first step is placed as `tail_levels` does. Raises InvalidInput.
        """
        levels = angle_from_sigma(self.sigmas) if self.trig else self.sigmas
        skipped, left = tail_levels(levels, strength, trig=self.trig)
        sigmas, timesteps = self.sigmas[skipped:].clone(), self.timesteps[skipped:].clone()
        if not torch.equal(left[0], levels[skipped]):
            sigmas[0] = sigma_from_angle(left[0]) if self.trig else left[0]
            if self.trig:
                timesteps[0] = sigmas[0]
            elif timesteps.dtype == torch.int64:  # whole numbers are truncated, as those of the grid are
                timesteps[0] = int(sigmas[0].item() * NUM_TRAIN_TIMESTEPS + 1e-4)
            else:
                timesteps[0] = _within_first(torch.cat([self.timesteps, torch.zeros(1)]), strength)
        return Grid(sigmas=sigmas, timesteps=timesteps, trig=self.trig)


def tail_levels(levels: Tensor, strength: float, *, trig: bool = False) -> tuple[int, Tensor]:
    """Return how many of n steps image-to-image skips, and the levels [n - skipped + 1] of the others.

    Levels are sigmas, or with `trig` the TrigFlow angles of SANA-Sprint, [n + 1]. int(max(n - min(n strength, n), 0))
    steps are skipped, as the documented pipelines count. Where that skips none although the strength is below 1, and
    the first level is pure noise, the reference never sees the picture; here the first level is then the point at
    n (1 - strength) of the way from the first level to the second, so that the effect grows without a jump up to 1.
    Raises InvalidInput.
    """
    if not 0 <= strength <= 1:
        raise InvalidInput(f"The value of strength should in [0.0, 1.0] but is {strength}")
    num_steps = len(levels) - 1
    wanted = min(num_steps * strength, num_steps)
    skipped = int(max(num_steps - wanted, 0))
    if skipped >= num_steps:
        raise InvalidInput(
            f"After adjusting the num_inference_steps by strength parameter: {strength}, no step is left of "
            f"{num_steps}. Raise the strength or the number of steps."
        )
    left = levels[skipped:].clone()
    sigma = sigma_from_angle(levels[0]) if trig else levels[0]
    if skipped == 0 and strength < 1 and sigma.item() >= PURE_NOISE:
        left[0] = _within_first(levels, strength)
    return skipped, left


def _within_first(levels: Tensor, strength: float) -> Tensor:
    """Return the point within the first of n steps at which the last n `strength` of them begin."""
    return torch.lerp(levels[0], levels[1], min((len(levels) - 1) * (1 - strength), 1.0))


def shift_sigma(sigma: Value, shift: float) -> Value:
    """Move levels towards noise: shift s / (1 + (shift - 1) s), which adds ln(shift) to logit(s). SD3, section 5."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_dpm_grid(num_steps: int, shift: float = 3.0, *, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Grid:
    """Return the grid of Flow-DPM-Solver: even levels 0.999 ... 0 before the shift, timesteps truncated to integers."""
    _checked_steps(num_steps)
    _check_shift(shift)
    even = 1 - np.linspace(1, 1 / num_train_timesteps, num_steps + 1)
    falling = shift_sigma(even, shift)[::-1][:-1]
    return Grid(
        sigmas=torch.from_numpy(np.append(falling, 0.0).astype(np.float32)),
        timesteps=torch.from_numpy((falling * num_train_timesteps).astype(np.int64)),
    )


def flow_euler_grid(num_steps: int, shift: float = 3.0, *, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Grid:
    """Return the grid of Flow-Euler: even between the ends of the shifted training table, then shifted once more.

    The second shift is what the documented scheduler does. Timesteps are real-valued.
    """
    _checked_steps(num_steps)
    table = flow_euler_table(shift, num_train_timesteps=num_train_timesteps)
    even = np.linspace(table[0].item() * num_train_timesteps, table[-1].item() * num_train_timesteps, num_steps)
    sigmas = torch.from_numpy(shift_sigma(even / num_train_timesteps, shift).astype(np.float32))
    return Grid(sigmas=torch.cat([sigmas, sigmas.new_zeros(1)]), timesteps=sigmas * num_train_timesteps)


def flow_euler_table(shift: float = 3.0, *, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> Tensor:
    """Return the shifted training levels [num_train_timesteps], float32, falling from 1."""
    _check_shift(shift)
    rising = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)
    return shift_sigma(torch.from_numpy(rising[::-1].copy()) / num_train_timesteps, shift)


def scm_angles(
    num_steps: int | None = 2,
    max_timesteps: float | None = MAX_ANGLE,
    intermediate_timesteps: float | None = MIDDLE_ANGLE,
    timesteps: Numbers | None = None,
) -> Tensor:
    """Return the TrigFlow angles [n + 1] of a SANA-Sprint run, float32: (max, middle, 0), or even steps from max to 0.

    A middle angle belongs to two steps. With another number its documented default is passed over, and any other value
    is a contradiction; the same goes for `max_timesteps` beside `timesteps`, which gives all n + 1 angles.
    Raises InvalidInput.
    """
    if timesteps is not None:
        if max_timesteps not in (None, MAX_ANGLE):
            raise InvalidInput("If providing custom timesteps, `max_timesteps` should not be provided.")
        angles = _numbers(timesteps, "timesteps")
        if num_steps is not None and len(angles) != num_steps + 1:
            raise InvalidInput(
                "If providing custom timesteps, `timesteps` must be of length `num_inference_steps + 1`."
            )
        _check_falling(angles, "timesteps")
        return torch.tensor(angles, dtype=torch.float32)
    if max_timesteps is None:
        raise InvalidInput("Should provide either `timesteps` or `max_timesteps`.")
    steps = _checked_steps(num_steps)
    if steps == 2 and intermediate_timesteps is not None:
        angles = [max_timesteps, intermediate_timesteps, 0.0]
        _check_falling(angles, "intermediate_timesteps")
        return torch.tensor(angles, dtype=torch.float32)
    if intermediate_timesteps not in (None, MIDDLE_ANGLE):
        raise InvalidInput("Intermediate timesteps for SCM is not supported when num_inference_steps != 2.")
    return torch.linspace(max_timesteps, 0, steps + 1, dtype=torch.float32)


def scm_grid(
    num_steps: int | None = 2,
    max_timesteps: float | None = MAX_ANGLE,
    intermediate_timesteps: float | None = MIDDLE_ANGLE,
    timesteps: Numbers | None = None,
) -> Grid:
    """Return the grid of a SANA-Sprint run in flow coordinates; the arguments are those of `scm_angles`."""
    return trig_grid(scm_angles(num_steps, max_timesteps, intermediate_timesteps, timesteps))


def trig_grid(angles: Tensor) -> Grid:
    """Return the grid in flow coordinates of TrigFlow angles [n + 1]; the network is told the level itself."""
    sigmas = sigma_from_angle(angles.float().cpu())
    return Grid(sigmas=sigmas, timesteps=sigmas[:-1].clone(), trig=True)


def custom_grid(
    timesteps: Numbers | None = None,
    sigmas: Numbers | None = None,
    *,
    truncate: bool = True,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> Grid:
    """Return a grid of the caller's own levels, given as timesteps (sigma = t / 1000) or as sigmas; a 0 is appended.

    Both lists must fall strictly; a last value of 0 is taken as the end that would be appended. Timesteps are kept as
    given. Timesteps made from sigmas are truncated to integers, as Flow-DPM-Solver does, unless `truncate` is False.
    Raises InvalidInput.
    """
    if timesteps is not None and sigmas is not None:
        raise InvalidInput("Only one of `timesteps` or `sigmas` can be passed. Please choose one to set custom values.")
    if timesteps is not None:
        values = _without_end(_numbers(timesteps, "timesteps"), "timesteps")
        whole = all(isinstance(value, int) for value in values)
        levels = [value / num_train_timesteps for value in values]
        told = torch.tensor(values, dtype=torch.int64 if whole else torch.float32)
    elif sigmas is not None:
        levels = _without_end(_numbers(sigmas, "sigmas"), "sigmas")
        exact = torch.tensor(levels, dtype=torch.float64) * num_train_timesteps
        # A sigma that came as t / 1000 through float32 may sit 6e-5 below t; truncation must still find t.
        told = (exact + 1e-4).long() if truncate else exact.float()
    else:
        raise InvalidInput("A custom grid needs either `timesteps` or `sigmas`. Give one of them.")
    return Grid(sigmas=torch.tensor([*levels, 0.0], dtype=torch.float32), timesteps=told)


def _numbers(values: Numbers, name: str) -> list[float]:
    """Return the values as a list of Python numbers, integers kept as integers."""
    try:
        listed = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    except ValueError:  # lists of different lengths
        listed = np.empty(0)
    if listed.ndim != 1 or len(listed) == 0 or listed.dtype.kind not in "iuf":
        kind = type(values).__name__
        raise InvalidInput(
            f"`{name}` must be a list of numbers, but is a {kind} of something else. Give for example [999, 750, 400]."
        )
    return list(listed.tolist())


def _without_end(values: list[float], name: str) -> list[float]:
    _check_falling(values, name)
    start = values[:-1] if values[-1] == 0 else values
    if not start:
        raise InvalidInput(f"`{name}` holds only the end of the path, 0. Put the levels of the steps before it.")
    return start


def _check_falling(values: Sequence[float], name: str) -> None:
    if any(after >= before for before, after in itertools.pairwise(values)):
        raise InvalidInput(
            f"`{name}` must fall from step to step, but is {_short(values)}. Sort it downwards without repeats."
        )


def _checked_steps(num_steps: int | None) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise InvalidInput(f"The number of steps must be a whole number of at least 1, but is {str(num_steps)[:40]}.")
    return num_steps


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise InvalidInput(
            f"The flow shift must be a number above 0, but is {shift}. SANA uses 3.0, and 6.0 at 4096 px."
        )


def _short(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:6])
    return f"[{shown}, ...]" if len(values) > 6 else f"[{shown}]"
