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
from sana.flow.schedules import NUM_TRAIN_TIMESTEPS, Grid, Numbers, trig_grid


class AnyScheduler(Protocol):
    """What the adapter needs of a scheduler object, this package's or any other's."""

    timesteps: Any
    set_timesteps: Callable[..., Any]
    step: Callable[..., Any]


class SchedulerSampler:
    """A scheduler object as a sampler of the loop, with the members of `samplers.BoundSampler`: `grid` and `run`.

    The object's `set_timesteps` must have been called, and again before each further run, for it holds the position.
    `generator` is handed to a `step` that takes one; `begin` is the step to start with, for image-to-image.
    An object that works in TrigFlow coordinates is translated; the loop never sees them. Raises InvalidInput.
    """

    def __init__(self, scheduler: AnyScheduler, generator: Generators = None, begin: int = 0) -> None:
        self.scheduler = scheduler
        self.generator = generator
        self.begin = begin
        config = getattr(scheduler, "config", {})
        self._sigma_data = (
            float(config.get("sigma_data", SIGMA_DATA)) if config.get("prediction_type") == "trigflow" else None
        )
        whole = trig_grid(scheduler.timesteps) if self._sigma_data is not None else _flow_grid(scheduler)
        if not 0 <= begin < whole.num_steps:
            raise InvalidInput(f"The run has {whole.num_steps} steps; it cannot start at step {begin}.")
        self.grid = Grid(sigmas=whole.sigmas[begin:], timesteps=whole.timesteps[begin:])

    def run(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> Steps:
        """Walk from `x`, a flow state at `grid.sigmas[0]`; `noise(i)` serves an object whose `step` takes `noise`."""
        if getattr(self.scheduler, "step_index", None) is not None:
            raise InvalidInput(
                f"This {type(self.scheduler).__name__} is in the middle of a run. Call set_timesteps first."
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.begin)
        accepted = inspect.signature(self.scheduler.step).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        options = {"generator": self.generator, "return_dict": False}
        fixed = {name: value for name, value in options.items() if anything or name in accepted}
        draw = noise if "noise" in accepted else None

        def update(x: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return self._update(x, v, i, fixed if draw is None else {**fixed, "noise": draw(i).to(x)})

        return walk(velocity, x, self.grid, update)

    def _update(self, x: Tensor, v: Tensor, i: int, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        timestep = self.scheduler.timesteps[self.begin + i]
        sigma, sigma_next = self.grid.sigmas[i].item(), self.grid.sigmas[i + 1].item()
        if self._sigma_data is None:
            result = self.scheduler.step(v, timestep, x, **options)
            return result[0] if isinstance(result, tuple) else result.prev_sample, x - sigma * v
        sample = trig_from_flow(x, sigma, self._sigma_data)
        output = trig_prediction(x, v, sigma) * self._sigma_data
        result = self.scheduler.step(output, timestep, sample, **options)
        return flow_from_trig(result[0], sigma_next, self._sigma_data), result[1] / self._sigma_data


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
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name in custom:
        if name not in accepted:
            kind = "timestep" if name == "timesteps" else "sigmas"
            raise InvalidInput(
                f"The current scheduler class {type(scheduler).__name__}'s `set_timesteps` does not support custom "
                f"{kind} schedules. Leave out `{name}` or use another scheduler."
            )
    if custom:
        scheduler.set_timesteps(device=device, **custom, **further)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device, **further)


def _flow_grid(scheduler: AnyScheduler) -> Grid:
    """Read the grid off a flow scheduler; without `sigmas` they are the timesteps divided by the training steps."""
    timesteps = torch.as_tensor(scheduler.timesteps).cpu()
    timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps.long()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        config = getattr(scheduler, "config", {})
        sigmas = timesteps / config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    levels = torch.as_tensor(sigmas).float().cpu()
    if len(levels) == len(timesteps):
        levels = torch.cat([levels, levels.new_zeros(1)])
    return Grid(sigmas=levels, timesteps=timesteps)
