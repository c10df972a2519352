"""The two sides of the latent adversarial loss. Shapes: B samples, L logits of each."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Heads = Callable[[Sequence[Tensor]], Tensor]


def generator_loss(fake: Tensor) -> Tensor:
    """Return what the generator lowers: minus the mean logit of its samples [B, L]."""
    return -fake.mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return what the discriminator lowers (Lim & Ye 2017): 0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def gradient_penalty(heads: Heads, features: Sequence[Tensor]) -> Tensor:
    """Return the squared gradient of the logits by the features of real samples, summed per sample and averaged (R1).

    The features are those of a frozen network, so the slope is measured where the heads begin.
    Source: Mescheder et al. 2018 (arXiv 1801.04406).
    """
    entered = [x.detach().requires_grad_(True) for x in features]
    slopes = torch.autograd.grad(heads(entered).sum(), entered, create_graph=True)
    return torch.stack([slope.square().flatten(1).sum(1) for slope in slopes]).sum(0).mean()
