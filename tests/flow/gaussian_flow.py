"""A flow with velocity and solution in closed form: independent Gaussian data N(mean, std^2) in every element."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sana.flow.schedules import Grid


@dataclass(frozen=True)
class GaussianFlow:
    mean: float = 0.3
    std: float = 0.5

    def variance(self, sigma: float) -> float:
        return (1 - sigma) ** 2 * self.std**2 + sigma**2

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        slope = (sigma - (1 - sigma) * self.std**2) / self.variance(sigma)
        return -self.mean + slope * (x - (1 - sigma) * self.mean)

    def on(self, grid: Grid):
        sigmas = grid.sigmas.tolist()
        return lambda x, i: self.velocity(x, sigmas[i])

    def exact(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Follow the probability-flow path through `x` from one level to another."""
        scale = math.sqrt(self.variance(sigma_next) / self.variance(sigma))
        return (1 - sigma_next) * self.mean + scale * (x - (1 - sigma) * self.mean)

    def start(self, sigma: float, n: int = 4096) -> Tensor:
        """Quantiles of the marginal at `sigma`: without sampling error, so that RMS errors are exact numbers."""
        ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        normal = math.sqrt(2) * torch.erfinv(2 * ranks - 1)
        return (1 - sigma) * self.mean + math.sqrt(self.variance(sigma)) * normal


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def last(steps) -> Tensor:
    *_, step = steps
    return step.latents
