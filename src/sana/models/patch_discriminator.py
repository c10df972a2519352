"""A discriminator of patches: one number per place that says whether the pixels around it look real.

Shapes: B batch, H W picture size, h w map of answers, about H / 8.
Source: PatchGAN (Isola et al. 2017, arXiv 1611.07004, 70 x 70) as VQGAN and DC-AE train their decoders with it.
"""

from itertools import pairwise
from typing import cast

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] to answers [B, 1, h, w], high for real.

    The published one normalises over the batch, which needs large batches and keeps running means; over groups of
    channels every picture is judged by itself.
    """

    def __init__(self, in_channels: int = 3, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i < len(widths) - 2 else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(GROUPS, after), after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        return cast(Tensor, self.layers(pictures))
