"""Where training looks: distributions of the noise level, with the flow shift.

The loss has no level-dependent weight, so the density of sigma is the whole emphasis of training.

Shapes: n levels, one per sample [n]; float32 on the CPU, drawn there so that a seed means the same run everywhere.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from sana.errors import InvalidInput, did_you_mean
from sana.flow.schedules import NUM_TRAIN_TIMESTEPS, shift_sigma


class NoiseLevels(NamedTuple):
    """Levels and what the network is told about them."""

    sigmas: Tensor
    """The exact noise level of each sample [n], float32."""
    timesteps: Tensor
    """The conditioning value of each sample [n], int64."""


def sample_sigmas(
    n: int,
    shift: float = 3.0,
    generator: Generator | None = None,
    *,
    density: str = "logit-normal",
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Draw real-valued levels [n] in (0, 1), for models told 1000 sigma (or sigma) without truncation.

    `mean` and `std` belong to the logit-normal, whose mean a shift moves by ln(shift). Raises InvalidInput.
    """
    return shift_sigma(_draw(n, generator, density, mean, std), _checked(shift))


def sample_levels(
    n: int,
    shift: float = 3.0,
    generator: Generator | None = None,
    *,
    density: str = "logit-normal",
    mean: float = 0.0,
    std: float = 1.0,
    num_train_timesteps: int = NUM_TRAIN_TIMESTEPS,
) -> NoiseLevels:
    """Draw levels as the published SANA models were trained: from the table 0, 0.001, ..., 0.999, then shifted.

    The noise level stays exact; only the conditioning value is truncated to an integer, as in sampling.
    Raises InvalidInput.
    """
    raw = _draw(n, generator, density, mean, std)
    index = (raw.double() * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)
    sigmas = shift_sigma(index.double() / num_train_timesteps, _checked(shift))
    return NoiseLevels(sigmas=sigmas.float(), timesteps=(sigmas * num_train_timesteps).long())


def _draw(n: int, generator: Generator | None, density: str, mean: float, std: float) -> Tensor:
    if density not in DENSITIES:
        raise InvalidInput(
            f"There is no density '{density}'.{did_you_mean(density, DENSITIES)} Choose one of: {', '.join(DENSITIES)}."
        )
    if std <= 0:
        raise InvalidInput(f"The standard deviation of the logits must be above 0, but is {std}.")
    return DENSITIES[density](n, generator, mean, std)


def _checked(shift: float) -> float:
    if not shift > 0:
        raise InvalidInput(f"The flow shift must be above 0, but is {shift}. SANA uses 3.0, and 6.0 at 4096 px.")
    return shift


def _logit_normal(n: int, generator: Generator | None, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator))


def _uniform(n: int, generator: Generator | None, mean: float, std: float) -> Tensor:
    return torch.rand(n, generator=generator)


def loss_weights(name: str, sigmas: Tensor, gamma: float = 5.0) -> Tensor:
    """Return the weight [n] of each level in the loss of the velocity.

    With the signal-to-noise ratio r = ((1 - sigma) / sigma)^2, an error of the velocity is sigma times as large in x0:
    min-snr weighs the squared error of x0 by min(r, gamma) (Hang et al. 2023, arXiv 2303.09556, equation 8), so that of
    the velocity by min((1 - sigma)^2, gamma sigma^2). sigma-sqrt is sigma^-2, cosmap 2 / (pi (1 - 2 sigma + 2 sigma^2))
    (Esser et al. 2024, arXiv 2403.03206, section 3.1). Raises InvalidInput.
    """
    if name not in WEIGHTINGS:
        known = ", ".join(WEIGHTINGS)
        raise InvalidInput(f"There is no weighting '{name}'.{did_you_mean(name, WEIGHTINGS)} Choose one of: {known}.")
    return WEIGHTINGS[name](sigmas, gamma)


WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda sigmas, _: torch.ones_like(sigmas),
    "min-snr": lambda sigmas, gamma: torch.minimum((1 - sigmas) ** 2, gamma * sigmas**2),
    "sigma-sqrt": lambda sigmas, _: sigmas.clamp(min=1e-3) ** -2.0,  # the smallest level but 0 of the published table
    "cosmap": lambda sigmas, _: 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)),
}
DENSITIES: dict[str, Callable[[int, Generator | None, float, float], Tensor]] = {
    "logit-normal": _logit_normal,
    "uniform": _uniform,
}
