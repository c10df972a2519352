"""Those who play in a distillation, and what a loss is to them.

Shapes: B batch, C latent channels, h w latent size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from sana.models.discriminator import DiscriminatorHeads
from sana.models.linear_dit import LinearDiT
from sana.training.objectives.sprint.networks import Condition
from sana.training.objectives.sprint.trigflow import Network, draw_angles

Told = tuple[Tensor, Mapping[str, Tensor]]
"""A loss, and the figures that are logged beside it."""


class Players(nn.Module):
    """All that learns: the student (all of it, or an adapter or branch), the log-variance of its consistency loss, the
    discriminator's heads and critic.
    """

    critic: LinearDiT | None

    def __init__(self, student: nn.Module, critic: LinearDiT | None, width: int, taps: int, group: int) -> None:
        super().__init__()
        self.student, self.critic = student, critic
        self.log_variance = nn.Linear(width, 1)
        self.heads = DiscriminatorHeads(width, taps, group)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.zeros_(self.log_variance.bias)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What one draw of the data gives a player."""

    latents: Tensor
    """Clean latents [B, C, h, w]."""
    under: Condition
    null: Condition
    """The unconditional text for every row, of the same shapes, with the same control pictures."""
    guidance: Tensor
    """The scale that each sample is told, [B]."""
    step: int
    """Steps before this one, of both players together."""
    generator: Generator

    def noise(self, like: Tensor) -> Tensor:
        """Draw standard normal noise of the shape of `like`."""
        return torch.randn(like.shape, generator=self.generator).to(like.device)

    def angles(self, mean: float, std: float) -> Tensor:
        """Draw angles [B], normal in the logarithm of their tangent."""
        return draw_angles(len(self.latents), mean, std, self.generator).to(self.latents.device)


class Loss(Protocol):
    """What teaches the student."""

    def of_generator(self, student: Network, given: Given) -> Told:
        """Return what the student lowers; `student` is its network under the given condition."""


class TwoSidedLoss(Loss, Protocol):
    """A loss for which the discriminator learns something, too."""

    def of_discriminator(self, student: Network, given: Given) -> Told:
        """Return what the discriminator lowers; the student is fixed."""
