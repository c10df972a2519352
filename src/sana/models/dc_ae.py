"""DC-AE, the deep-compression autoencoder: pictures to latents of 1/32 (or another power of two) of the side, and back.

Source: DC-AE (arXiv 2410.10733) with the multi-scale linear attention of EfficientViT (arXiv 2205.14756).
Shapes: B batch, C O channels, L latent channels, H W image size, N = H·W, G heads of all scales, d head width.
Image tensors are NCHW by index and channels-last in memory all the way, whatever comes in: norms, linear layers and
convolutions then read the same layout, which halves the time of a bfloat16 pass on a CPU. Sums of more than four axes
are written in NHWC order because of batches of one: there the strides of an NCHW sum would not tell its layout.
"""

from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from sana.config import AutoencoderConfig
from sana.errors import InvalidInput
from sana.models.dc_ae_blocks import (
    ACTIVATION_FUNCTIONS,
    NORM_EPS,
    DownBlock,
    Step,
    UpBlock,
    average_groups,
    leading_links,
    make_block,
    step_of,
    steps_of,
)
from sana.models.outputs import DecoderOutput, EncoderOutput
from sana.nn.inference import lean, unhooked
from sana.nn.norms import ChannelRMSNorm
from sana.nn.rows import Link, NormRows, Part, Whole, compute_rows, large, local, still, stream

STREAMED_PIXELS = 2 << 20
"""Pictures of more pixels than this, all of a call together, are computed in strips of rows by default.

So many take about 600 MB above the weights as a whole, in bfloat16 on a CPU, and 4096x4096 would take 4 GB. Strips need
1.6 GB there; below this number they save nothing.
"""


class Encoder(nn.Module):
    """Pictures to latents, [B, 3, H, W] -> [B, L, H / ratio, W / ratio]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.latent_channels = config.latent_channels
        self.out_shortcut = config.encoder_out_shortcut
        self.width = widths[0] if layers[0] else widths[1] // 4
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
        if lean(x) and large(x.shape[-2:].numel() * self.width, x.dtype):
            steps = self._steps(x.dtype)
            links = leading_links(steps)
            if links:
                x = compute_rows(x, list(chain(*links)))
            for step in steps[len(links) :]:
                x = step.call(x)
            return self._last(x)
        x = self.conv_in(x.clone(memory_format=torch.channels_last))
        for stage in self.down_blocks:
            x = stage(x)
        return self._last(x)

    def stream(self, x: Tensor, frugal: bool = False) -> Tensor:
        """Do what `forward` does in strips of rows, picture by picture; see `sana.nn.rows.stream`."""
        parts = list(chain(*(step.parts for step in self._steps(x.dtype))))
        inner = [stream(picture, parts, frugal=frugal) for picture in x.movedim(1, -1)]
        return self._last(torch.stack(inner).movedim(-1, 1))

    def can_stream(self, dtype: torch.dtype) -> bool:
        """Whether the stage at full resolution takes strips of rows."""
        return len(leading_links(self._steps(dtype))) > 1

    def _last(self, x: Tensor) -> Tensor:
        latent: Tensor = self.conv_out(x)
        if self.out_shortcut:
            latent = latent + average_groups(x, self.latent_channels)
        return latent

    def _steps(self, dtype: torch.dtype) -> list[Step]:
        steps = [step_of(self.conv_in, dtype)]
        for stage in self.down_blocks:
            steps += steps_of(stage, dtype)
        return steps


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
        self.ratio = config.spatial_compression_ratio
        self.last_scale = self.ratio // (1 if layers[0] else 2)
        self.norm_out = ChannelRMSNorm(last_width, NORM_EPS, bias=True)
        self.conv_out = (
            nn.Conv2d(last_width, config.in_channels, 3, padding=1)
            if layers[0]
            else UpBlock(last_width, config.in_channels, interpolate, shortcut=False)
        )

    def forward(self, z: Tensor) -> Tensor:
        x = self._first(z)
        last_pixels = z.shape[-2:].numel() * self.last_scale**2
        if lean(z) and large(last_pixels * len(self.norm_out.weight), z.dtype):
            steps = self._steps(z.dtype)
            links = leading_links(steps[::-1])[::-1]
            for step in steps[: len(steps) - len(links)]:
                x = step.call(x)
            return compute_rows(x, list(chain(*links))) if links else x
        for stage in reversed(self.up_blocks):
            x = stage(x)
        out: Tensor = self.conv_out(self.act(self.norm_out(x)))
        return out

    def stream(self, z: Tensor, frugal: bool = False) -> Tensor:
        """Do what `forward` does in strips of rows, picture by picture; see `sana.nn.rows.stream`."""
        x = self._first(z).movedim(1, -1)
        parts = list(chain(*(step.parts for step in self._steps(z.dtype))))
        height, width = (side * self.ratio for side in z.shape[-2:])
        out = x.new_empty(len(x), height, width, self.out_channels)
        for picture, place in zip(x, out, strict=True):
            stream(picture, parts, place, frugal=frugal)
        return out.movedim(-1, 1)

    def can_stream(self, dtype: torch.dtype) -> bool:
        """Whether the stage at full resolution takes strips of rows."""
        return len(leading_links(self._steps(dtype)[::-1])) > 2

    def _first(self, z: Tensor) -> Tensor:
        z = z.clone(memory_format=torch.channels_last)
        x: Tensor = self.conv_in(z)
        if self.in_shortcut:
            groups = torch.unflatten(x.movedim(1, -1), -1, (z.shape[1], -1))
            x = (groups + z.movedim(1, -1).unsqueeze(-1)).flatten(-2).movedim(-1, 1)
        return x

    def _steps(self, dtype: torch.dtype) -> list[Step]:
        steps: list[Step] = []
        for stage in reversed(self.up_blocks):
            steps += steps_of(stage, dtype, self.fused_rows)
        link = Link(partial(NormRows, self.norm_out, self.act, self.fused_rows), len(self.norm_out.weight))
        norm: Part = link if local(self.norm_out, dtype) else Whole(self._end)
        return [*steps, Step(self._end, [norm]), step_of(self.conv_out, dtype)]

    def _end(self, x: Tensor) -> Tensor:
        return self.act(self.norm_out(x))

    def compile_rows(self) -> None:
        """From now on compute norms, with what is next to them, by compiled code; on a CPU, in inference.

        The convolutions, which take most of the time, are calls of a library in compiled code as well; whole stages
        compiled are slower than strips, measured in bfloat16. The first picture takes seconds longer.
        """
        self.fused_rows = True


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
        self.streaming_min_pixels: int | None = STREAMED_PIXELS
        """Pictures of more pixels are computed in strips of rows; None: never."""
        self.frugal_streaming = False
        """Strips as small, and as little kept, as can be."""

    def can_stream(self, part: str) -> bool:
        """Whether "encoder" or "decoder" can be computed in strips of rows, as far as it takes most memory."""
        network: Encoder | Decoder = getattr(self, part)
        return unhooked(network) and network.can_stream(next(network.parameters()).dtype)

    def _streams(self, network: nn.Module, x: Tensor, pixels: int) -> bool:
        least = self.streaming_min_pixels
        return least is not None and len(x) * pixels > least and still(x) and unhooked(network)

    def _encode(self, x: Tensor) -> Tensor:
        ratio = self.spatial_compression_ratio
        if x.shape[-2] % ratio or x.shape[-1] % ratio:
            height, width = x.shape[-2:]
            raise InvalidInput(f"The picture is {width}×{height}; make both sides multiples of {ratio}.")
        # Asked directly, an encoder that is compiled as a whole does not compile for a size that it would not fit.
        if self._streams(self.encoder, x, x.shape[-2:].numel()):
            return self.encoder.stream(x, self.frugal_streaming)
        latent: Tensor = self.encoder(x)
        return latent

    def _decode(self, z: Tensor) -> Tensor:
        if self._streams(self.decoder, z, z.shape[-2:].numel() * self.spatial_compression_ratio**2):
            return self.decoder.stream(z, self.frugal_streaming)
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
