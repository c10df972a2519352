"""The gated feed-forward on rows of pixels with a gradient that keeps two tensors of the hidden width, not six.

Shapes: B batch, C input channels, O output channels, F hidden channels, H W image size, M = B * H * W rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana.nn.linear_attention import no_autocast

Range = tuple[int, int]


class MixRows(torch.autograd.Function):
    """The three convolutions of `GLUMBConv`, [B, C, H, W] -> [B, O, H, W], channels last, in ranges of F.

    The 1x1 convolutions are matrix products, which a CPU runs twice as fast, and the activations are computed again in
    the backward pass. Weights of another dtype are converted; their gradients come in their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand: Tensor,
        expand_bias: Tensor,
        depth: Tensor,
        depth_bias: Tensor,
        point: Tensor,
        dtype: torch.dtype,
        ranges: Sequence[Range],
    ) -> Tensor:
        """`expand` [2F, C, 1, 1], `depth` [2F, 1, 3, 3], `point` [O, F, 1, 1]; `dtype` is what is computed in."""
        hidden = point.shape[1]
        with no_autocast(x.device.type):
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).to(dtype)
            wide, wide_bias, kernel, kernel_bias = (t.to(dtype) for t in (expand, expand_bias, depth, depth_bias))
            wide = wide.flatten(1)
            narrow = [F.linear(rows, wide[slice(*part)], wide_bias[slice(*part)]) for part in _both(ranges, hidden)]
            mixed = [
                _depthwise(F.silu(one), kernel[slice(*part)], kernel_bias[slice(*part)], x)
                for one, part in zip(narrow, _both(ranges, hidden), strict=True)
            ]
            count = len(ranges)
            gated = [F.silu(gate).mul_(value) for value, gate in zip(mixed[:count], mixed[count:], strict=True)]
            out = F.linear(_joined(gated), point.to(dtype).flatten(1))
        ctx.save_for_backward(rows, expand, depth, point, *narrow, *mixed)
        ctx.ranges, ctx.dtypes, ctx.like = ranges, (x.dtype, expand_bias.dtype, depth_bias.dtype), x.shape
        return _image(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, expand, depth, point, *kept = ctx.saved_tensors
        dtype, ranges, hidden = rows.dtype, ctx.ranges, point.shape[1]
        parts = _both(ranges, hidden)
        narrow, mixed = kept[: len(parts)], kept[len(parts) :]
        wanted = ctx.needs_input_grad
        of_x = of_expand = of_expand_bias = of_depth = of_depth_bias = of_point = None
        with no_autocast(grad.device.type):
            of_out = grad.permute(0, 2, 3, 1).reshape(len(rows), -1).to(dtype)
            of_gated = of_out @ point.to(dtype).flatten(1)
            slopes, gated = _through_gate(of_gated, mixed, ranges)
            if wanted[5]:
                of_point = _weight_gradient(of_out, _joined(gated), point.dtype).view_as(point)
            if wanted[3]:
                of_depth = torch.cat(
                    [_kernel_gradient(s, F.silu(a), grad) for s, a in zip(slopes, narrow, strict=True)]
                ).to(depth.dtype)
            if wanted[4]:
                of_depth_bias = torch.cat([slope.sum(0) for slope in slopes]).to(ctx.dtypes[2])
            turned = depth.to(dtype).flip(2, 3)
            before = rows.new_empty(len(rows), 2 * hidden)
            for part, slope, one in zip(parts, slopes, narrow, strict=True):
                back = _depthwise(slope, turned[slice(*part)], None, grad)
                torch.ops.aten.silu_backward(back, one, grad_input=before[:, slice(*part)])
            if wanted[1]:
                of_expand = _weight_gradient(before, rows, expand.dtype).view_as(expand)
            if wanted[2]:
                of_expand_bias = before.sum(0).to(ctx.dtypes[1])
            if wanted[0]:
                of_x = _image(before @ expand.to(dtype).flatten(1), grad).to(ctx.dtypes[0])
        return of_x, of_expand, of_expand_bias, of_depth, of_depth_bias, of_point, None, None


def _weight_gradient(of_out: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of a matrix [O, I] from those of its results [M, O] and its inputs [M, I].

    The product is faster after the narrower of the two has been reordered.
    """
    if rows.shape[1] < of_out.shape[1]:
        return (rows.t().contiguous() @ of_out).t().to(dtype, memory_format=torch.contiguous_format)
    return (of_out.t().contiguous() @ rows).to(dtype)


def _through_gate(
    of_gated: Tensor, mixed: Sequence[Tensor], ranges: Sequence[Range]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of values and gates, ranges of the values first, and the gated values."""
    values, gates, gated = [], [], []
    for (start, stop), value, gate in zip(ranges, mixed[: len(ranges)], mixed[len(ranges) :], strict=True):
        above, open_gate = of_gated[:, start:stop], F.silu(gate)
        values.append(above * open_gate)
        gates.append(torch.ops.aten.silu_backward(above * value, gate))
        gated.append(open_gate.mul_(value))
    return [*values, *gates], gated


def _both(ranges: Sequence[Range], hidden: int) -> list[Range]:
    """Return the ranges of the values and behind them those of the gates."""
    return [*ranges, *((hidden + start, hidden + stop) for start, stop in ranges)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """View rows [M, K] as an image [B, K, H, W] of the size of `like`."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _depthwise(rows: Tensor, kernel: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """Convolve rows [M, K], which are an image of the size of `like`, with a kernel [K, 1, 3, 3] for each channel."""
    mixed = F.conv2d(_image(rows, like), kernel, bias, padding=1, groups=rows.shape[1])
    return mixed.permute(0, 2, 3, 1).reshape(len(rows), -1)


def _kernel_gradient(slope: Tensor, activated: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of the kernels [K, 1, 3, 3] from rows [M, K] of both sides."""
    count = slope.shape[1]
    kernel = slope.new_empty(count, 1, 3, 3)
    one = [1, 1]
    found = torch.ops.aten.convolution_backward(
        _image(slope, like), _image(activated, like), kernel, None, one, one, one, False, [0, 0], count,
        [False, True, False],
    )  # fmt: skip
    return found[1]  # type: ignore[no-any-return]
