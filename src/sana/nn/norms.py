"""Root-mean-square normalisation over the last axis of a sequence or the channels of an image.

Shapes: B batch, C channels, H W image size, D width (last axis).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.inference import lean

_HALF_DTYPES = (torch.float16, torch.bfloat16)


class RMSNorm(nn.Module):
    """Scale the last axis to unit root-mean-square, then multiply by a weight and add an optional bias.

    Shapes: [..., D] -> [..., D]. The mean is taken in float32 (float64 for float64 input). With a half-precision weight
    the normalised value is rounded to that dtype before the product, as in the published models; with a float32 weight
    the result is float32. Source: Zhang & Sennrich 2019, eq. 4.
    """

    def __init__(self, dim: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in _HALF_DTYPES and x.dtype == self.weight.dtype and lean(x) and x.is_contiguous():
            return self._lean(x)
        # A norm reads x once and makes no squared copy, unlike pow + mean.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        normed = x * torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        if self.weight.dtype in _HALF_DTYPES:
            normed = normed.to(self.weight.dtype)
        if self.bias is None:
            return normed * self.weight
        return torch.addcmul(self.bias, normed, self.weight)

    def _lean(self, x: Tensor) -> Tensor:
        """Compute the same values in fewer passes, with one new tensor.

        To divide rows by known numbers is what a batch norm does whose channels are the rows: in float32, without a
        float32 copy, rounded once.
        """
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).flatten()
        mean_square = norm.square_().div_(x.shape[-1])
        rows = x.view(1, -1, x.shape[-1])
        out = F.batch_norm(rows, torch.zeros_like(mean_square), mean_square, eps=self.eps).view_as(x)
        return out.mul_(self.weight) if self.bias is None else torch.addcmul(self.bias, out, self.weight, out=out)


class ChannelRMSNorm(RMSNorm):
    """`RMSNorm` over the channels of an image, [B, C, H, W] -> [B, C, H, W]; the memory format of the input is kept."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
