"""Tiles and slices: equal to the public implementation's, and right where that one is not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

from sana.config import AutoencoderConfig
from sana.errors import InvalidInput
from sana.memory import tiling
from sana.memory.tiling import Tiling
from sana.models.dc_ae import DCAutoencoder

CONFIG: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16, 16),
    "decoder_block_out_channels": (8, 16, 16),
    "encoder_layers_per_block": (0, 1, 1),
    "decoder_layers_per_block": (0, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}
RATIO = 4
GRID = [(32, 32, 24, 24), (32, 24, 20, 16), (16, 40, 16, 28)]
"""Tile and stride, height and width: equal sides, unequal sides, no overlap in one direction."""
SIZES = [(48, 64), (100, 20)]


class Local:
    """An autoencoder whose every position knows only itself, so tiles must reproduce the whole exactly."""

    spatial_compression_ratio = RATIO

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def _encode(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return F.avg_pool2d(x, RATIO)

    def _decode(self, z: Tensor) -> Tensor:
        self.shapes.append(tuple(z.shape))
        return F.interpolate(z, scale_factor=RATIO, mode="nearest")


@pytest.fixture(scope="module")
def pair() -> tuple[DCAutoencoder, Any]:
    torch.manual_seed(0)
    reference = AutoencoderDC(**CONFIG).eval()
    model = DCAutoencoder(AutoencoderConfig(**CONFIG)).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


def tiles_of(sizes: tuple[int, int, int, int]) -> Tiling:
    names = ("tile_height", "tile_width", "stride_height", "stride_width")
    return Tiling(**dict(zip(names, sizes, strict=True)))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).square().mean().sqrt() <= 1e-5 * expected.square().mean().sqrt()
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sizes", GRID)
def test_tiles_equal_the_reference(
    pair: tuple[DCAutoencoder, Any], sizes: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    model, reference = pair
    reference.enable_tiling(*sizes)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        latent = reference.encode(x)[0]
        assert_close(tiling.encode(model, x, tiles_of(sizes)), latent)
        assert_close(tiling.decode(model, latent, tiles_of(sizes)), reference.decode(latent)[0])
        whole = model.decode(latent)[0]
    assert (tiling.decode(model, latent, tiles_of(sizes)) - whole).abs().max() > 1e-3  # it did tile


@pytest.mark.parametrize("size", [(37, 50), (50, 23), (33, 64)])
def test_sides_between_the_ratios_are_padded_and_cropped_as_in_the_reference(
    pair: tuple[DCAutoencoder, Any], size: tuple[int, int]
) -> None:
    model, reference = pair
    reference.enable_tiling(32, 32, 24, 24)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert_close(tiling.encode(model, x, tiles_of((32, 32, 24, 24))), reference.encode(x)[0])


@pytest.mark.parametrize("sizes", [*GRID, (32, 32, 25, 27), (35, 33, 30, 22), (4, 4, 4, 4), (31, 64, 5, 63)])
@pytest.mark.parametrize("size", [(40, 64), (92, 36), (4, 100)])
def test_tiles_of_a_local_autoencoder_equal_the_whole(sizes: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """Also for tiles and strides between the multiples of the ratio, where the reference returns a wrong width."""
    local = Local()
    x = torch.randn(2, 3, *size)
    latent = F.avg_pool2d(x, RATIO)
    torch.testing.assert_close(tiling.encode(local, x, tiles_of(sizes)), latent)
    torch.testing.assert_close(tiling.decode(local, latent, tiles_of(sizes)), local._decode(latent))


def test_a_stride_between_the_ratios_is_wrong_in_the_reference_and_right_here(
    pair: tuple[DCAutoencoder, Any],
) -> None:
    """The reference keeps as many pixels of each tile as asked for, not as there are between two tiles."""
    model, reference = pair
    sizes = (32, 32, 27, 27)
    reference.enable_tiling(*sizes)
    latent = torch.randn(1, 8, 20, 18)
    with torch.no_grad():
        theirs, ours = reference.decode(latent)[0], tiling.decode(model, latent, tiles_of(sizes))
        exact = tiling.decode(model, latent, tiles_of((32, 32, 24, 24)))
    assert ours.shape == (1, 3, 80, 72)
    assert theirs.shape != ours.shape
    assert_close(ours, exact)


def test_pictures_within_a_tile_are_not_tiled() -> None:
    local, tiles = Local(), tiles_of((32, 48, 24, 40))
    tiling.encode(local, torch.zeros(1, 3, 32, 48), tiles)
    tiling.decode(local, torch.zeros(1, 8, 8, 12), tiles)
    assert local.shapes == [(1, 3, 32, 48), (1, 8, 8, 12)]
    tiling.decode(local, torch.zeros(1, 8, 8, 13), tiles)
    assert local.shapes[2:] == [(1, 8, 8, 12), (1, 8, 8, 3), (1, 8, 2, 12), (1, 8, 2, 3)]


@pytest.mark.parametrize("dim", [-1, -2])
def test_the_blend_is_a_linear_ramp(dim: int) -> None:
    before, after = torch.full((1, 1, 6, 6), 8.0), torch.zeros(1, 1, 6, 6)
    line = tiling.blend(before, after, 4, dim).movedim(dim, -1)[0, 0, 0]
    assert line.tolist() == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]
    assert tiling.blend(before, after, 0, dim) is after
    short = after.narrow(dim, 0, 2)
    assert tiling.blend(before, short, 4, dim).movedim(dim, -1)[0, 0, 0].tolist() == [8.0, 4.0]


def test_the_blend_keeps_the_dtype() -> None:
    tile = torch.randn(1, 1, 4, 4, dtype=torch.bfloat16)
    assert tiling.blend(tile, tile, 3, -1).dtype == torch.bfloat16


def test_a_picture_below_one_latent_position_is_refused() -> None:
    with pytest.raises(InvalidInput, match="larger picture"):
        tiling.encode(Local(), torch.zeros(1, 3, 3, 64), tiles_of((32, 32, 24, 24)))


@pytest.mark.parametrize(("sizes", "word"), [((32, 32, 2, 24), "height"), ((32, 32, 24, 36), "width")])
def test_strides_that_cannot_cover_are_refused(sizes: tuple[int, int, int, int], word: str) -> None:
    with pytest.raises(InvalidInput, match=f"Tiles of {word}"):
        tiling.decode(Local(), torch.zeros(1, 8, 20, 20), tiles_of(sizes))


@pytest.mark.parametrize("tiles", [None, Tiling(tile_height=32, tile_width=32, stride_height=24, stride_width=24)])
def test_slices_are_the_pictures_one_by_one(pair: tuple[DCAutoencoder, Any], tiles: Tiling | None) -> None:
    model, _ = pair
    x = torch.randn(3, 3, 40, 36)
    with torch.no_grad():
        latent = tiling.encode(model, x, tiles, slicing=True)
        assert torch.equal(latent, torch.cat([tiling.encode(model, row[None], tiles) for row in x]))
        sample = tiling.decode(model, latent, tiles, slicing=True)
        assert torch.equal(sample, torch.cat([tiling.decode(model, row[None], tiles) for row in latent]))
    local = Local()
    tiling.decode(local, torch.zeros(3, 8, 2, 2), slicing=True)
    assert local.shapes == [(1, 8, 2, 2)] * 3


def test_gradients_flow_through_tiles(pair: tuple[DCAutoencoder, Any]) -> None:
    model, _ = pair
    latent = torch.randn(1, 8, 10, 12, requires_grad=True)
    tiling.decode(model, latent, tiles_of((32, 32, 24, 24))).square().sum().backward()
    assert latent.grad is not None
    assert (latent.grad.abs().amax(1) > 0).all()
