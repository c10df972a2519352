"""Pictures computed a strip of rows at a time: a chain of layers that hand each other rows, from top to bottom.

Convolutions need one row above and below, norms and activations none. So a chain of them needs no picture in memory,
only a strip per layer, and computes every row once: the result is that of the whole picture. On a CPU this saves what
large intermediate results cost: a fresh page of memory takes longer to get than to fill.

Shapes: R rows of a strip, W width, C channels, O output channels. Strips are [R, W, C], which is channels-last.
"""

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
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
ACCELERATOR_STRIP_BYTES = 64 << 20
"""Size of a strip on an accelerator: enough work for each of its launches."""
FRUGAL = 8
"""How many times smaller the strips of the least memory are."""
LARGE_STRIPS = 1
_strip_bytes: ContextVar[int | None] = ContextVar("strip_bytes", default=None)

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
    channels: int
    """Channels of the rows it gives."""
    zoom: float = 1.0
    """Side of the picture it gives over the side of the picture it takes."""


class Window:
    """The rows that a convolution can see at the moment: some of the last strip, the next, zeros around the picture.

    `halo` is how many rows the convolution sees above and below: one for a kernel of 3. `first` is the number of the
    picture's row at the start of the window; it begins with the zeros above, at -halo.
    """

    def __init__(self, width: int, channels: int, like: Tensor, halo: int = 1) -> None:
        self.halo = halo
        self.rows = like.new_zeros(4 * halo, width, channels)
        self.filled = halo
        self.first = -halo

    def room(self, count: int) -> Tensor:
        needed = self.filled + count + self.halo
        if needed > len(self.rows):
            # Memory that is never written is never fetched: on a CPU the slack for the longer last strips is free.
            longer = self.rows.new_empty(needed * (2 if self.rows.is_cpu else 1), *self.rows.shape[1:])
            longer[: self.filled] = self.rows[: self.filled]
            self.rows = longer
        return self.rows[self.filled : self.filled + count]

    def push(self, count: int, last: bool) -> int:
        """Take the rows written into `room`; return how many rows can be computed."""
        self.filled += count
        if last:
            self.rows[self.filled : self.filled + self.halo].zero_()
            self.filled += self.halo
        return max(0, self.filled - 2 * self.halo)

    def visible(self) -> Tensor:
        return self.rows[: self.filled]

    def move(self, done: int | None = None) -> None:
        """Forget rows that are done, by default all but those that the next ones need."""
        done = self.filled - 2 * self.halo if done is None else done
        kept = self.filled - done
        self.rows[:kept] = self.rows[done : self.filled].clone()
        self.first += done
        self.filled = kept


class Source(Protocol):
    """A layer that must see the whole picture before it gives the first row."""

    def send(self, x: Tensor, following: Rows) -> None:
        """Push the rows that it makes of a picture, [H, W, C]; of `x` it reads no row that it has given already."""


class Spread(NamedTuple):
    """How to make a source."""

    make: Callable[[bool], Source]
    """Takes whether to compute things twice rather than to keep them."""


class Whole(NamedTuple):
    """A layer that can only be called, with all of its picture."""

    call: Callable[[Tensor], Tensor]
    """Takes and gives images."""


Part = Link | Spread | Whole


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
        self.step = rows_of_strip(width * max(conv.in_channels, conv.out_channels), conv.weight.dtype)

    def push(self, count: int, last: bool) -> None:
        count = self.window.push(count, last)
        if not count:
            return
        visible = self.window.visible()
        # A strip of few channels becomes one of many: several.
        for top in range(0, count, self.step):
            rows = min(self.step, count - top)
            out = convolve(visible[top : top + rows + 2], self.conv.weight, self.conv.bias)
            self.following.room(rows).copy_(out)
            self.following.push(rows, last and top + rows == count)
        self.window.move()


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
    size = _strip_bytes.get() or STRIP_BYTES * torch.get_num_threads()
    return max(1, size // (elements * dtype.itemsize))


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


def compute_rows(x: Tensor, links: Sequence[Link]) -> Tensor:
    """Compute a chain of layers on pictures, one after the other, [B, C, h, w] -> [B, O, H, W], channels-last."""
    zoom = prod(link.zoom for link in links)
    height, width = (round(zoom * side) for side in x.shape[-2:])
    out = x.new_empty(len(x), height, width, links[-1].channels)
    for picture, place in zip(x.movedim(1, -1), out, strict=True):
        send(picture, links, place)
    return out.movedim(-1, 1)


def send(x: Tensor, links: Sequence[Link], out: Tensor) -> None:
    """Send a picture through a chain of these links, [H, W, C] -> `out`, [H', W', O]."""
    feed(x, chain_of(links, out))


def chain_of(links: Sequence[Link], out: Tensor) -> Rows:
    """Return the first layer of a chain of these links that ends in `out`, [H', W', O]."""
    chain: Rows = Sink(out)
    width = out.shape[1]
    for link in reversed(links):
        width = round(width / link.zoom)
        chain = link.make(width, chain)
    return chain


def feed(x: Tensor, chain: Rows) -> None:
    """Push a picture, [H, W, C], a strip at a time."""
    step = rows_of_strip(x.shape[1] * x.shape[2], x.dtype)
    for top in range(0, len(x), step):
        rows = x[top : top + step]
        chain.room(len(rows)).copy_(rows)
        chain.push(len(rows), last=top + step >= len(x))


def still(x: Tensor) -> bool:
    """Whether `x` is computed step by step without gradients or autocast, on any device."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not (torch.is_grad_enabled() or cast or torch.compiler.is_compiling())


def stream(x: Tensor, parts: Sequence[Part], out: Tensor | None = None, *, frugal: bool = False) -> Tensor:
    """Send a picture through any parts, [H, W, C] -> [H', W', O]; `x` is left as it is.

    Only where a part needs the whole picture there is one; all else is strips. With `frugal` strips are smaller, and
    what is needed twice is computed twice. The result is written into `out` if that is given.
    """
    size = STRIP_BYTES * torch.get_num_threads() if x.is_cpu else ACCELERATOR_STRIP_BYTES
    reset = _strip_bytes.set(size // FRUGAL if frugal else size)
    try:
        segments = list(_segments(parts))
        own = False
        for k, (head, links) in enumerate(segments):
            if isinstance(head, Whole):
                x = as_rows(head.call(as_image(x))).contiguous()
            if links or isinstance(head, Spread):
                place = out if k == len(segments) - 1 else None
                if place is None:
                    place = _place_for(x, head, links, own)
                chain = chain_of(links, place)
                head.make(frugal).send(x, chain) if isinstance(head, Spread) else feed(x, chain)
                x, own = place, True
    finally:
        _strip_bytes.reset(reset)
    return x if out is None or x is out else out.copy_(x)


def _place_for(x: Tensor, head: Part | None, links: Sequence[Link], own: bool) -> Tensor:
    """Return room for what links make of `x`: `x` itself where a source reads it, which forgets what it has read."""
    channels, zoom = links[-1].channels if links else x.shape[-1], prod(link.zoom for link in links)
    if own and isinstance(head, Spread) and channels == x.shape[-1] and all(link.zoom == 1 for link in links):
        return x
    return x.new_empty(round(zoom * x.shape[0]), round(zoom * x.shape[1]), channels)


def _segments(parts: Sequence[Part]) -> Iterator[tuple[Spread | Whole | None, list[Link]]]:
    """Cut parts where one must see a whole picture; each piece begins with such a part, but for the first perhaps."""
    head: Spread | Whole | None = None
    links: list[Link] = []
    for part in parts:
        if isinstance(part, Link):
            links.append(part)
            continue
        if head is not None or links:
            yield head, links
        head, links = part, []
    yield head, links
