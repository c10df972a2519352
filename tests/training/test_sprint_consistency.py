"""The consistency loss against worked values, its exact solution, and the finite differences of a real network."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana.flow.path import SIGMA_DATA
from sana.models.linear_dit import LinearDiT
from sana.training.objectives.sprint.consistency import LIMITS, by_norm, tangent, weighted
from sana.training.objectives.sprint.networks import Backbone, Condition, guided, network_of
from sana.training.objectives.sprint.students import student_of
from sana.training.objectives.sprint.trigflow import (
    LAST_ANGLE,
    Network,
    central_difference,
    consistent,
    draw_angles,
    forward_mode,
    noised,
    trig_network,
)
from tiny_model import tiny_transformer

MEAN, STD = 0.3, 0.8
"""Of the data that the worked values are for, in units of sigma_d."""


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact velocity of the straight path from N(MEAN, STD^2) to N(0, 1)."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (x - (1 - sigma) * MEAN) * (sigma - (1 - sigma) * STD**2) / variance


def exact_jump(x: Tensor, t: Tensor) -> Tensor:
    """The end at t = 0 of the flow through x at t: every Gaussian quantile goes to its own."""
    return MEAN + STD * (x - t.cos() * MEAN) / (t.cos() ** 2 * STD**2 + t.sin() ** 2).sqrt()


def exact_consistency(x: Tensor, t: Tensor) -> Tensor:
    return (t.cos() * x - exact_jump(x, t)) / t.sin()


@pytest.fixture
def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = 0.05 + 1.5 * torch.rand(4000, generator=generator, dtype=torch.float64)
    return torch.randn(4000, generator=generator, dtype=torch.float64), t


def test_the_wrapper_gives_the_exact_trigflow_velocity_of_a_gaussian(points: tuple[Tensor, Tensor]) -> None:
    x, t = points[0].float(), points[1].float()
    variance = t.cos() ** 2 * STD**2 + t.sin() ** 2
    slope = (x - t.cos() * MEAN) * t.cos() * t.sin() * (1 - STD**2) / variance - t.sin() * MEAN
    torch.testing.assert_close(trig_network(gaussian_velocity)(x, t), slope, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("t", "x", "value", "g"),
    [(0.4, 0.5, -0.075243, -0.053214), (0.8, -1.0, -0.478797, 0.283915), (1.2, 1.0, -0.165869, -0.106121)],
)
@pytest.mark.parametrize("derivative", [forward_mode, central_difference])
def test_the_tangent_at_the_start_of_training_has_the_worked_values(
    t: float, x: float, value: float, g: float, derivative: object
) -> None:
    network = trig_network(gaussian_velocity)
    at = torch.tensor([x], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    found, slope = tangent(network, *at, SIGMA_DATA * network(*at), 1.0, derivative=derivative)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(value, abs=1e-5)
    assert float(slope) == pytest.approx(g, abs=1e-5)


def test_the_tangent_of_the_exact_velocity_has_the_worked_size(points: tuple[Tensor, Tensor]) -> None:
    network = trig_network(gaussian_velocity)
    _, g = tangent(network, *points, SIGMA_DATA * network(*points), 1.0)
    assert float(g.square().mean().sqrt()) == pytest.approx(0.188, abs=0.01)


def test_the_exact_consistency_function_has_no_tangent(points: tuple[Tensor, Tensor]) -> None:
    drift = SIGMA_DATA * trig_network(gaussian_velocity)(*points)
    _, g = tangent(exact_consistency, *points, drift, 1.0)
    assert float(g.abs().max()) < 1e-12
    torch.testing.assert_close(consistent(exact_consistency, *points), exact_jump(*points))


def test_without_warm_up_the_tangent_points_to_the_teacher(points: tuple[Tensor, Tensor]) -> None:
    x, t = points
    network, drift = trig_network(gaussian_velocity), torch.sin(x)
    value, g = tangent(network, x, t, drift, 0.0)
    torch.testing.assert_close(g, t.cos() ** 2 * (drift - SIGMA_DATA * value))


def test_the_gradient_of_the_loss_moves_the_prediction_along_the_tangent() -> None:
    value, g = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.1, 0.4]])
    prediction = value.clone().requires_grad_(True)
    t, log_variance = torch.tensor([0.7]), torch.tensor([0.5])
    loss = weighted(prediction, value, g, t, log_variance)
    loss.sum().backward()
    assert prediction.grad is not None
    scale = math.exp(-0.5) / (SIGMA_DATA * math.tan(0.7))
    torch.testing.assert_close(prediction.grad, -g * scale)  # -2 g over two values
    assert float(loss.detach()) == pytest.approx(scale * (0.01 + 0.16) / 2 + 0.5)


def test_a_tangent_keeps_its_direction_and_nearly_unit_length() -> None:
    sizes = torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1, 1)
    g = sizes * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    norms = by_norm(g).flatten(1).norm(dim=1)
    assert norms[0] < 0.02
    assert 0.99 < norms[1] < 1
    assert 0.9999 < norms[2] <= 1
    assert all(bool((limit(g) * g >= 0).all()) for limit in LIMITS.values())


def test_angles_follow_the_published_distribution_and_stay_below_a_right_angle() -> None:
    t = draw_angles(200_000, 0.2, 1.6, torch.Generator().manual_seed(0))
    found = torch.quantile(t, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(found, torch.tensor([0.305, 1.182, 1.518]), atol=4e-3, rtol=0)
    critic = draw_angles(200_000, -0.6, 1.0, torch.Generator().manual_seed(0))
    found = torch.quantile(critic, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(found, torch.tensor([0.296, 0.832, 1.323]), atol=4e-3, rtol=0)
    assert float(draw_angles(1000, 20.0, 1.0).max()) == pytest.approx(LAST_ANGLE)


def tiny_teacher(dtype: torch.dtype) -> LinearDiT:
    model: LinearDiT = tiny_transformer(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    return model.to(dtype).requires_grad_(False)


def tiny_inputs(config: object, dtype: torch.dtype) -> tuple[Condition, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 5, config.caption_channels, generator=generator, dtype=dtype)  # type: ignore[attr-defined]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = torch.randn(2, config.in_channels, 4, 4, generator=generator, dtype=dtype)  # type: ignore[attr-defined]
    return Condition(embeds, mask), x, torch.tensor([0.5, 1.3], dtype=dtype)


@pytest.mark.parametrize(("dtype", "step", "bound"), [(torch.float64, 1e-6, 1e-6), (torch.float32, 1e-3, 1e-2)])
def test_the_derivative_of_the_transformer_agrees_with_differences(
    dtype: torch.dtype, step: float, bound: float
) -> None:
    teacher = tiny_teacher(dtype)
    text, x, t = tiny_inputs(teacher.config, dtype)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network = network_of(Backbone(student_of(teacher, 0)), text, torch.tensor([4.0, 5.0], dtype=dtype))
        along = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype), t.cos() * t.sin()
        value, exact = forward_mode(network, (x, t), along)
        _, near = central_difference(network, (x, t), along, step)
        torch.testing.assert_close(value, network(x, t))
    assert float((exact - near).norm() / near.norm()) < bound


def test_the_student_starts_as_its_teacher_and_without_guidance_has_nothing_to_learn() -> None:
    teacher = tiny_teacher(torch.float64)
    text, x, t = tiny_inputs(teacher.config, torch.float64)
    null = Condition(torch.zeros_like(text.embeds), torch.ones_like(text.mask))
    student = student_of(teacher, 0)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        under = network_of(Backbone(student), text, torch.tensor([4.0, 5.0], dtype=torch.float64))
        torch.testing.assert_close(under(x, t), network_of(Backbone(teacher), text)(x, t), atol=1e-12, rtol=0)
        for scale, nothing in ((1.0, True), (4.5, False)):
            scales = torch.full((2,), scale, dtype=torch.float64)
            drift = SIGMA_DATA * guided(Backbone(teacher), text, null, scales)(x, t)
            value, g = tangent(under, x, t, drift, 0.0)
            cos = t.cos().view(-1, 1, 1, 1)
            torch.testing.assert_close(g, cos**2 * (drift - SIGMA_DATA * value))
            assert (float(g.abs().max()) < 1e-12) is nothing


def toy_network() -> Network:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return x * t.view(-1, 1)

    return network


def test_a_jump_from_angle_zero_goes_nowhere() -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(consistent(toy_network(), x, torch.zeros(3)), x)
    assert torch.equal(noised(x, torch.ones_like(x), torch.zeros(3)), x)
