"""The flow path x = (1 - sigma) x0 + sigma noise, its recoveries, and the map to TrigFlow coordinates.

Shapes: B batch, ... any further axes (latents are [B, C, H, W]). A level (`sigma`, or an angle `t`) is a number, a 0-d
tensor, or a tensor [B] with one level per sample.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sana.errors import InvalidInput

SIGMA_DATA = 0.5
"""Standard deviation of the data in TrigFlow coordinates (the SANA-Sprint models)."""

Level = float | Tensor
Generators = torch.Generator | Sequence[torch.Generator] | None


def interpolate(x0: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """Return the point of the straight path at `sigma`: x0 at 0, noise at 1. Rectified flow, Liu et al. 2022."""
    level = _spread(sigma, x0)
    return (1 - level) * x0 + level * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Return dx/dsigma = noise - x0, what the network is trained to predict at every level."""
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """Return the clean sample that `velocity` implies at `x`: x - sigma v."""
    return x - _spread(sigma, x) * velocity


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """Return the noise that `velocity` implies at `x`: x + (1 - sigma) v."""
    return x + (1 - _spread(sigma, x)) * velocity


def velocity_from_x0(x: Tensor, x0: Tensor, sigma: Level) -> Tensor:
    """Return the velocity at `x` of a path that ends in `x0`: (x - x0) / sigma. `sigma` must not be 0."""
    return (x - x0) / _spread(sigma, x)


def sigma_from_angle(angle: Tensor) -> Tensor:
    """Return the flow level with the same signal-to-noise ratio as the TrigFlow angle t: sin t / (sin t + cos t).

    SANA-Sprint, section 3.1. The published first angle 1.57080 is a hair beyond pi/2, so its level is 1 + 4e-6.
    """
    return angle.sin() / (angle.sin() + angle.cos())


def angle_from_sigma(sigma: Tensor) -> Tensor:
    """Return the TrigFlow angle t of a flow level: tan t = sigma / (1 - sigma)."""
    return torch.atan2(sigma, 1 - sigma)


def flow_from_trig(x: Tensor, sigma: Level, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Map a TrigFlow state, cos t x0 + sin t z with data of standard deviation `sigma_data`, to the flow path."""
    return x * (_radius(sigma, x) / sigma_data)


def trig_from_flow(x: Tensor, sigma: Level, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Map a state of the flow path to TrigFlow coordinates; the inverse of `flow_from_trig`."""
    return x * (sigma_data / _radius(sigma, x))


def trig_prediction(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """Return the TrigFlow network output F for a flow state and its velocity; dx_trig/dt = sigma_data F.

    F = ((1 - 2u) x + (1 - 2u + 2u^2) v) / sqrt(u^2 + (1 - u)^2) with u = sigma. SANA-Sprint, equation 9.
    """
    level = _spread(sigma, x)
    radius = _radius(sigma, x)
    return ((1 - 2 * level) * x + radius**2 * velocity) / radius


def velocity_from_trig(x: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
    """Return the flow velocity of a TrigFlow network output at the flow state `x`; the inverse of `trig_prediction`."""
    level = _spread(sigma, x)
    radius = _radius(sigma, x)
    return (radius * prediction - (1 - 2 * level) * x) / radius**2


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise [B, ...]: one draw for the batch, or one per sample from a list of generators.

    A CPU generator draws on the CPU whatever `device` is, so a seed means the same picture on every machine.
    Raises InvalidInput when the number of generators is not the batch size.
    """
    if isinstance(generator, Sequence):
        if len(generator) == 1:
            return draw_noise(shape, generator[0], device=device, dtype=dtype)
        if len(generator) != shape[0]:
            raise InvalidInput(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch "
                f"size of {shape[0]}. Make sure the batch size matches the length of the generators."
            )
        rows = [draw_noise((1, *shape[1:]), single, device=device, dtype=dtype) for single in generator]
        return torch.cat(rows)
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)


def _spread(level: Level, x: Tensor) -> Level:
    """Give a level [B] the trailing axes of `x`, so that it acts per sample; numbers and 0-d tensors pass through."""
    if isinstance(level, Tensor) and level.ndim > 0:
        return level.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    return level


def _radius(sigma: Level, x: Tensor) -> Level:
    """Return sqrt(sigma^2 + (1 - sigma)^2), the scale between the straight path and the circle."""
    level = _spread(sigma, x)
    if isinstance(level, Tensor):
        return (level**2 + (1 - level) ** 2).sqrt()
    return math.hypot(level, 1 - level)
