"""The continuous-time consistency loss (sCM, Lu & Song 2024) in the form of SANA-Sprint (arXiv 2503.09641, section 3).

Shapes: B batch, ... any further axes; x is the TrigFlow state divided by sigma_d, angles t are [B]; see `trigflow`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sana.flow.path import SIGMA_DATA
from sana.training.objectives.sprint.trigflow import Derivative, Network, forward_mode, spread

NORM_OFFSET = 0.1
"""What is added to the norm of a tangent, so that a small one stays small."""


def tangent(
    network: Network,
    x: Tensor,
    t: Tensor,
    drift: Tensor,
    share: float,
    *,
    derivative: Derivative = forward_mode,
    sigma_data: float = SIGMA_DATA,
) -> tuple[Tensor, Tensor]:
    """Return F and the tangent g, [B, ...] each, both constants: cos t times the derivative of the jump along the flow.

    Args:
        drift: d(sigma_d x)/dt of the teacher, sigma_d F_teacher.
        share: weight of the part with the network's own derivative, from 0 at the start of training to 1 (warm-up).
    """
    angle = spread(t, x)
    cos, sin = angle.cos(), angle.sin()
    speed = t.cos() * t.sin()
    along = (cos * sin * drift / sigma_data, speed)
    with torch.no_grad():
        value, change = derivative(network, (x, t), along)
        value, change = value.detach(), change.detach()
        # In its exact form the second part is singular towards pure noise; the factor cos t tames it.
        g = -(cos**2) * (sigma_data * value - drift) - share * sigma_data * (cos * sin * x + change)
    return value, g


def by_norm(g: Tensor) -> Tensor:
    """Bring the tangent of each sample to unit length, nearly; for samples of many values."""
    norm = g.flatten(1).norm(dim=1)
    return g / (spread(norm, g) + NORM_OFFSET)


def clipped(g: Tensor) -> Tensor:
    """Cut every value to [-1, 1]; for samples of a few values, of which the norm leaves nothing but the sign."""
    return g.clamp(-1, 1)


def by_batch(g: Tensor) -> Tensor:
    """Divide by the root mean square over the batch; for samples of a few values."""
    return g / (g.square().mean().sqrt() + NORM_OFFSET)


def weighted(
    prediction: Tensor, value: Tensor, g: Tensor, t: Tensor, log_variance: Tensor, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Return the loss of each sample [B]: e^-l / (sigma_d tan t) mean (F - F^- - g)^2 + l, with l = `log_variance` [B].

    `prediction` is F with gradients, `value` the same F as a constant: a step along the gradient moves F by g.
    """
    error = (prediction - value - g).square().flatten(1).mean(1)
    return error * torch.exp(-log_variance) / (sigma_data * t.tan()) + log_variance


LIMITS: dict[str, Callable[[Tensor], Tensor]] = {"norm": by_norm, "clip": clipped, "batch": by_batch}
