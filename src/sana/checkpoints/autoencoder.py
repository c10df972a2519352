"""The public class of the autoencoder: the pure module plus loading, saving and memory switches.

Shapes: B batch, L latent channels, H W image size, h w latent size.
"""

from typing import Any

from torch import Tensor

from sana.checkpoints.pretrained import FieldMapping, PretrainedMixin
from sana.config import AutoencoderConfig
from sana.memory import tiling
from sana.models.dc_ae import DCAutoencoder
from sana.models.outputs import DecoderOutput, EncoderOutput


class AutoencoderSettings(AutoencoderConfig, FieldMapping):
    """`AutoencoderDC.config`."""


class AutoencoderDC(PretrainedMixin, DCAutoencoder):
    """The deep-compression autoencoder; see `DCAutoencoder` for shapes and `AutoencoderConfig` for its fields."""

    config_type = AutoencoderSettings
    config: AutoencoderSettings

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_height = self.tile_sample_min_width = 512
        self.tile_sample_stride_height = self.tile_sample_stride_width = 448

    @property
    def tile_latent_min_height(self) -> int:
        """Height of a tile in latent positions."""
        return self.tile_sample_min_height // self.spatial_compression_ratio

    @property
    def tile_latent_min_width(self) -> int:
        """Width of a tile in latent positions."""
        return self.tile_sample_min_width // self.spatial_compression_ratio

    def enable_slicing(self) -> None:
        """Encode and decode a batch one picture at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Work in overlapping tiles of these sizes, in pixels, once a side is longer; None keeps the size set before.

        Errors: InvalidInput for strides that cannot cover a picture.
        """
        self.tile_sample_min_height = tile_sample_min_height or self.tile_sample_min_height
        self.tile_sample_min_width = tile_sample_min_width or self.tile_sample_min_width
        self.tile_sample_stride_height = tile_sample_stride_height or self.tile_sample_stride_height
        self.tile_sample_stride_width = tile_sample_stride_width or self.tile_sample_stride_width
        self.use_tiling = True
        self._tiles().in_latents(self.spatial_compression_ratio)

    def disable_tiling(self) -> None:
        """Work on whole pictures."""
        self.use_tiling = False

    def enable_streaming(self, min_pixels: int = 0, *, frugal: bool = False) -> None:
        """Work in strips of rows once the pictures of a call have more than `min_pixels` pixels together.

        The result is that of the whole pictures; only large intermediate results are never there as a whole. Without
        this call it is done from `STREAMED_PIXELS` on. Where it cannot be (with gradients, under autocast, in layers
        that carry hooks or adapters), those layers see the whole picture. Tiles, if switched on, go first.

        Args:
            frugal: take the least memory; a few per cent more work.
        """
        self.streaming_min_pixels, self.frugal_streaming = min_pixels, frugal

    def disable_streaming(self) -> None:
        """Compute pictures of any size as a whole."""
        self.streaming_min_pixels, self.frugal_streaming = None, False

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Return the latent of pictures, [B, 3, H, W] -> [B, L, h, w], sliced and tiled as switched on."""
        latent = tiling.encode(self, x, self._tiles() if self.use_tiling else None, self.use_slicing)
        return EncoderOutput(latent) if return_dict else (latent,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Return the pictures of latents, [B, L, h, w] -> [B, 3, H, W], sliced and tiled as switched on."""
        sample = tiling.decode(self, z, self._tiles() if self.use_tiling else None, self.use_slicing)
        return DecoderOutput(sample) if return_dict else (sample,)

    def _tiles(self) -> tiling.Tiling:
        return tiling.Tiling(
            tile_height=self.tile_sample_min_height,
            tile_width=self.tile_sample_min_width,
            stride_height=self.tile_sample_stride_height,
            stride_width=self.tile_sample_stride_width,
        )
