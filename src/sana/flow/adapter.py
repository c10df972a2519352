"""Any scheduler object as a sampler of the loop.

Shapes: samples, velocities and model outputs [B, C, H, W]; n steps.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.flow.path import SIGMA_DATA, Generators, flow_from_trig, trig_from_flow, trig_prediction
from sana.flow.samplers import Noise, Steps, Velocity, walk
from sana.flow.schedules import (
    MAX_ANGLE,
    MIDDLE_ANGLE,
    NUM_TRAIN_TIMESTEPS,
    Grid,
    Numbers,
    scm_angles,
    tail_levels,
    trig_grid,
)


class AnyScheduler(Protocol):
    """What the adapter needs of a scheduler object, this package's or any other's."""

    timesteps: Any
    set_timesteps: Callable[..., Any]
    step: Callable[..., Any]


class SchedulerSampler:
    """A scheduler object as a sampler of the loop, with the members of `samplers.BoundSampler`: `grid` and `run`.

    An object that works in TrigFlow coordinates is translated; the loop never sees them. Its `set_timesteps` must have
    been called, and again before each further run, for it holds the position.

    Args:
        generator: handed to a `step` that takes one.
        begin: the step to start with, for image-to-image.
        clock: what the network reads at sigma 1, which is 1 for SANA-Sprint and 1000 for the other models; a scheduler
            made for the other kind is translated. None tells the network what the scheduler says.

    Raises:
        InvalidInput: the object's levels are none, or `begin` lies outside of them.
    """

    def __init__(
        self, scheduler: AnyScheduler, generator: Generators = None, begin: int = 0, clock: float | None = None
    ) -> None:
        self.scheduler = scheduler
        self.generator = generator
        self.begin = begin
        self._sigma_data = sigma_data_of(scheduler)
        trig = self._sigma_data is not None
        whole = trig_grid(scheduler.timesteps) if trig else _flow_grid(scheduler)
        if not 0 <= begin < whole.num_steps:
            raise InvalidInput(f"The run has {whole.num_steps} steps; it cannot start at step {begin}.")
        sigmas, timesteps = whole.sigmas[begin:], whole.timesteps[begin:]
        if clock is not None and trig != (clock == 1):
            timesteps = sigmas[:-1] * clock
        self.grid = Grid(sigmas=sigmas, timesteps=timesteps, trig=trig)

    def timestep(self, i: int) -> Any:
        """Return the scheduler's own timestep of step `i` of this run."""
        return self.scheduler.timesteps[self.begin + i]

    def own(self, x: Tensor, sigma: float) -> Tensor:
        """Return a flow state at `sigma` in the scheduler's own coordinates, TrigFlow times sigma_data or flow."""
        return x if self._sigma_data is None else trig_from_flow(x, sigma, self._sigma_data)

    def flow(self, state: Tensor, sigma: float) -> Tensor:
        """Return a state in the scheduler's own coordinates as a flow state; the inverse of `own`."""
        return state if self._sigma_data is None else flow_from_trig(state, sigma, self._sigma_data)

    def first(self, noise: Tensor) -> Tensor:
        """Return the flow state that stands for pure noise [B, C, H, W], of standard deviation 1, at the first level.

        The reference starts with sigma_data times the noise at whatever angle comes first.
        """
        return noise if self._sigma_data is None else self.flow(noise * self._sigma_data, self.grid.sigmas[0].item())

    def run(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> Steps:
        """Walk from `x`, a flow state at `grid.sigmas[0]`; `noise(i)` serves an object whose `step` takes `noise`."""
        if getattr(self.scheduler, "step_index", None) is not None:
            raise InvalidInput(
                f"This {type(self.scheduler).__name__} is in the middle of a run. Call set_timesteps first."
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.begin)
        accepted = _parameters(self.scheduler.step)
        options = {"generator": self.generator, "return_dict": False}
        fixed = {name: value for name, value in options.items() if accepted is None or name in accepted}
        draw = noise if accepted is not None and "noise" in accepted else None

        def update(x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return self._update(x, v, i, fixed if draw is None else {**fixed, "noise": draw(i).to(x)})

        return walk(velocity, x, self.grid, update)

    def _update(self, x: Tensor, v: Tensor, i: int, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        sigma, sigma_next = self.grid.sigmas[i].item(), self.grid.sigmas[i + 1].item()
        if self._sigma_data is None:
            result = self.scheduler.step(v, self.timestep(i), x, **options)
            return result[0] if isinstance(result, tuple) else result.prev_sample, x - sigma * v
        output = trig_prediction(x, v, sigma) * self._sigma_data
        result = self.scheduler.step(output, self.timestep(i), self.own(x, sigma), **options)
        return self.flow(result[0], sigma_next), result[1] / self._sigma_data


def sigma_data_of(scheduler: AnyScheduler) -> float | None:
    """Return the data's standard deviation of a scheduler in TrigFlow coordinates, None for any other scheduler."""
    if _setting(scheduler, "prediction_type", None) != "trigflow":
        return None
    # A config made from another class's may carry settings that are none of this class.
    own = _parameters(type(scheduler).__init__)
    if own is not None and len(own) > 1 and "prediction_type" not in own:
        return None
    return float(_setting(scheduler, "sigma_data", SIGMA_DATA))


def set_timesteps(
    scheduler: AnyScheduler,
    num_inference_steps: int | None = None,
    *,
    device: torch.device | str | None = None,
    timesteps: Numbers | None = None,
    sigmas: Numbers | None = None,
    **further: Any,
) -> None:
    """Call a scheduler's `set_timesteps` with the number of steps or with custom levels, whichever was given.

    Raises InvalidInput when both kinds of levels are given, or when the object does not take the kind that is.
    """
    if timesteps is not None and sigmas is not None:
        raise InvalidInput("Only one of `timesteps` or `sigmas` can be passed. Please choose one to set custom values.")
    custom = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    for name in custom:
        _check_takes(scheduler, name)
    if custom:
        scheduler.set_timesteps(device=device, **custom, **further)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device, **further)


def set_angles(
    scheduler: AnyScheduler,
    num_inference_steps: int | None = 2,
    *,
    device: torch.device | str | None = None,
    timesteps: Numbers | None = None,
    max_timesteps: float | None = MAX_ANGLE,
    intermediate_timesteps: float | None = MIDDLE_ANGLE,
) -> None:
    """Call a scheduler's `set_timesteps` for a SANA-Sprint run, by the rules of `schedules.scm_angles`.

    An object that is not in TrigFlow coordinates gets the number of steps, or the caller's own timesteps as its own.
    Raises InvalidInput for arguments that contradict each other, or that the object does not take.
    """
    options = {"max_timesteps": max_timesteps, "intermediate_timesteps": intermediate_timesteps}
    defaults = {"max_timesteps": MAX_ANGLE, "intermediate_timesteps": MIDDLE_ANGLE}
    if sigma_data_of(scheduler) is None:
        for name, value in options.items():
            if value not in (None, defaults[name]):
                raise InvalidInput(
                    f"`{name}` is an angle, but a {type(scheduler).__name__} has none. Leave it out, or assign an"
                    " SCMScheduler to `pipe.scheduler`."
                )
        set_timesteps(scheduler, num_inference_steps, device=device, timesteps=timesteps)
        return
    angles = scm_angles(num_inference_steps, max_timesteps, intermediate_timesteps, timesteps)
    steps = len(angles) - 1
    if timesteps is not None:
        options = dict.fromkeys(options)
    elif steps != 2:
        options["intermediate_timesteps"] = None
    accepted = _parameters(scheduler.set_timesteps)
    for name, value in list(options.items()):
        if accepted is not None and name not in accepted:
            if value not in (None, defaults[name]):
                _check_takes(scheduler, name)
            del options[name]
    custom: dict[str, Any] = {}
    if timesteps is not None:
        _check_takes(scheduler, "timesteps")
        custom["timesteps"] = angles.tolist()
    scheduler.set_timesteps(steps, device=device, **custom, **options)


def begin_at(
    scheduler: AnyScheduler, strength: float, *, device: torch.device | str | None = None, between: bool = True
) -> int:
    """Return the step at which image-to-image begins on a scheduler whose timesteps are set, see `tail_levels`.

    `between` is off where there is no picture to be honoured: no start is then moved into the first step.
    A start within the first step gives the scheduler timesteps of its own, with the first of them moved there.
    Raises InvalidInput for a strength outside of [0, 1], one that leaves no step, and a scheduler that takes no
    timesteps of the caller's though they are needed.
    """
    angles = sigma_data_of(scheduler) is not None
    levels = torch.as_tensor(scheduler.timesteps).float().cpu() if angles else _flow_grid(scheduler).sigmas
    skipped, left = tail_levels(levels, strength, trig=angles)
    if skipped or not between or torch.equal(left[0], levels[0]):
        return skipped
    if angles:
        set_angles(scheduler, len(left) - 1, device=device, timesteps=left)
    else:
        set_timesteps(scheduler, device=device, timesteps=(left[:-1] * _training_steps(scheduler)).tolist())
    return 0


def _check_takes(scheduler: AnyScheduler, name: str) -> None:
    """Raise InvalidInput unless a scheduler's `set_timesteps` takes that argument."""
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    if name not in accepted:
        kind = {"timesteps": "timestep", "sigmas": "sigmas"}.get(name, name)
        raise InvalidInput(
            f"The current scheduler class {type(scheduler).__name__}'s `set_timesteps` does not support custom "
            f"{kind} schedules. Leave out `{name}` or use another scheduler."
        )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function by name, None for one that takes any."""
    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if anything else parameters


def _setting(scheduler: AnyScheduler, name: str, default: Any) -> Any:
    """Return a value of a scheduler's configuration, which is a mapping, an object with attributes, or not there."""
    config = getattr(scheduler, "config", {})
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def _training_steps(scheduler: AnyScheduler) -> int:
    return int(_setting(scheduler, "num_train_timesteps", NUM_TRAIN_TIMESTEPS))


def _flow_grid(scheduler: AnyScheduler) -> Grid:
    """Read the grid off a flow scheduler; without `sigmas` they are the timesteps divided by the training steps."""
    timesteps = torch.as_tensor(scheduler.timesteps).cpu()
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps.long()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        sigmas = timesteps / _training_steps(scheduler)
    levels = torch.as_tensor(sigmas).float().cpu()
    if len(levels) == len(timesteps):
        levels = torch.cat([levels, levels.new_zeros(1)])
    return Grid(sigmas=levels, timesteps=timesteps)
