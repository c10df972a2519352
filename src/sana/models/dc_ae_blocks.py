"""The blocks of DC-AE's stages, and how each of them joins a chain that computes strips of rows.

Shapes: B batch, C O channels, H W image size, N = H·W, G heads of all scales, d head width. All images are
channels-last in memory; see `sana.models.dc_ae`.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.nn.head_attention import attend_by_heads, linear_attention, quadratic_attention
from sana.nn.inference import bare, lean, unhooked
from sana.nn.mixffn import GLUMBConv
from sana.nn.norms import ChannelRMSNorm
from sana.nn.row_attention import AttentionRows, MixRows
from sana.nn.row_resampling import DownsampleRows, UpsampleRows, nearest_corners, shuffled_corners
from sana.nn.rows import ConvRows, Link, Part, ResidualRows, Spread, Whole, compute_rows, local

NORM_EPS = 1e-5
_MANY_PIXELS = 2048  # of fewer, upsampling by corners takes longer to prepare than it saves


class ResBlock(nn.Module):
    """Two 3×3 convolutions with the norm after the second, [B, C, H, W] -> same."""

    def __init__(self, channels: int, norm_type: str = "rms_norm", act_fn: str = "silu") -> None:
        super().__init__()
        self.act = ACTIVATION_FUNCTIONS[act_fn]
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm_type](channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv2(self.act(self.conv1(x))))
        return x + out

    def parts(self, dtype: torch.dtype, fused: bool = False) -> list[Part] | None:
        """Return how this block joins a chain that computes strips of rows, None if it must be called."""
        if unhooked(self) and bare(dtype, self.conv1, self.conv2) and local(self.norm, dtype):
            make = partial(ResidualRows, self.conv1, self.act, self.conv2, self.norm, fused)
            return [Link(make, self.conv2.out_channels)]
        return None


class MultiscaleProjection(nn.Module):
    """Aggregate neighbouring tokens: depthwise k×k, then 1×1 within each head's channels; [B, 3C, H, W] -> same."""

    def __init__(self, channels: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        width = 3 * channels
        self.proj_in = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width, bias=False)
        self.proj_out = nn.Conv2d(width, width, 1, groups=3 * num_heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj_out(self.proj_in(x))
        return out

    def bare(self, dtype: torch.dtype) -> bool:
        """Whether calling this is no more than the two convolutions."""
        return unhooked(self) and bare(dtype, self.proj_in, self.proj_out)


class MultiscaleLinearAttention(nn.Module):
    """ReLU attention over all positions and several scales, with norm and residual, [B, C, H, W] -> same.

    `to_q`, `to_k`, `to_v` are the three thirds of one projection whose channels are interleaved by head: head g owns
    3·d consecutive channels of the concatenation, and only those are q, k and v (the published layout).
    """

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm_type: str) -> None:
        super().__init__()
        self.head_dim = head_dim
        num_heads = channels // head_dim
        inner = num_heads * head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(MultiscaleProjection(inner, num_heads, size) for size in kernel_sizes)
        self.to_out = nn.Linear(inner * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = NORMS[norm_type](channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height * width > self.head_dim and lean(x) and bare(x.dtype, self.to_q, self.to_k, self.to_v):
            return self._lean(x)
        x_BHWC = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(x_BHWC), self.to_k(x_BHWC), self.to_v(x_BHWC)], dim=-1).movedim(-1, 1)
        scales = torch.cat([qkv, *(project(qkv) for project in self.to_qkv_multiscale)], dim=1)
        tokens = scales.movedim(1, -1).flatten(1, 2)
        heads = torch.unflatten(tokens, -1, (-1, 3 * self.head_dim)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)  # each [B, G, N, d]
        q, k = F.relu(q), F.relu(k)
        # Both are the same function, but round differently: the choice is that of the published models.
        attend = linear_attention if height * width > self.head_dim else quadratic_attention
        out_BHWC = torch.unflatten(attend(q, k, v).transpose(1, 2).flatten(2), 1, (height, width))
        out: Tensor = self.norm_out(self.to_out(out_BHWC).movedim(-1, 1))
        return x + out

    def _lean(self, x: Tensor) -> Tensor:
        """Compute the same values without ever laying all scales or all float32 copies next to each other."""
        joined = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        qkv = F.linear(x.movedim(1, -1), joined).movedim(-1, 1)
        inner = len(self.to_q.weight)
        mixed = x.new_empty(len(x), *x.shape[-2:], inner * (1 + len(self.to_qkv_multiscale)))
        scales = [qkv, *(project(qkv) for project in self.to_qkv_multiscale)]
        for scale, place in zip(scales, torch.split(mixed.flatten(1, 2), inner, dim=-1), strict=True):
            attend_by_heads(scale.movedim(1, -1).flatten(1, 2), self.head_dim, place)
        out: Tensor = self.norm_out(self.to_out(mixed).movedim(-1, 1))
        return x + out

    def part(self, dtype: torch.dtype, fused: bool = False) -> Part:
        """Return how the attention takes and gives strips of rows, or that it must be called."""
        further = [scale for scale in self.to_qkv_multiscale if isinstance(scale, MultiscaleProjection)]
        layers = bare(dtype, self.to_q, self.to_k, self.to_v, self.to_out) and local(self.norm_out, dtype)
        if unhooked(self) and layers and all(scale.bare(dtype) for scale in further):
            return Spread(partial(self._rows, [(scale.proj_in, scale.proj_out) for scale in further], fused))
        return Whole(self)

    def _rows(self, scales: Sequence[tuple[nn.Conv2d, nn.Conv2d]], fused: bool, frugal: bool) -> AttentionRows:
        return AttentionRows(
            joined=torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]),
            scales=scales,
            head_dim=self.head_dim,
            to_out=self.to_out,
            norm=self.norm_out,
            fused=fused,
            frugal=frugal,
        )


class EfficientViTBlock(nn.Module):
    """Global linear attention, then a gated convolutional feed-forward, [B, C, H, W] -> same."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm_type: str) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes, norm_type)
        self.conv_out = GLUMBConv(channels, channels, expand_ratio=4, norm=True, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.attn(x))
        return out

    def parts(self, dtype: torch.dtype, fused: bool = False) -> list[Part] | None:
        """Return how the two halves take and give strips of rows, None if the block must be called."""
        if not unhooked(self):
            return None
        mix, norm = self.conv_out, self.conv_out.norm
        mixed: Part = Whole(mix)
        layers = bare(dtype, mix.conv_inverted, mix.conv_depth, mix.conv_point) and type(mix) is GLUMBConv
        if unhooked(mix) and layers and norm is not None and local(norm, dtype):
            mixed = Link(partial(MixRows, mix, fused), mix.conv_point.out_channels)
        return [self.attn.part(dtype, fused), mixed]


class DownBlock(nn.Module):
    """Halve both sides, [B, C, 2H, 2W] -> [B, O, H, W]; the shortcut averages space-to-depth channels."""

    def __init__(self, in_channels: int, out_channels: int, unshuffle: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.shortcut = shortcut
        if unshuffle:
            self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        if self.unshuffle:
            out = F.pixel_unshuffle(out, 2)
        if self.shortcut:
            out = out + average_groups(F.pixel_unshuffle(x, 2), out.shape[1])
        return out

    def parts(self, dtype: torch.dtype, fused: bool = False) -> list[Part] | None:
        """Return how this block joins a chain that computes strips of rows, None if it must be called."""
        if unhooked(self) and (bare(dtype, self.conv) if self.unshuffle else _halving(dtype, self.conv)):
            make = partial(DownsampleRows, self.conv, self.unshuffle, self.shortcut)
            return [Link(make, self.conv.out_channels * (4 if self.unshuffle else 1), zoom=0.5)]
        return None


def _halving(dtype: torch.dtype, conv: nn.Conv2d) -> bool:
    """Whether `bare` would hold for a convolution, were it not for its stride of 2."""
    shape = (conv.stride, conv.dilation, conv.padding_mode)
    weight = conv.weight
    same = type(conv) is nn.Conv2d and type(weight) is nn.Parameter and weight.dtype == dtype
    return same and shape == ((2, 2), (1, 1), "zeros") and unhooked(conv)


def average_groups(x: Tensor, num_groups: int) -> Tensor:
    """Average groups of consecutive channels, [B, C, H, W] -> [B, num_groups, H, W]."""
    return torch.unflatten(x.movedim(1, -1), -1, (num_groups, -1)).mean(dim=-1).movedim(-1, 1)


class UpBlock(nn.Module):
    """Double both sides, [B, C, H, W] -> [B, O, 2H, 2W]; the shortcut is depth-to-space of repeated channels."""

    def __init__(self, in_channels: int, out_channels: int, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.shortcut = shortcut
        self.out_channels = out_channels
        self.conv = nn.Conv2d(in_channels, out_channels if interpolate else 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        many = self.interpolate and x.shape[-2:].numel() >= _MANY_PIXELS
        if many and lean(x) and (link := self.link(x.dtype)):
            return compute_rows(x, [link])
        if self.interpolate:
            out = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            out = F.pixel_shuffle(self.conv(x), 2)
        return self._add_shortcut(out, x) if self.shortcut else out

    def parts(self, dtype: torch.dtype, fused: bool = False) -> list[Part] | None:
        """Return how this block joins a chain that computes strips of rows, None if it must be called."""
        link = self.link(dtype)
        return None if link is None else [link]

    def link(self, dtype: torch.dtype) -> Link | None:
        """Return the one part of this block."""
        if unhooked(self) and bare(dtype, self.conv):
            corners = cache(partial(nearest_corners if self.interpolate else shuffled_corners, self.conv))
            return Link(partial(UpsampleRows, corners, self.shortcut), self.out_channels, zoom=2.0)
        return None

    @staticmethod
    def _add_shortcut(out: Tensor, x: Tensor) -> Tensor:
        """Add without ever making the repeated and shuffled tensor: it is a broadcast view of `x`."""
        batch, channels, height, width = x.shape
        repeats = 4 * out.shape[1] // channels
        copies = x.movedim(1, -1).unsqueeze(-1).expand(-1, -1, -1, -1, repeats)
        copies = copies.reshape(batch, height, width, -1, 2, 2).permute(0, 1, 4, 2, 5, 3)
        cells = torch.unflatten(torch.unflatten(out.movedim(1, -1), 2, (width, 2)), 1, (height, 2))
        return (cells + copies).flatten(3, 4).flatten(1, 2).movedim(-1, 1)  # the sum is [B, H, 2, W, 2, O]


class Step(NamedTuple):
    """A layer of an autoencoder's road: how it is called with all of its picture, and how it takes strips of rows."""

    call: Callable[[Tensor], Tensor]
    parts: list[Part]


def step_of(layer: nn.Module, dtype: torch.dtype, fused: bool = False) -> Step:
    """Return the step of a block or of an outer convolution."""
    parts: list[Part] | None = None
    if isinstance(layer, ResBlock | EfficientViTBlock | DownBlock | UpBlock):
        parts = layer.parts(dtype, fused)
    elif isinstance(layer, nn.Conv2d) and bare(dtype, layer):
        parts = [Link(partial(ConvRows, layer), layer.out_channels)]
    return Step(layer, parts or [Whole(layer)])


def steps_of(stage: nn.Module, dtype: torch.dtype, fused: bool = False) -> list[Step]:
    """Return the steps of a stage: its blocks, or the stage itself if calling it is more than that."""
    if unhooked(stage):
        return [step_of(block, dtype, fused) for block in stage.children()]
    return [Step(stage, [Whole(stage)])]


def leading_links(steps: Sequence[Step]) -> list[list[Link]]:
    """Return the parts of the first steps, as long as none of them must see a whole picture."""
    found: list[list[Link]] = []
    for step in steps:
        links = [part for part in step.parts if isinstance(part, Link)]
        if len(links) < len(step.parts):
            break
        found.append(links)
    return found


def make_block(
    block_type: str,
    channels: int,
    head_dim: int,
    kernel_sizes: tuple[int, ...],
    norm_type: str = "rms_norm",
    act_fn: str = "silu",
) -> nn.Module:
    """Return one block of a stage by the name it has in the configuration."""
    if block_type == "ResBlock":
        return ResBlock(channels, norm_type, act_fn)
    return EfficientViTBlock(channels, head_dim, kernel_sizes, norm_type)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms_norm": lambda channels: ChannelRMSNorm(channels, NORM_EPS, bias=True),
    "batch_norm": lambda channels: nn.BatchNorm2d(channels, eps=NORM_EPS),
}
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
}
