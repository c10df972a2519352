"""A flow network in TrigFlow coordinates, and its derivative along a direction.

Shapes: B batch, ... any further axes. Data has standard deviation sigma_d in TrigFlow coordinates; a network sees the
state divided by it, `x` below, so that x = cos t x0 + sin t noise with x0 as flow models have it. Angles t are [B].
Source: SANA-Sprint (arXiv 2503.09641, section 3.1).
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from sana.flow.path import SIGMA_DATA, flow_from_trig, sigma_from_angle, trig_prediction

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A flow network: (x [B, ...] on the straight path, sigma [B]) -> velocity [B, ...]."""
Network = Callable[[Tensor, Tensor], Tensor]
"""A TrigFlow network F: (x [B, ...] divided by sigma_d, t [B]) -> [B, ...]; the flow is d(sigma_d x)/dt = sigma_d F."""
Derivative = Callable[[Network, tuple[Tensor, Tensor], tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
"""(network, (x, t), direction in x and t) -> (F there, derivative of F along the direction)."""

LAST_ANGLE = math.pi / 2 - 1e-4
"""Largest angle of the consistency loss, whose weight 1 / tan t changes its sign at pi / 2."""
STEP = 1e-3
"""Half the distance of the two evaluations of a central difference, in units of the direction."""


def trig_network(velocity: Velocity) -> Network:
    """Wrap a flow network without loss: the same signal-to-noise ratio, the same information."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        sigma = sigma_from_angle(t)
        on_path = flow_from_trig(x, sigma, 1.0)
        return trig_prediction(on_path, velocity(on_path, sigma), sigma)

    return network


def spread(t: Tensor, x: Tensor) -> Tensor:
    """Give angles [B] the trailing axes of `x`."""
    return t.view(-1, *[1] * (x.ndim - 1))


def noised(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the state at `t`: cos t x0 + sin t noise."""
    angle = spread(t, x0)
    return angle.cos() * x0 + angle.sin() * noise


def consistent(network: Network, x: Tensor, t: Tensor) -> Tensor:
    """Return the clean sample that a consistency model jumps to, cos t x - sin t F(x, t); at t = 0 it is x."""
    angle = spread(t, x)
    return angle.cos() * x - angle.sin() * network(x, t)


def draw_angles(
    n: int, mean: float, std: float, generator: Generator | None = None, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Draw angles [n] in (0, LAST_ANGLE]: arctan(e^tau / sigma_d) with tau ~ N(mean, std^2). sCM, Lu & Song 2024."""
    tau = mean + std * torch.randn(n, generator=generator)
    return torch.atan(tau.exp() / sigma_data).clamp(max=LAST_ANGLE)


def forward_mode(network: Network, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Differentiate exactly, in one pass of forward-mode differentiation; see `Derivative`."""
    answer = torch.func.jvp(network, at, along)
    return answer[0], answer[1]


def central_difference(
    network: Network, at: tuple[Tensor, Tensor], along: tuple[Tensor, Tensor], step: float = STEP
) -> tuple[Tensor, Tensor]:
    """Differentiate by two more evaluations, where an operation has no forward mode; see `Derivative`."""
    ahead = network(at[0] + step * along[0], at[1] + step * along[1])
    behind = network(at[0] - step * along[0], at[1] - step * along[1])
    return network(*at), (ahead - behind) / (2 * step)


DERIVATIVES: dict[str, Derivative] = {"forward": forward_mode, "difference": central_difference}
