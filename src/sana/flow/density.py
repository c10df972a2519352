"""Where training looks: distributions of the noise level, with the flow shift.

The loss has no level-dependent weight, so the density of sigma is the whole emphasis of training.

Shapes: n levels, one per sample [n]; float32 on the CPU, drawn there so that a seed means the same run everywhere.
"""

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


DENSITIES: dict[str, Callable[[int, Generator | None, float, float], Tensor]] = {
    "logit-normal": _logit_normal,
    "uniform": _uniform,
}
