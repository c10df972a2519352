"""Losses of reconstructions."""

import math

import pytest
import torch

from sana.training.reconstruction import adaptive_weight, edge_loss, hinge_loss, mean_square, psnr, squared_error


def test_the_edge_loss_is_blind_to_a_constant_and_sees_a_ramp_at_every_scale() -> None:
    picture = torch.randn(2, 3, 32, 32)
    assert float(edge_loss(picture + 0.3, picture)) < 1e-6
    ramp = torch.arange(32.0).expand(2, 3, 32, 32) / 100
    assert float(edge_loss(picture + ramp, picture)) == pytest.approx((0.01 + 0.02 + 0.04) / 3, rel=1e-4)
    assert float(edge_loss(picture + ramp.transpose(2, 3), picture)) == pytest.approx(0.07 / 3, rel=1e-4)


def test_a_blurred_outline_costs_more_than_a_moved_mean_of_the_same_l1() -> None:
    square = torch.zeros(1, 3, 32, 32)
    square[..., 8:24, 8:24] = 1
    blurred = torch.nn.functional.avg_pool2d(square, 5, 1, 2)
    shifted = square + (blurred - square).abs().mean()
    assert float(edge_loss(blurred, square)) > 100 * float(edge_loss(shifted, square))


def test_the_hinge_loss_is_zero_for_answers_beyond_the_margins_only() -> None:
    assert float(hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]))) == 0
    assert float(hinge_loss(torch.tensor([0.0]), torch.tensor([0.0]))) == 1
    assert float(hinge_loss(torch.tensor([-1.0]), torch.tensor([0.5]))) == pytest.approx((2 + 1.5) / 2)


def test_the_adaptive_factor_lets_both_losses_pull_equally_at_the_last_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    one, other = (weight * torch.tensor([3.0, 4.0])).sum(), (weight * torch.tensor([0.3, 0.4])).sum()
    factor = adaptive_weight(one, other, weight)
    assert float(factor) == pytest.approx(5 / (0.5 + 1e-4))
    assert not factor.requires_grad
    (pulled,) = torch.autograd.grad(factor * other, weight)
    assert float(pulled.norm()) == pytest.approx(5, rel=1e-3)
    flat = (weight * 0).sum()
    assert float(adaptive_weight(one, flat, weight)) == 1e4


def test_figures() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    assert psnr(squared_error(picture + 0.2, picture)) == pytest.approx(20)
    assert psnr(squared_error(picture + 5, picture)) == pytest.approx(-10 * math.log10(0.25))
    assert psnr(squared_error(picture, picture)) == 120
    assert mean_square(torch.tensor([3.0, -3.0])) == 9
