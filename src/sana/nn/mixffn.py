"""The convolutional gated feed-forward block of SANA and DC-AE.

Shapes: B batch, C input channels, O output channels, F hidden channels, H W image size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.norms import ChannelRMSNorm


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
        hidden = self.conv_depth(F.silu(self.conv_inverted(x)))
        value, gate = hidden.chunk(2, dim=1)
        out: Tensor = self.conv_point(value * F.silu(gate))
        if self.norm is not None:
            out = self.norm(out)
        return x + out if self.residual else out
