"""Doubling and halving of pictures that are computed a strip of rows at a time.

Shapes: R rows of a strip, W width, C channels, O output channels. Strips are [R, W, C], which is channels-last.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.rows import Rows, Window, as_image, as_rows, convolve, rows_of_strip

Corner = tuple[Tensor, Tensor | None]
"""Weight and bias of the convolution for one pixel of four."""


class UpsampleRows:
    """Doubling of both sides: one convolution for each corner of a pixel, and the channel-repeating shortcut.

    `corners` gives weight and bias for top left, top right, bottom left and bottom right. A 2x2 kernel sees the pixel
    and those next to that corner, a 3x3 kernel all neighbours.
    """

    def __init__(self, corners: Callable[[], Sequence[Corner]], shortcut: bool, width: int, following: Rows) -> None:
        self.corners, self.shortcut, self.following = corners(), shortcut, following
        weight = self.corners[0][0]
        self.window = Window(width, weight.shape[1], weight)
        self.room = self.window.room
        self.step = rows_of_strip(4 * width * len(weight), weight.dtype)

    def push(self, count: int, last: bool) -> None:
        count = self.window.push(count, last)
        if not count:
            return
        visible = self.window.visible()
        for top in range(0, count, self.step):
            rows = min(self.step, count - top)
            self._double(visible[top : top + rows + 2], self.following.room(2 * rows))
            self.following.push(2 * rows, last and top + rows == count)
        self.window.move()

    def _double(self, x: Tensor, out: Tensor) -> None:
        """Write the doubled picture of [R + 2, W, C] into [2R, 2W, O]."""
        height, width = x.shape[0] - 2, x.shape[1]
        cells = out.view(height, 2, width, 2, -1)
        for k, (weight, bias) in enumerate(self.corners):
            i, j = divmod(k, 2)
            if weight.shape[-1] == 2:
                # Padded on both sides, a 2x2 kernel gives one column too many: cheaper than to copy the rows it sees.
                corner = convolve(x[i : i + height + 1], weight, bias)[:, j : j + width]
            else:
                corner = convolve(x, weight, bias)
            if self.shortcut:
                torch.add(corner, _repeated(x[1:-1], k, out.shape[-1]), out=cells[:, i, :, j])
            else:
                cells[:, i, :, j] = corner


def _repeated(x: Tensor, corner: int, channels: int) -> Tensor:
    """Return channels 4·o + corner of the repeated channels of `x` for each o, [R, W, C] -> [R, W, O]."""
    repeats = 4 * channels // x.shape[-1]
    if repeats % 4 == 0:
        return x if repeats == 4 else x.repeat_interleave(repeats // 4, dim=-1)
    if 4 % repeats == 0:
        # A copy with unit stride: the sum of strided channels would take three times as long.
        return x[..., corner // repeats :: 4 // repeats].contiguous()
    return x[..., torch.arange(corner, 4 * channels, 4) // repeats]


class DownsampleRows:
    """Halving of both sides by a 3x3 convolution of stride 2, or by one of stride 1 and a pixel unshuffle.

    The shortcut averages groups of the channels that a pixel unshuffle gives.
    """

    def __init__(self, conv: nn.Conv2d, unshuffle: bool, shortcut: bool, width: int, following: Rows) -> None:
        self.conv, self.unshuffle, self.shortcut, self.following = conv, unshuffle, shortcut, following
        self.window = Window(width, conv.in_channels, conv.weight)
        self.room = self.window.room
        channels = conv.out_channels * (4 if unshuffle else 1)
        self.least = rows_of_strip(max(width // 2 * channels, 2 * width * conv.in_channels), conv.weight.dtype)

    def push(self, count: int, last: bool) -> None:
        count = self.window.push(count, last) // 2
        # Pictures shrink on the way: rows are kept back until they make a strip again.
        if not count or (count < self.least and not last):
            return
        seen = self.window.visible()[: 2 * count + 2]
        out = as_rows(F.conv2d(as_image(seen), self.conv.weight, self.conv.bias, self.conv.stride, padding=(0, 1)))
        if self.unshuffle:
            out = _unshuffled(out)
        room = self.following.room(count)
        if self.shortcut:
            groups = torch.unflatten(_unshuffled(seen[1:-1]), -1, (room.shape[-1], -1))
            torch.add(out[:count], groups.mean(dim=-1), out=room)
        else:
            room.copy_(out[:count])
        self.window.move(2 * count)
        self.following.push(count, last)


def _unshuffled(x: Tensor) -> Tensor:
    """Return a pixel unshuffle by two, [2R, 2W, C] -> [R, W, 4C]; channel 4c + 2i + j is pixel (i, j) of channel c."""
    height, width, channels = x.shape
    cells = x.reshape(height // 2, 2, width // 2, 2, channels)
    return cells.permute(0, 2, 4, 1, 3).reshape(height // 2, width // 2, 4 * channels)


def nearest_corners(conv: nn.Conv2d) -> list[Corner]:
    """Return the corners that double like the nearest neighbour followed by this 3x3 convolution.

    A pixel of the doubled picture sees only 2x2 different pixels: four 2x2 kernels with summed weights do the same with
    4/9 of the arithmetic. The sums are taken in float32 and rounded once.
    """
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    # Sums of whole planes [O, C]: of the kernels as they are stored they would take five times as long.
    a, b, c = conv.weight.permute(2, 3, 0, 1).contiguous().to(wide).unbind(0)
    corners: list[Corner] = []
    for rows in ((a, b + c), (a + b, c)):
        for j in range(2):
            kernel = conv.weight.new_empty(conv.out_channels, 2, 2, conv.in_channels)
            for i, (left, middle, right) in enumerate(rows):
                kernel[:, i, 0] = left + middle if j else left
                kernel[:, i, 1] = right if j else middle + right
            corners.append((kernel.permute(0, 3, 1, 2), conv.bias))
    return corners


def shuffled_corners(conv: nn.Conv2d) -> list[Corner]:
    """Return the corners that double like this 3x3 convolution followed by a pixel shuffle."""
    return [(conv.weight[k::4], None if conv.bias is None else conv.bias[k::4]) for k in range(4)]
