"""Encode and decode large pictures in overlapping tiles, or a batch one picture at a time, to bound memory.

A tile sees only itself, and DC-AE attends globally: a tiled result is close to, but not the same as, the whole one.
Shapes: B batch, C channels, L latent channels, H W picture size, h w latent size (h = H / ratio, rounded down).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.errors import InvalidInput


class Autoencoder(Protocol):
    """What these functions need of an autoencoder."""

    spatial_compression_ratio: int

    def _encode(self, x: Tensor) -> Tensor: ...

    def _decode(self, z: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Size of the tiles and distance from one to the next, in pixels; the difference is the blended overlap."""

    tile_height: int = 512
    """Height of a tile; smaller pictures are not tiled."""
    tile_width: int = 512
    """Width of a tile; smaller pictures are not tiled."""
    stride_height: int = 448
    """Rows from one tile to the next."""
    stride_width: int = 448
    """Columns from one tile to the next."""

    def in_latents(self, ratio: int) -> tuple[int, int, int, int]:
        """Return the four sizes in latent positions, rounded down: the grid on which tiles can really start and end.

        Errors: `InvalidInput` if a stride is shorter than one latent position or longer than the tile.
        """
        for side in ("height", "width"):
            tile, stride = getattr(self, f"tile_{side}"), getattr(self, f"stride_{side}")
            if not ratio <= stride <= tile:
                raise InvalidInput(
                    f"Tiles of {side} {tile} every {stride} pixels cannot cover a picture; "
                    f"choose a stride from {ratio} to the tile's {side}."
                )
        return (
            self.tile_height // ratio,
            self.tile_width // ratio,
            self.stride_height // ratio,
            self.stride_width // ratio,
        )


def encode(autoencoder: Autoencoder, x: Tensor, tiling: Tiling | None = None, slicing: bool = False) -> Tensor:
    """Return the latent of pictures, [B, 3, H, W] -> [B, L, h, w], in tiles if a side exceeds the tile's."""
    if slicing and len(x) > 1:
        return torch.cat([encode(autoencoder, row, tiling) for row in torch.split(x, 1)])
    if tiling is not None and (x.shape[-2] > tiling.tile_height or x.shape[-1] > tiling.tile_width):
        return tiled_encode(autoencoder, x, tiling)
    return autoencoder._encode(x)


def decode(autoencoder: Autoencoder, z: Tensor, tiling: Tiling | None = None, slicing: bool = False) -> Tensor:
    """Return the pictures of latents, [B, L, h, w] -> [B, 3, H, W], in tiles if a side exceeds the tile's."""
    if slicing and len(z) > 1:
        return torch.cat([decode(autoencoder, row, tiling) for row in torch.split(z, 1)])
    if tiling is not None:
        tile_height, tile_width, *_ = tiling.in_latents(autoencoder.spatial_compression_ratio)
        if z.shape[-2] > tile_height or z.shape[-1] > tile_width:
            return tiled_decode(autoencoder, z, tiling)
    return autoencoder._decode(z)


def tiled_encode(autoencoder: Autoencoder, x: Tensor, tiling: Tiling) -> Tensor:
    """Return the latent of pictures of any size, [B, 3, H, W] -> [B, L, h, w], tile by tile.

    Of a side that is no multiple of the ratio only the whole latent positions are returned; the rest, filled up with
    zeros, is seen by the tiles at the border, as in the published models.
    """
    ratio = autoencoder.spatial_compression_ratio
    sizes = tiling.in_latents(ratio)

    def encode_tile(top: int, left: int) -> Tensor:
        rows, columns = slice(top * ratio, (top + sizes[0]) * ratio), slice(left * ratio, (left + sizes[1]) * ratio)
        tile = x[:, :, rows, columns]
        return autoencoder._encode(F.pad(tile, (0, -tile.shape[-1] % ratio, 0, -tile.shape[-2] % ratio)))

    return _assemble(encode_tile, x.shape[-2] // ratio, x.shape[-1] // ratio, sizes, scale=1)


def tiled_decode(autoencoder: Autoencoder, z: Tensor, tiling: Tiling) -> Tensor:
    """Return the pictures of latents of any size, [B, L, h, w] -> [B, 3, H, W], tile by tile."""
    ratio = autoencoder.spatial_compression_ratio
    sizes = tiling.in_latents(ratio)

    def decode_tile(top: int, left: int) -> Tensor:
        return autoencoder._decode(z[:, :, top : top + sizes[0], left : left + sizes[1]])

    return _assemble(decode_tile, z.shape[-2], z.shape[-1], sizes, scale=ratio)


def _assemble(
    make_tile: Callable[[int, int], Tensor], height: int, width: int, sizes: tuple[int, int, int, int], scale: int
) -> Tensor:
    """Make the tiles of a latent grid, blend each into the one above, then the one on its left, and join them.

    `sizes` are tile and stride in latent positions; a latent position is `scale` positions of the result.
    """
    if not height or not width:
        raise InvalidInput("The picture is narrower than one latent position; use a larger picture.")
    tile_height, tile_width, stride_height, stride_width = sizes
    strips: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, height, stride_height):
        row: list[Tensor] = []
        for left in range(0, width, stride_width):
            tile = make_tile(top, left)
            if above:
                tile = blend(above[len(row)], tile, (tile_height - stride_height) * scale, dim=-2)
            if row:
                tile = blend(row[-1], tile, (tile_width - stride_width) * scale, dim=-1)
            row.append(tile)
        strips.append(torch.cat([t[..., : stride_height * scale, : stride_width * scale] for t in row], dim=-1))
        above = row
    return torch.cat(strips, dim=-2)[..., : height * scale, : width * scale]


def blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """Return `after` with its first `extent` positions along `dim` faded in, linearly, from the last of `before`.

    An overlap cut short by the border fades over what is there. The fade is computed in float32 for half precision.
    """
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    ramp = torch.arange(extent, device=after.device, dtype=torch.promote_types(after.dtype, torch.float32)) / extent
    ramp = ramp.view(-1, *(1,) * (-1 - dim))
    old, new = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    faded = (old * (1 - ramp) + new * ramp).to(after.dtype)
    return torch.cat([faded, after.narrow(dim, extent, after.shape[dim] - extent)], dim=dim)
