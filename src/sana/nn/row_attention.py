"""The blocks with global attention on pictures that are computed a strip of rows at a time.

Attention reads all rows once to sum up keys and values in float32, and then gives one strip of rows after the other.
Shapes: R rows of a strip, W width, C channels, S scales, I channels of all heads, G heads, d head width, F hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.head_attention import ATTENTION_EPS
from sana.nn.mixffn import GLUMBConv, slices
from sana.nn.norms import ChannelRMSNorm
from sana.nn.rows import Rows, Window, add_norm, add_norm_compiled, as_image, as_rows, rows_of_strip


@dataclass(frozen=True, kw_only=True)
class AttentionRows:
    """x + norm(to_out(attention(x))) over several scales."""

    joined: Tensor
    """Weights of queries, keys and values, [3I, C]."""
    scales: Sequence[tuple[nn.Conv2d, nn.Conv2d]]
    """Depthwise and grouped convolution of each further scale."""
    head_dim: int
    to_out: nn.Linear
    norm: nn.Module
    fused: bool
    frugal: bool
    """Compute the queries a second time instead of keeping them, [H, W, S·I]."""

    def send(self, x: Tensor, following: Rows) -> None:
        """Push the rows made of a picture, [H, W, C]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        heads = len(self.joined) // (3 * self.head_dim)
        shape = (1 + len(self.scales), heads, self.head_dim, self.head_dim + 1)
        sums = x.new_zeros(shape, dtype=wide)
        kept = None if self.frugal else x.new_empty(*x.shape[:2], *shape[:3])
        for top, scales in self._project(x):
            for i, scale in enumerate(scales):
                tokens = self._tokens(scale)
                _add_up(tokens, sums[i])
                if kept is not None:
                    kept[top : top + len(scale), :, i].view(-1, *shape[1:3]).copy_(tokens[:, :, 0])
        strips = self._project(x) if kept is None else _cut(kept, x)
        add = add_norm_compiled if self.fused and type(self.norm) is ChannelRMSNorm else add_norm
        for top, found in strips:
            count = len(found[0])
            mixed = x.new_empty(count, x.shape[1], *shape[:3])
            for i, scale in enumerate(found):
                queries = self._tokens(scale)[:, :, 0] if kept is None else scale.reshape(-1, *shape[1:3])
                _attend(queries, sums[i], mixed[:, :, i].view(-1, *shape[1:3]))
            out = F.linear(mixed.flatten(2), self.to_out.weight)
            add(x[top : top + count], out, self.norm, following.room(count))
            following.push(count, last=top + count == len(x))

    def _tokens(self, scale: Tensor) -> Tensor:
        """Return queries, keys and values of all heads, [R, W, 3I] -> [R·W, G, 3, d]."""
        return scale.reshape(-1, len(self.joined) // (3 * self.head_dim), 3, self.head_dim)

    def _project(self, x: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the number of the first row and the rows of all scales, each [R, W, 3I], strip by strip."""
        halo = max((first.kernel_size[0] // 2 for first, _ in self.scales), default=0)
        window = Window(x.shape[1], len(self.joined), x, halo)
        step = rows_of_strip(x[0].numel(), x.dtype)
        top = 0
        for start in range(0, len(x), step):
            rows = x[start : start + step]
            place = window.room(len(rows))
            torch.mm(rows.reshape(-1, x.shape[-1]), self.joined.t(), out=place.view(-1, len(self.joined)))
            count = window.push(len(rows), last=start + step >= len(x))
            if count:
                seen = window.visible()
                yield top, [seen[halo : halo + count], *(_aggregated(seen, halo, scale) for scale in self.scales)]
                top += count
                window.move()


def _aggregated(seen: Tensor, halo: int, scale: tuple[nn.Conv2d, nn.Conv2d]) -> Tensor:
    """Return rows of a further scale, [R + 2·halo, W, 3I] -> [R, W, 3I]."""
    first, second = scale
    reach = first.kernel_size[0] // 2
    rows = seen[halo - reach : len(seen) - halo + reach]
    mixed = F.conv2d(as_image(rows), first.weight, padding=(0, reach), groups=first.groups)
    return as_rows(F.conv2d(mixed, second.weight, groups=second.groups))


def _few_heads(tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return how many heads' float32 copies stay in the cache of a core."""
    return rows_of_strip(3 * head_dim * tokens, dtype)


def _add_up(tokens: Tensor, sums: Tensor) -> None:
    """Add sum_n relu(k_n) (v_n, 1) to `sums`, [G, d, d + 1], of tokens [N, G, 3, d]."""
    count, _, _, head_dim = tokens.shape
    few = _few_heads(count, head_dim, sums.dtype)
    for part, total in zip(torch.split(tokens, few, dim=1), torch.split(sums, few), strict=True):
        keys = part[:, :, 1].transpose(0, 1).to(sums.dtype, memory_format=torch.contiguous_format, copy=True).relu_()
        values = sums.new_ones(part.shape[1], count, head_dim + 1)
        values[..., :-1] = part[:, :, 2].transpose(0, 1)
        torch.baddbmm(total, keys.mT, values, out=total)


def _attend(queries: Tensor, sums: Tensor, out: Tensor) -> None:
    """Write the attention of queries [N, G, d] with the sums over all keys into `out`, [N, G, d]."""
    few = _few_heads(len(queries), queries.shape[-1], sums.dtype)
    parts = (torch.split(queries, few, dim=1), torch.split(sums, few), torch.split(out, few, dim=1))
    for part, total, place in zip(*parts, strict=True):
        wide = part.transpose(0, 1).to(sums.dtype, memory_format=torch.contiguous_format, copy=True).relu_()
        values = torch.bmm(wide, total)
        place.copy_(values[..., :-1].div_(values[..., -1:] + ATTENTION_EPS).transpose(0, 1))


def _cut(kept: Tensor, like: Tensor) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Yield the number of the first row and the kept queries of all scales, [R, W, G, d] each, strip by strip."""
    step = rows_of_strip(like[0].numel(), like.dtype)
    for top in range(0, len(kept), step):
        yield top, kept[top : top + step].unbind(2)


class Half(NamedTuple):
    """Some hidden channels of values or gates on their way through the feed-forward."""

    expand: Tensor
    bias: Tensor
    depth: Tensor
    depth_bias: Tensor
    window: Window

    def push(self, rows: Tensor, count: int, last: bool) -> Tensor | None:
        """Take rows of pixels, [N, C], and return the rows that can be computed, [R, W, part of F]."""
        place = self.window.room(count).view(len(rows), -1)
        F.silu(torch.addmm(self.bias, rows, self.expand.t(), out=place), inplace=True)
        out = None
        if self.window.push(count, last):
            image = as_image(self.window.visible())
            out = as_rows(F.conv2d(image, self.depth, self.depth_bias, padding=(0, 1), groups=image.shape[1]))
            self.window.move()
        return out


class MixRows:
    """x + norm(point(value · silu(gate))), the gated feed-forward, a slice of hidden channels at a time."""

    def __init__(self, mix: GLUMBConv, fused: bool, width: int, following: Rows) -> None:
        self.point, self.norm, self.following = mix.conv_point, mix.norm, following
        self.hidden = mix.conv_point.in_channels
        self.add_norm = add_norm_compiled if fused else add_norm
        self.inputs = Window(width, mix.conv_inverted.in_channels, mix.conv_inverted.weight)
        self.room = self.inputs.room
        expand, depth = mix.conv_inverted, mix.conv_depth
        assert expand.bias is not None
        assert depth.bias is not None
        weights = (expand.weight.flatten(1), expand.bias, depth.weight, depth.bias)

        def half(part: slice) -> Half:
            window = Window(width, part.stop - part.start, expand.weight)
            return Half(weights[0][part], weights[1][part], weights[2][part], weights[3][part], window)

        self.pairs = [
            (slice(start, stop), half(slice(start, stop)), half(slice(self.hidden + start, self.hidden + stop)))
            for start, stop in slices(self.hidden, expand.weight.dtype)
        ]

    def push(self, count: int, last: bool) -> None:
        new = self.inputs.rows[self.inputs.filled : self.inputs.filled + count].flatten(0, 1)
        ready = self.inputs.push(count, last)
        gated = new.new_empty(ready, self.inputs.rows.shape[1], self.hidden)
        for part, value, gate in self.pairs:
            opened, mixed = gate.push(new, count, last), value.push(new, count, last)
            if opened is not None and mixed is not None:
                torch.mul(F.silu(opened, inplace=True), mixed, out=gated[..., part])
        if ready:
            assert self.norm is not None
            out = F.linear(gated, self.point.weight.flatten(1))
            self.add_norm(self.inputs.rows[1 : 1 + ready], out, self.norm, self.following.room(ready))
            self.inputs.move()
            self.following.push(ready, last)
