"""The heads of a latent adversarial discriminator, which read the blocks of a frozen transformer (LADD).

Shapes: B batch, N tokens, D width, G groups of the batch norm, K heads.
Source: SANA-Sprint (arXiv 2503.09641, section 3.3); Sauer et al. 2024 (arXiv 2403.12015).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

NORM_EPS = 1e-5
SLOPE = 0.2
KERNEL = 9


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most `group` samples, without running statistics, [B, D, N] -> [B, D, N].

    A discriminator sees whole batches of reals or fakes: statistics of a small group give less of that away. A batch
    that does not split evenly, as a dataset's last one may not, has groups that differ by one sample.
    """

    def __init__(self, dim: int, group: int) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BDN: Tensor) -> Tensor:
        groups = math.ceil(len(x_BDN) / self.group)
        size, larger = divmod(len(x_BDN), groups)
        counts = (groups - larger, larger)
        parts = torch.split(x_BDN, [counts[0] * size, counts[1] * (size + 1)])
        normed = torch.cat([_whitened(part, count) for part, count in zip(parts, counts, strict=True) if count])
        return torch.addcmul(self.bias[:, None], normed, self.weight[:, None])


def _whitened(x_BDN: Tensor, groups: int) -> Tensor:
    """Return [B, D, N] with mean 0 and variance 1 in every channel of each of so many equal groups."""
    batch, dim, tokens = x_BDN.shape
    x = x_BDN.view(groups, batch // groups, dim, tokens)
    mean, variance = x.mean((1, 3), keepdim=True), x.var((1, 3), keepdim=True, unbiased=False)
    return ((x - mean) * torch.rsqrt(variance + NORM_EPS)).view_as(x_BDN)


class Head(nn.Module):
    """One logit per token from the tokens after one block, [B, N, D] -> [B, N]."""

    def __init__(self, dim: int, group: int) -> None:
        super().__init__()
        self.point = spectral_norm(nn.Conv1d(dim, dim, 1))
        self.point_norm = LocalBatchNorm(dim, group)
        around = nn.Conv1d(dim, dim, KERNEL, padding=KERNEL // 2, padding_mode="circular")
        self.around = spectral_norm(around)
        self.around_norm = LocalBatchNorm(dim, group)
        self.out = spectral_norm(nn.Conv1d(dim, 1, 1))

    def forward(self, x_BND: Tensor) -> Tensor:
        x = F.leaky_relu(self.point_norm(self.point(x_BND.transpose(1, 2))), SLOPE)
        mixed = F.leaky_relu(self.around_norm(self.around(x)), SLOPE)
        logits: Tensor = self.out((x + mixed) / math.sqrt(2))
        return logits[:, 0]


class DiscriminatorHeads(nn.Module):
    """A head for every tapped block, K times [B, N, D] -> logits [B, K N]."""

    def __init__(self, dim: int, taps: int, group: int = 8) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(dim, group) for _ in range(taps))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1)
