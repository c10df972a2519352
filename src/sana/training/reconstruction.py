"""Losses and figures of reconstructions.

Shapes: B batch, H W picture size; pictures are [B, 3, H, W] in -1..1.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = 3
ADAPTIVE_MOST, ADAPTIVE_EPS = 1e4, 1e-4


def edge_loss(restored: Tensor, pictures: Tensor) -> Tensor:
    """Return the L1 of differences between neighbours, both ways, over three average-pooled scales.

    It stands in for LPIPS, whose network needs a package that this one does without: like it, it asks for outlines and
    textures rather than for the mean colour, and it needs no weights.
    """
    error, total = restored.float() - pictures, torch.zeros((), device=pictures.device)
    for scale in range(SCALES):
        pooled = error if scale == 0 else F.avg_pool2d(error, 2**scale)
        across, down = pooled[..., 1:] - pooled[..., :-1], pooled[..., 1:, :] - pooled[..., :-1, :]
        total = total + across.abs().mean() + down.abs().mean()
    return total / SCALES


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss: answers to real pictures should exceed 1, to restored ones stay below -1."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Return the factor by which both losses pull equally at the decoder's last weights.

    Source: VQGAN (Esser et al. 2021, arXiv 2012.09841, equation 7).
    """
    (one,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (other,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    factor: Tensor = one.norm() / (other.norm() + ADAPTIVE_EPS)
    return factor.clamp(0, ADAPTIVE_MOST).detach()


def psnr(square: float) -> float:
    """Return the peak signal to noise ratio in dB of a mean squared error, of pixels in 0..1."""
    return -10 * math.log10(max(square, 1e-12))


def squared_error(restored: Tensor, pictures: Tensor) -> float:
    """Return the mean squared error as pixels in 0..1 have it; what lies outside of their range is cut off."""
    return mean_square((restored.float().clamp(-1, 1) - pictures) / 2)


def mean_square(values: Tensor) -> float:
    """Return the mean of the squares."""
    return float(values.double().square().mean())
