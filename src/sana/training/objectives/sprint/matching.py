"""Distribution matching: what a student draws moves to where its teacher finds it more likely than a critic does.

The critic is a flow model of what the student draws now. From the same noised sample it and the guided teacher predict
two clean ones, and their difference is the slope of the divergence between the two distributions: no path of the
teacher must be copied, which a small student cannot do in one step.

Shapes: B batch, ... any further axes; x is the TrigFlow state divided by sigma_d, angles t are [B]; see `trigflow`.
Source: DMD (Yin et al. 2023, arXiv 2311.18828, equations 7 and 8); DMD2 (Yin et al. 2024, arXiv 2405.14867) for more
than one step, where a student meets what it drew itself, noised again.
"""

import torch
from torch import Generator, Tensor

from sana.flow.path import angle_from_sigma
from sana.flow.schedules import shift_sigma
from sana.training.objectives.sprint.trigflow import Network, consistent, noised, spread

LEVELS = (0.02, 0.98)
"""Ends of the even levels, before their shift, at which samples are compared."""
RESUMED = (0.3, 1.4)
"""Ends of the angles at which a student goes on: 1.3 in two steps; 1.18, 0.79 and 0.39 in four."""
LEAST = 1e-2
"""Least distance of a sample from the teacher's by which a slope is divided."""


def draw_levels(n: int, shift: float, generator: Generator) -> Tensor:
    """Draw the angles [n] of shifted even levels."""
    low, high = LEVELS
    return angle_from_sigma(shift_sigma(low + (high - low) * torch.rand(n, generator=generator), shift))


def draw_resumed(n: int, generator: Generator) -> Tensor:
    """Draw angles [n] at which a run of a few steps may go on."""
    low, high = RESUMED
    return low + (high - low) * torch.rand(n, generator=generator)


def student_loss(x0: Tensor, noise: Tensor, t: Tensor, teacher: Network, critic: Network) -> Tensor:
    """Return a loss whose gradient by the samples x0 [B, ...] is the slope, each in units of its distance.

    Args:
        noise: standard normal, [B, ...].
        t: angles to which the samples are noised.
    """
    with torch.no_grad():
        x = noised(x0, noise, t)
        likely, own = consistent(teacher, x, t), consistent(critic, x, t)
        distance = (x0 - likely).abs().flatten(1).mean(1).clamp(min=LEAST)
        slope = (own - likely) / spread(distance, x0)
    return 0.5 * (x0 - (x0 - slope).detach()).square().mean()


def critic_loss(x0: Tensor, noise: Tensor, t: Tensor, critic: Network) -> Tensor:
    """Return the flow-matching loss of the critic on samples of the student: (F - (cos t noise - sin t x0))^2."""
    angle = spread(t, x0)
    target = angle.cos() * noise - angle.sin() * x0
    return (critic(noised(x0, noise, t), t) - target).square().mean()
