"""Consistency distillation of a one-dimensional flow, whose exact map from noise to data a fine solution gives."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana.flow.path import SIGMA_DATA
from sana.training.objectives.sprint.consistency import LIMITS, tangent
from sana.training.objectives.sprint.trigflow import consistent, draw_angles, noised, trig_network

HALF_PI = torch.pi / 2
STEPS = {2: [HALF_PI, 1.1], 4: [HALF_PI, 1.1781, 0.7854, 0.3927]}
"""The published angles of four steps; a middle angle of two."""
SPREAD = (1.5**2 + 0.25**2) ** 0.5


class Toy(nn.Module):
    """Three residual blocks over a state and slow waves of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(1 + 6, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128)) for _ in range(3)
        )
        self.leave = nn.Linear(128, 1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        waves = sigma[:, None] * torch.tensor([0.5, 1.0, 2.0])
        h = self.enter(torch.cat([x, waves.sin(), waves.cos()], dim=1))
        for block in self.blocks:
            h = h + block(F.silu(h))
        out: Tensor = self.leave(F.silu(h))
        return out


def data(n: int, generator: torch.Generator) -> Tensor:
    side = (torch.rand(n, 1, generator=generator) < 0.5).float() * 3 - 1.5
    return (side + 0.25 * torch.randn(n, 1, generator=generator)) / SPREAD


def flow_model(generator: torch.Generator) -> Toy:
    model = Toy()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(1500):
        x0, noise = data(512, generator), torch.randn(512, 1, generator=generator)
        sigma = torch.rand(512, generator=generator)
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
        optimizer.zero_grad()
        F.mse_loss(model(x, sigma), noise - x0).backward()
        optimizer.step()
    return model


@torch.no_grad()
def exact(model: Toy, noise: Tensor) -> Tensor:
    """The end of a fine midpoint solution in TrigFlow coordinates."""
    network, x, h = trig_network(model), noise.clone(), HALF_PI / 400
    for i in range(400):
        t = torch.full((len(x),), HALF_PI - i * h)
        middle = x - h / 2 * network(x, t)
        x = x - h * network(middle, t - h / 2)
    return x


@torch.no_grad()
def drawn(model: Toy, noise: Tensor, angles: list[float], generator: torch.Generator) -> Tensor:
    x0 = noise
    for i, angle in enumerate(angles):
        t = torch.full((len(noise),), angle)
        x = noise if i == 0 else noised(x0, torch.randn(noise.shape, generator=generator), t)
        x0 = consistent(trig_network(model), x, t)
    return x0


def distance(one: Tensor, other: Tensor) -> float:
    """Wasserstein-1 between two samples of one size, in units where the data has standard deviation sigma_d."""
    return SIGMA_DATA * float((one.flatten().sort().values - other.flatten().sort().values).abs().mean())


@pytest.mark.slow
def test_one_step_reaches_the_exact_map_of_a_bimodal_flow() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher = flow_model(generator)
    student = copy.deepcopy(teacher)
    noise = torch.randn(4096, 1, generator=generator)
    wanted, real = exact(teacher, noise), data(4096, generator)
    before = drawn(student, noise, [HALF_PI], generator)
    rough = {count: distance(drawn(student, noise, angles, generator), real) for count, angles in STEPS.items()}
    network, taught = trig_network(student), trig_network(teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)
    for step in range(2000):
        x0, fresh = data(512, generator), torch.randn(512, 1, generator=generator)
        t = draw_angles(512, 0.2, 1.6, generator)
        x = noised(x0, fresh, t)
        with torch.no_grad():
            drift = SIGMA_DATA * taught(x, t)
        value, g = tangent(network, x, t, drift, min(1.0, step / 500))
        optimizer.zero_grad()
        (network(x, t) - value - LIMITS["clip"](g)).square().mean().backward()
        optimizer.step()
    after = drawn(student, noise, [HALF_PI], generator)
    error = [SIGMA_DATA * float((one - wanted).square().mean().sqrt()) for one in (before, after)]
    assert error[0] > 0.3
    assert error[1] < 0.12
    assert distance(after, real) < 0.05
    found = {count: distance(drawn(student, noise, angles, generator), real) for count, angles in STEPS.items()}
    assert distance(before, real) == pytest.approx(0.478, abs=0.03)
    assert rough[4] == pytest.approx(0.091, abs=0.03)
    assert all(value < 0.05 for value in found.values()), found
    assert found[4] < 0.6 * rough[4]
