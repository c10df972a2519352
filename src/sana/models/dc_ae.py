"""DC-AE, the deep-compression autoencoder: pictures to latents of 1/32 (or another power of two) of the side, and back.

Source: DC-AE (arXiv 2410.10733) with the multi-scale linear attention of EfficientViT (arXiv 2205.14756).
Shapes: B batch, C O channels, L latent channels, H W image size, N = H·W, G heads of all scales, d head width.
Image tensors are NCHW by index and channels-last in memory all the way, whatever comes in: norms, linear layers and
convolutions then read the same layout, which halves the time of a bfloat16 pass on a CPU. Sums of more than four axes
are written in NHWC order because of batches of one: there the strides of an NCHW sum would not tell its layout.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import AutoencoderConfig
from sana.errors import InvalidInput
from sana.models.outputs import DecoderOutput, EncoderOutput
from sana.nn.head_attention import attend_by_heads, linear_attention, quadratic_attention
from sana.nn.inference import bare, lean, unhooked
from sana.nn.mixffn import GLUMBConv
from sana.nn.norms import ChannelRMSNorm
from sana.nn.rows import (
    ConvRows,
    Link,
    NormRows,
    ResidualRows,
    UpsampleRows,
    compute_rows,
    large,
    local,
    nearest_corners,
    shuffled_corners,
)

_NORM_EPS = 1e-5
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

    def rows(self, dtype: torch.dtype, fused: bool = False) -> Link | None:
        """Return how this block joins a chain that computes strips of rows, None if it must be called."""
        if unhooked(self) and bare(dtype, self.conv1, self.conv2) and local(self.norm, dtype):
            return Link(partial(ResidualRows, self.conv1, self.act, self.conv2, self.norm, fused))
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


class EfficientViTBlock(nn.Module):
    """Global linear attention, then a gated convolutional feed-forward, [B, C, H, W] -> same."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm_type: str) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes, norm_type)
        self.conv_out = GLUMBConv(channels, channels, expand_ratio=4, norm=True, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.attn(x))
        return out


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
            out = out + _average_groups(F.pixel_unshuffle(x, 2), out.shape[1])
        return out


def _average_groups(x: Tensor, num_groups: int) -> Tensor:
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
        if many and lean(x) and (link := self.rows(x.dtype)):
            return compute_rows(x, [link], self.out_channels)
        if self.interpolate:
            out = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            out = F.pixel_shuffle(self.conv(x), 2)
        return self._add_shortcut(out, x) if self.shortcut else out

    def rows(self, dtype: torch.dtype, fused: bool = False) -> Link | None:
        """Return how this block joins a chain that computes strips of rows, None if it must be called."""
        if unhooked(self) and bare(dtype, self.conv):
            corners = nearest_corners(self.conv) if self.interpolate else shuffled_corners(self.conv)
            return Link(partial(UpsampleRows, corners, self.shortcut), zoom=2.0)
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


class Encoder(nn.Module):
    """Pictures to latents, [B, 3, H, W] -> [B, L, H / ratio, W / ratio]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.latent_channels = config.latent_channels
        self.out_shortcut = config.encoder_out_shortcut
        self.conv_in = (
            nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
            if layers[0]
            else DownBlock(config.in_channels, widths[1], unshuffle, shortcut=False)
        )
        self.down_blocks = nn.ModuleList()
        for i, block_type in enumerate(config.per_stage("encoder_block_types")):
            stage: list[nn.Module] = [
                make_block(block_type, widths[i], config.attention_head_dim, config.encoder_qkv_multiscales[i])
                for _ in range(layers[i])
            ]
            if layers[i] and i < len(widths) - 1:
                stage.append(DownBlock(widths[i], widths[i + 1], unshuffle))
            self.down_blocks.append(nn.Sequential(*stage))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.clone(memory_format=torch.channels_last))
        for stage in self.down_blocks:
            x = stage(x)
        latent: Tensor = self.conv_out(x)
        if self.out_shortcut:
            latent = latent + _average_groups(x, self.latent_channels)
        return latent


class Decoder(nn.Module):
    """Latents to pictures, [B, L, h, w] -> [B, 3, h · ratio, w · ratio], not clamped.

    `up_blocks` are stored from high to low resolution, as published, and run the other way.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        norm_types, act_fns = config.per_stage("decoder_norm_types"), config.per_stage("decoder_act_fns")
        self.in_shortcut = config.decoder_in_shortcut
        self.out_channels = config.in_channels
        self.fused_rows = False
        self.act = ACTIVATION_FUNCTIONS[config.decoder_conv_act_fn]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for i, block_type in enumerate(config.per_stage("decoder_block_types")):
            stage: list[nn.Module] = []
            if layers[i] and i < len(widths) - 1:
                stage.append(UpBlock(widths[i + 1], widths[i], interpolate))
            scales = config.decoder_qkv_multiscales[i]
            stage += [
                make_block(block_type, widths[i], config.attention_head_dim, scales, norm_types[i], act_fns[i])
                for _ in range(layers[i])
            ]
            self.up_blocks.append(nn.Sequential(*stage))
        last_width = widths[0] if layers[0] else widths[1]
        self.last_scale = config.spatial_compression_ratio // (1 if layers[0] else 2)
        self.norm_out = ChannelRMSNorm(last_width, _NORM_EPS, bias=True)
        self.conv_out = (
            nn.Conv2d(last_width, config.in_channels, 3, padding=1)
            if layers[0]
            else UpBlock(last_width, config.in_channels, interpolate, shortcut=False)
        )

    def forward(self, z: Tensor) -> Tensor:
        z = z.clone(memory_format=torch.channels_last)
        x: Tensor = self.conv_in(z)
        if self.in_shortcut:
            groups = torch.unflatten(x.movedim(1, -1), -1, (z.shape[1], -1))
            x = (groups + z.movedim(1, -1).unsqueeze(-1)).flatten(-2).movedim(-1, 1)
        last_pixels = z.shape[-2:].numel() * self.last_scale**2
        by_rows = lean(z) and large(last_pixels * len(self.norm_out.weight), z.dtype)
        links = self._links(z.dtype) if by_rows else []
        for stage in reversed(self.up_blocks[max(0, len(links) - 1) :]):
            x = stage(x)
        if links:
            return compute_rows(x, [link for stage in reversed(links) for link in stage], self.out_channels)
        out: Tensor = self.conv_out(self.act(self.norm_out(x)))
        return out

    def compile_rows(self) -> None:
        """From now on compute norms, with what is next to them, by compiled code; on a CPU, in inference.

        The convolutions, which take most of the time, are calls of a library in compiled code as well; whole stages
        compiled are slower than strips, measured in bfloat16. The first picture takes seconds longer.
        """
        self.fused_rows = True

    def _links(self, dtype: torch.dtype) -> list[list[Link]]:
        """Return the output layers and, as stored, the first stages as long as nothing in them is global.

        In the published models 85 % of the work is in these stages.
        """
        last: Link | None = None
        if isinstance(self.conv_out, UpBlock):
            last = self.conv_out.rows(dtype)
        elif bare(dtype, self.conv_out):
            last = Link(partial(ConvRows, self.conv_out))
        if last is None or not local(self.norm_out, dtype):
            return []
        links = [[Link(partial(NormRows, self.norm_out, self.act, self.fused_rows)), last]]
        for stage in self.up_blocks:
            made: list[Link] = []
            for block in stage.children():
                link = block.rows(dtype, self.fused_rows) if isinstance(block, ResBlock | UpBlock) else None
                if link is None or not unhooked(stage):
                    return links
                made.append(link)
            links.append(made)
        return links


class DCAutoencoder(nn.Module):
    """Encoder and decoder; deterministic, so `encode` gives the latent itself.

    Shapes: pictures [B, 3, H, W] in -1..1 with sides that are multiples of `spatial_compression_ratio`, latents
    [B, L, H / ratio, W / ratio]. The diffusion model works on `latent * config.scaling_factor`.
    """

    temporal_compression_ratio = 1

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_compression_ratio = config.spatial_compression_ratio
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def _encode(self, x: Tensor) -> Tensor:
        ratio = self.spatial_compression_ratio
        if x.shape[-2] % ratio or x.shape[-1] % ratio:
            height, width = x.shape[-2:]
            raise InvalidInput(f"The picture is {width}×{height}; make both sides multiples of {ratio}.")
        latent: Tensor = self.encoder(x)
        return latent

    def _decode(self, z: Tensor) -> Tensor:
        sample: Tensor = self.decoder(z)
        return sample

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Return the latent of pictures, [B, 3, H, W] -> [B, L, H / ratio, W / ratio]."""
        latent = self._encode(x)
        return EncoderOutput(latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Return the pictures of latents, [B, L, h, w] -> [B, 3, h · ratio, w · ratio]."""
        sample = self._decode(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode, [B, 3, H, W] -> [B, 3, H, W]."""
        return self.decode(self.encode(sample)[0], return_dict=return_dict)


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
    "rms_norm": lambda channels: ChannelRMSNorm(channels, _NORM_EPS, bias=True),
    "batch_norm": lambda channels: nn.BatchNorm2d(channels, eps=_NORM_EPS),
}
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
}
