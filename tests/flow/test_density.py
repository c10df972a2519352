import math

import pytest
import torch
from gaussian_flow import GaussianFlow

from sana.errors import InvalidInput
from sana.flow.density import DENSITIES, sample_levels, sample_sigmas
from sana.flow.path import interpolate, velocity_target
from sana.flow.schedules import shift_sigma

N = 100_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(form: str, shift: float, **options) -> torch.Tensor:
    if form == "real":
        return sample_sigmas(N, shift, seeded(), **options)
    return sample_levels(N, shift, seeded(), **options).sigmas


@pytest.mark.parametrize("form", ["real", "table"])
@pytest.mark.parametrize(
    ("shift", "mean", "q10", "median", "q90", "above", "below"),
    [
        (1.0, 0.5000, 0.2173, 0.5000, 0.7827, 0.0016, 0.136),
        (3.0, 0.7140, 0.4544, 0.7500, 0.9153, 0.0324, 0.0140),
        (4.0, 0.7613, 0.5262, 0.8000, 0.9351, 0.0596, 0.0065),
        (6.0, 0.8190, 0.6249, 0.8571, 0.9558, 0.1245, 0.0019),
    ],
)
def test_quantiles_after_the_shift(form: str, shift: float, mean, q10, median, q90, above, below) -> None:
    """Algorithms 1.2 and S1.3: median 0.75 within 0.005 for shift 3."""
    sigmas = draw(form, shift)
    quantiles = sigmas.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    assert quantiles == pytest.approx([q10, median, q90], abs=0.005)
    assert sigmas.mean().item() == pytest.approx(mean, abs=0.003)
    assert (sigmas > 0.95).float().mean().item() == pytest.approx(above, abs=0.003)
    assert (sigmas < 0.25).float().mean().item() == pytest.approx(below, abs=0.003)


def test_table_covers_the_whole_integers_and_never_reaches_one() -> None:
    """S1.3: conditioning integers from 0 to 999, with a spread that makes both ends likely."""
    levels = sample_levels(N, 3.0, seeded(), std=4.0)
    assert levels.timesteps.dtype == torch.int64
    assert levels.timesteps.min() == 0
    assert levels.timesteps.max() == 999
    assert levels.sigmas.max().item() == pytest.approx(0.99967, abs=1e-5)
    assert levels.sigmas.min() == 0


def test_table_truncates_only_what_the_network_is_told() -> None:
    levels = sample_levels(N, 3.0, seeded())
    gap = levels.sigmas.double() * 1000 - levels.timesteps
    assert gap.min() > -1e-4
    assert gap.max() < 1 + 1e-4
    assert gap.std() > 0.25
    raw = levels.sigmas.double() / (3 - 2 * levels.sigmas.double())
    assert (raw * 1000 - (raw * 1000).round()).abs().max() < 1e-3


def test_shift_is_a_change_of_the_logit_mean() -> None:
    shifted = sample_sigmas(N, 3.0, seeded())
    moved = sample_sigmas(N, 1.0, seeded(), mean=math.log(3))
    torch.testing.assert_close(shifted, moved, rtol=0, atol=2e-6)


def test_uniform_density() -> None:
    sigmas = sample_sigmas(N, 1.0, seeded(), density="uniform")
    assert sigmas.mean().item() == pytest.approx(0.5, abs=0.005)
    assert sigmas.var().item() == pytest.approx(1 / 12, abs=0.002)
    counts = torch.bincount(sample_levels(N, 1.0, seeded(), density="uniform").timesteps // 100, minlength=10)
    assert counts.tolist() == pytest.approx([N / 10] * 10, rel=0.05)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_seed_fixes_the_draw(density: str) -> None:
    first, again, other = (sample_sigmas(8, 3.0, seeded(seed), density=density) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("std", "shift", "floor"), [(1.0, 1.0, 1.7413), (1.0, 3.0, 1.5824), (0.5, 1.0, 0.8111), (0.5, 3.0, 0.5167)]
)
def test_exact_velocity_reaches_the_irreducible_loss(std: float, shift: float, floor: float) -> None:
    """S1.1: the exact velocity of Gaussian data has the published loss under this density."""
    flow = GaussianFlow(0.3, std)
    sigma = sample_sigmas(400_000, shift, seeded()).double()
    generator = seeded(1)
    x0 = 0.3 + std * torch.randn(400_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(400_000, generator=generator, dtype=torch.float64)
    x, target = interpolate(x0, noise, sigma), velocity_target(x0, noise)
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    exact = -0.3 + (sigma - (1 - sigma) * std**2) / variance * (x - (1 - sigma) * 0.3)
    torch.testing.assert_close(exact[0], flow.velocity(x[0], sigma[0].item()))
    loss = (exact - target).square().mean().item()
    assert loss == pytest.approx(floor, rel=0.005)
    assert (exact + 0.1 - target).square().mean().item() == pytest.approx(loss + 0.01, abs=0.003)


def test_zero_output_loses_the_variance_of_the_target() -> None:
    """S1.2: unit-variance latents and a zeroed output layer."""
    generator = seeded(2)
    x0, noise = (torch.randn(N, generator=generator) for _ in range(2))
    assert velocity_target(x0, noise).square().mean().item() == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"density": "logitnormal"},
            r"'logitnormal'. Did you mean 'logit-normal'\? Choose one of: logit-normal, uniform",
        ),
        ({"std": 0.0}, "standard deviation"),
        ({"shift": 0.0}, "flow shift"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    for sample in (sample_sigmas, sample_levels):
        with pytest.raises(InvalidInput, match=message):
            sample(4, **options)


def test_raw_levels_are_the_shifted_ones_without_a_shift() -> None:
    torch.testing.assert_close(sample_sigmas(64, 3.0, seeded()), shift_sigma(sample_sigmas(64, 1.0, seeded()), 3.0))
