import math

import pytest
import torch

from sana.errors import InvalidInput
from sana.flow import path

LEVELS = [0.001, 0.2, 0.5, 0.75, 0.999]


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("sigma", LEVELS)
def test_velocity_recovers_both_ends(sigma: float) -> None:
    x0, noise = pair(2, 3, 4, 4)
    x = path.interpolate(x0, noise, sigma)
    v = path.velocity_target(x0, noise)
    torch.testing.assert_close(path.x0_from_velocity(x, v, sigma), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(path.noise_from_velocity(x, v, sigma), noise, rtol=0, atol=1e-14)
    torch.testing.assert_close(path.velocity_from_x0(x, x0, sigma), v, rtol=0, atol=1e-11)


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, noise = pair(2, 3, 4, 4)
    ahead, behind = path.interpolate(x0, noise, 0.4 + 1e-6), path.interpolate(x0, noise, 0.4 - 1e-6)
    torch.testing.assert_close((ahead - behind) / 2e-6, path.velocity_target(x0, noise), rtol=0, atol=1e-9)


def test_levels_act_per_sample() -> None:
    x0, noise = pair(3, 2, 4, 4)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = path.interpolate(x0, noise, sigma)
    for row, level in enumerate(sigma.tolist()):
        torch.testing.assert_close(x[row], path.interpolate(x0[row], noise[row], level), rtol=0, atol=1e-15)
    radius = path.flow_from_trig(x, sigma, 0.5)[1] / path.flow_from_trig(x[1], 0.5, 0.5)
    torch.testing.assert_close(radius, torch.ones_like(radius), rtol=0, atol=1e-15)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 4, 1.3, 1.5, 1.57080])
def test_trigflow_state_maps_to_the_flow_path_and_back(angle: float) -> None:
    x0, z = pair(2, 3, 4, 4)
    t = torch.tensor(angle, dtype=torch.float64)
    sigma = path.sigma_from_angle(t)
    trig = 0.5 * (t.cos() * x0 + t.sin() * z)
    flow = path.interpolate(x0, z, sigma)
    torch.testing.assert_close(path.flow_from_trig(trig, sigma), flow, rtol=0, atol=2e-15)
    torch.testing.assert_close(path.trig_from_flow(flow, sigma.item()), trig, rtol=0, atol=2e-15)
    torch.testing.assert_close(path.angle_from_sigma(sigma), t, rtol=0, atol=2e-15)


@pytest.mark.parametrize("angle", [0.05, 0.4, math.pi / 4, 1.2, 1.5])
def test_wrapped_prediction_is_the_trigflow_velocity(angle: float) -> None:
    """The ideal TrigFlow output is cos t z - sin t x0, whatever the scale of the data."""
    x0, z = pair(2, 3, 4, 4)
    t = torch.tensor(angle, dtype=torch.float64)
    sigma = path.sigma_from_angle(t)
    x, v = path.interpolate(x0, z, sigma), path.velocity_target(x0, z)
    prediction = path.trig_prediction(x, v, sigma)
    torch.testing.assert_close(prediction, t.cos() * z - t.sin() * x0, rtol=0, atol=5e-15)
    torch.testing.assert_close(path.velocity_from_trig(x, prediction, sigma), v, rtol=0, atol=2e-14)


def test_first_published_angle_lies_just_beyond_one() -> None:
    sigma = path.sigma_from_angle(torch.tensor(1.57080, dtype=torch.float64)).item()
    assert 1 < sigma < 1 + 4e-6
    assert path.sigma_from_angle(torch.tensor(math.pi / 4, dtype=torch.float64)).item() == pytest.approx(0.5, abs=1e-15)


def test_one_generator_per_sample_draws_each_picture_alone() -> None:
    batch = path.draw_noise((3, 2, 4, 4), [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = path.draw_noise((1, 2, 4, 4), torch.Generator().manual_seed(6))
    torch.testing.assert_close(batch[1:2], alone, rtol=0, atol=0)
    whole = path.draw_noise((3, 2, 4, 4), torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        whole, torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5)), rtol=0, atol=0
    )
    assert not torch.equal(whole[1], batch[1])


def test_a_list_of_one_generator_draws_the_batch_at_once() -> None:
    single, listed = (torch.Generator().manual_seed(1) for _ in range(2))
    torch.testing.assert_close(path.draw_noise((2, 3), single), path.draw_noise((2, 3), [listed]), rtol=0, atol=0)


def test_wrong_number_of_generators_is_named() -> None:
    with pytest.raises(
        InvalidInput, match=r"list of generators of length 2, but requested an effective batch size of 3"
    ):
        path.draw_noise((3, 1), [torch.Generator(), torch.Generator()])
