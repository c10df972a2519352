"""The convolutional gated feed-forward block of SANA and DC-AE.

Shapes: B batch, C input channels, O output channels, F hidden channels, H W image size.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.inference import autocast_dtype, bare, inference, learning
from sana.nn.mixffn_gradient import MixRows
from sana.nn.norms import ChannelRMSNorm

# Measured with AMX: a half-precision product with more columns reorders its weight at a third of its own cost, and
# intermediate results of this width stay in the cache of a core. Full multiples of 64 columns run best.
HALF_COLUMNS = 576


class GLUMBConv(nn.Module):
    """Inverted bottleneck with a depthwise 3×3 convolution and a gate, [B, C, H, W] -> [B, O, H, W].

    The first activation comes before the depthwise convolution. `norm` adds a channel RMS norm with bias at the end,
    `residual` the input (C must equal O). Source: SANA (arXiv 2410.10629, Mix-FFN), EfficientViT (arXiv 2205.14756).
    """

    def __init__(
        self, in_channels: int, out_channels: int, expand_ratio: float, norm: bool = False, residual: bool = False
    ) -> None:
        super().__init__()
        hidden = int(expand_ratio * in_channels)
        self.residual = residual
        self.conv_inverted = nn.Conv2d(in_channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm = ChannelRMSNorm(out_channels, eps=1e-5, bias=True) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self._by_rows(x):
            out = self._mix_rows(x)
        elif self._by_gradient(x):
            out = self._learn_rows(x)
        else:
            hidden = self.conv_depth(F.silu(self.conv_inverted(x)))
            value, gate = hidden.chunk(2, dim=1)
            out = self.conv_point(value * F.silu(gate))
        if self.norm is not None:
            out = self.norm(out)
        return x + out if self.residual else out

    def _by_rows(self, x: Tensor) -> bool:
        return (
            inference(x)
            and x.is_contiguous(memory_format=torch.channels_last)
            and bare(x.dtype, self.conv_inverted, self.conv_depth, self.conv_point)
        )

    def _by_gradient(self, x: Tensor) -> bool:
        return (
            learning(x, *self.parameters())
            and x.is_contiguous(memory_format=torch.channels_last)
            and (x.dtype == self.conv_inverted.weight.dtype or autocast_dtype("cpu") is not None)
            and bare(self.conv_inverted.weight.dtype, self.conv_inverted, self.conv_depth, self.conv_point)
        )

    def _learn_rows(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype("cpu") or x.dtype
        layers = (self.conv_inverted, self.conv_depth)
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        ranges = slices(self.conv_point.in_channels, dtype)
        return cast(Tensor, MixRows.apply(x, *weights, self.conv_point.weight, dtype, ranges))  # type: ignore[no-untyped-call]

    def _mix_rows(self, x: Tensor) -> Tensor:
        """Run the three convolutions on rows of pixels, [B, C, H, W] -> [B, O, H, W], both channels last.

        The 1x1 convolutions are matrix products there. A slice of hidden channels goes through everything at a time.
        """
        batch, channels, height, width = x.shape
        hidden = self.conv_point.in_channels
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        expand, bias = self.conv_inverted.weight.flatten(1), self.conv_inverted.bias
        depth, depth_bias = self.conv_depth.weight, self.conv_depth.bias
        assert bias is not None
        assert depth_bias is not None

        def half(part: slice) -> Tensor:
            narrow = F.silu(F.linear(rows, expand[part], bias[part]), inplace=True)
            image = narrow.view(batch, height, width, -1).permute(0, 3, 1, 2)
            mixed = F.conv2d(image, depth[part], depth_bias[part], padding=1, groups=image.shape[1])
            return mixed.permute(0, 2, 3, 1).reshape(len(rows), -1)

        gated = [
            F.silu(half(slice(hidden + start, hidden + stop)), inplace=True).mul_(half(slice(start, stop)))
            for start, stop in slices(hidden, x.dtype)
        ]
        out = F.linear(torch.cat(gated, dim=1), self.conv_point.weight.flatten(1))
        return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def slices(channels: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Cut channels into ranges that the processor's caches like; one range for float32, which gains nothing."""
    count = math.ceil(channels / HALF_COLUMNS) if dtype.itemsize == 2 else 1
    width = math.ceil(channels / count / 64) * 64
    return [(start, min(start + width, channels)) for start in range(0, channels, width)]
