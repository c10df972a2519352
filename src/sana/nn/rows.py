"""Pictures computed a strip of rows at a time: a chain of layers that hand each other rows, from top to bottom.

Convolutions need one row above and below, norms and activations none. So a chain of them needs no picture in memory,
only a strip per layer, and computes every row once: the result is that of the whole picture. On a CPU this saves what
large intermediate results cost: a fresh page of memory takes longer to get than to fill.

Shapes: R rows of a strip, W width, C channels, O output channels. Strips are [R, W, C], which is channels-last.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import prod
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.inference import unhooked
from sana.nn.norms import ChannelRMSNorm

STRIP_BYTES = 4 << 20
"""Size of a strip per thread: some of the cache of a core, and below what the allocator returns to the system."""
LARGE_STRIPS = 1

Activation = Callable[[Tensor], Tensor]


class Rows(Protocol):
    """A layer that takes rows: write them where `room` says, then `push` them."""

    def room(self, count: int) -> Tensor:
        """Return the place for the next `count` rows, [count, W, C]; it keeps the strides of a channels-last image."""

    def push(self, count: int, last: bool) -> None:
        """Take the rows written into `room(count)`; with `last` the picture is complete."""


class Link(NamedTuple):
    """How to join a layer to the ones behind it."""

    make: Callable[[int, Rows], Rows]
    """Takes the width of its pictures and the layer that follows."""
    zoom: float = 1.0
    """Side of the picture it gives over the side of the picture it takes."""


class Window:
    """The rows that a 3x3 convolution can see at the moment: two of the last strip, the next, zeros around the picture.

    `first` is the number of the picture's row at the start of the window; it begins with the zeros above, at -1.
    """

    def __init__(self, width: int, channels: int, like: Tensor) -> None:
        self.rows = like.new_zeros(4, width, channels)
        self.filled = 1
        self.first = -1

    def room(self, count: int) -> Tensor:
        if self.filled + count + 1 > len(self.rows):
            # Memory that is never written is never fetched: the slack for the longer last strips is free.
            longer = self.rows.new_empty(2 * (self.filled + count + 1), *self.rows.shape[1:])
            longer[: self.filled] = self.rows[: self.filled]
            self.rows = longer
        return self.rows[self.filled : self.filled + count]

    def push(self, count: int, last: bool) -> int:
        """Take the rows written into `room`; return how many rows can be computed."""
        self.filled += count
        if last:
            self.rows[self.filled].zero_()
            self.filled += 1
        return max(0, self.filled - 2)

    def visible(self) -> Tensor:
        return self.rows[: self.filled]

    def move(self) -> None:
        """Forget all rows but the two that the next ones need."""
        done = self.filled - 2
        self.rows[:2] = self.rows[done : self.filled].clone()
        self.first += done
        self.filled = 2


class Sink:
    """The end of a chain: the rows of the finished picture, [H, W, C]."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.done = 0

    def room(self, count: int) -> Tensor:
        return self.rows[self.done : self.done + count]

    def push(self, count: int, last: bool) -> None:
        self.done += count


class ConvRows:
    """A 3x3 convolution with padding 1."""

    def __init__(self, conv: nn.Conv2d, width: int, following: Rows) -> None:
        self.conv, self.following = conv, following
        self.window = Window(width, conv.in_channels, conv.weight)
        self.room = self.window.room

    def push(self, count: int, last: bool) -> None:
        count = self.window.push(count, last)
        if count:
            out = convolve(self.window.visible(), self.conv.weight, self.conv.bias)
            self.following.room(count).copy_(out)
            self.window.move()
            self.following.push(count, last)


class NormRows:
    """act(norm(x))."""

    def __init__(self, norm: ChannelRMSNorm, act: Activation, fused: bool, width: int, following: Rows) -> None:
        self.norm, self.act, self.following = norm, act, following
        self.apply = norm_act_compiled if fused else norm_act
        self.rows = norm.weight.new_empty(0, width, len(norm.weight))

    def room(self, count: int) -> Tensor:
        if count > len(self.rows):
            self.rows = self.rows.new_empty(count, *self.rows.shape[1:])
        return self.rows[:count]

    def push(self, count: int, last: bool) -> None:
        self.apply(self.rows[:count], self.norm, self.act, self.following.room(count))
        self.following.push(count, last)


class ResidualRows:
    """x + norm(conv2(act(conv1(x))))."""

    def __init__(
        self,
        conv1: nn.Conv2d,
        act: Activation,
        conv2: nn.Conv2d,
        norm: nn.Module,
        fused: bool,
        width: int,
        following: Rows,
    ) -> None:
        self.conv1, self.act, self.conv2, self.norm, self.following = conv1, act, conv2, norm, following
        self.add_norm = add_norm_compiled if fused and type(norm) is ChannelRMSNorm else add_norm
        self.inputs = Window(width, conv1.in_channels, conv1.weight)
        self.hidden = Window(width, conv2.in_channels, conv2.weight)
        self.room = self.inputs.room

    def push(self, count: int, last: bool) -> None:
        count = self.inputs.push(count, last)
        if not count:
            return
        activate(self.act, convolve(self.inputs.visible(), self.conv1.weight, self.conv1.bias), self.hidden.room(count))
        count = self.hidden.push(count, last)
        if count:
            mixed = convolve(self.hidden.visible(), self.conv2.weight, self.conv2.bias)
            above = self.hidden.first + 1 - self.inputs.first
            self.add_norm(self.inputs.rows[above : above + count], mixed, self.norm, self.following.room(count))
            self.hidden.move()
        self.inputs.move()
        if count:
            self.following.push(count, last)


class UpsampleRows:
    """Doubling of both sides: one convolution for each corner of a pixel, and the channel-repeating shortcut.

    `corners` holds weight and bias for top left, top right, bottom left and bottom right. A 2x2 kernel sees the pixel
    and those next to that corner, a 3x3 kernel all neighbours.
    """

    def __init__(
        self, corners: Sequence[tuple[Tensor, Tensor | None]], shortcut: bool, width: int, following: Rows
    ) -> None:
        self.corners, self.shortcut, self.following = corners, shortcut, following
        weight = corners[0][0]
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


def large(elements: int, dtype: torch.dtype) -> bool:
    """Whether a picture of that many elements gains from being cut; what is about a strip fits the cache as it is."""
    return elements * dtype.itemsize > LARGE_STRIPS * STRIP_BYTES * torch.get_num_threads()


def as_image(rows: Tensor) -> Tensor:
    """Return [R, W, C] as [1, C, R, W], the same memory."""
    # In this order: the stride of the batch of one is what tells a convolution the memory format.
    return rows.unsqueeze(0).permute(0, 3, 1, 2)


def as_rows(image: Tensor) -> Tensor:
    """Return [1, C, R, W] as [R, W, C], the same memory."""
    return image.squeeze(0).permute(1, 2, 0)


def rows_of_strip(elements: int, dtype: torch.dtype) -> int:
    """Return how many rows of that many elements make a strip, at least one."""
    return max(1, STRIP_BYTES * torch.get_num_threads() // (elements * dtype.itemsize))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve rows that have their neighbours above and below, padded at the sides, [R + k - 1, W, C] -> [R, ., O]."""
    return as_rows(F.conv2d(as_image(x), weight, bias, padding=(0, 1)))


def activate(act: Activation, x: Tensor, out: Tensor) -> None:
    """Write the activation of `x`, which may be lost, into `out`."""
    if act is F.silu:
        torch.ops.aten.silu.out(x, out=out)
    else:
        out.copy_(act(x))


def add_norm(x: Tensor, mixed: Tensor, norm: nn.Module, out: Tensor) -> None:
    """Write x + norm(mixed) into `out`; all [R, W, C]."""
    for x_part, mixed_part, place in in_cache(x, mixed, out):
        torch.add(x_part, as_rows(norm(as_image(mixed_part))), out=place)


def norm_act(x: Tensor, norm: nn.Module, act: Activation, out: Tensor) -> None:
    """Write act(norm(x)) into `out`; both [R, W, C]."""
    for part, place in in_cache(x, out):
        place.copy_(act(as_rows(norm(as_image(part)))))


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut rows of the same shape into pieces that stay in the cache of a core over several passes."""
    rows = rows_of_strip(8 * tensors[0][0].numel(), tensors[0].dtype)
    return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def local(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a norm of images sees one pixel at a time: `ChannelRMSNorm`, or a batch norm in evaluation."""
    fixed = type(norm) is ChannelRMSNorm or (
        type(norm) is nn.BatchNorm2d and not norm.training and norm.running_mean is not None
    )
    return fixed and unhooked(norm) and all(parameter.dtype == dtype for parameter in norm.parameters())


def add_norm_compiled(x: Tensor, mixed: Tensor, norm: nn.Module, out: Tensor) -> None:
    """Do what `add_norm` does in one pass, with code that is compiled at the first call."""
    _call(_add_norm, (x, mixed, out), norm, None)


def norm_act_compiled(x: Tensor, norm: nn.Module, act: Activation, out: Tensor) -> None:
    """Do what `norm_act` does in one pass, with code that is compiled at the first call."""
    _call(_norm_act, (x, out), norm, act)


def _call(function: Callable[..., None], rows: Sequence[Tensor], norm: nn.Module, act: Activation | None) -> None:
    # Detached, for the compiler makes code of its own for each way to be a view of another tensor.
    flat = [tensor.flatten(0, -2).detach() for tensor in rows]
    for tensor in flat:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # one piece of code for any number of rows
    _compiled(function)(*flat, norm.weight, norm.bias, norm.eps, act)


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function)


def _add_norm(
    x: Tensor, mixed: Tensor, out: Tensor, weight: Tensor, bias: Tensor, eps: float, act: Activation | None
) -> None:
    out.copy_(x + _normed(mixed, weight, bias, eps))


def _norm_act(x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, eps: float, act: Activation) -> None:
    out.copy_(act(_normed(x, weight, bias, eps)))


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return torch.addcmul(bias, scaled.to(x.dtype), weight)


def nearest_corners(conv: nn.Conv2d) -> list[tuple[Tensor, Tensor | None]]:
    """Return the corners that double like the nearest neighbour followed by this 3x3 convolution.

    A pixel of the doubled picture sees only 2x2 different pixels: four 2x2 kernels with summed weights do the same with
    4/9 of the arithmetic. The sums are taken in float32 and rounded once.
    """
    dtype = conv.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    # Sums of whole planes [O, C]: of the kernels as they are stored they would take five times as long.
    a, b, c = conv.weight.permute(2, 3, 0, 1).contiguous().to(wide).unbind(0)
    corners: list[tuple[Tensor, Tensor | None]] = []
    for rows in ((a, b + c), (a + b, c)):
        for j in range(2):
            kernel = conv.weight.new_empty(conv.out_channels, 2, 2, conv.in_channels)
            for i, (left, middle, right) in enumerate(rows):
                kernel[:, i, 0] = left + middle if j else left
                kernel[:, i, 1] = right if j else middle + right
            corners.append((kernel.permute(0, 3, 1, 2), conv.bias))
    return corners


def shuffled_corners(conv: nn.Conv2d) -> list[tuple[Tensor, Tensor | None]]:
    """Return the corners that double like this 3x3 convolution followed by a pixel shuffle."""
    return [(conv.weight[k::4], None if conv.bias is None else conv.bias[k::4]) for k in range(4)]


def compute_rows(x: Tensor, links: Sequence[Link], channels: int) -> Tensor:
    """Compute a chain of layers on pictures, one after the other, [B, C, h, w] -> [B, O, H, W], channels-last."""
    zoom = prod(link.zoom for link in links)
    height, width = (round(zoom * side) for side in x.shape[-2:])
    out = x.new_empty(len(x), height, width, channels)
    for picture, place in zip(x.movedim(1, -1), out, strict=True):
        send(picture, links, place)
    return out.movedim(-1, 1)


def send(x: Tensor, links: Sequence[Link], out: Tensor) -> None:
    """Send a picture through a chain of these links, [H, W, C] -> `out`, [H', W', O]."""
    chain: Rows = Sink(out)
    width = out.shape[1]
    for link in reversed(links):
        width = round(width / link.zoom)
        chain = link.make(width, chain)
    step = rows_of_strip(x.shape[1] * x.shape[2], x.dtype)
    for top in range(0, len(x), step):
        rows = x[top : top + step]
        chain.room(len(rows)).copy_(rows)
        chain.push(len(rows), last=top + step >= len(x))
