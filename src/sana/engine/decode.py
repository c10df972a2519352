"""Latents to pictures without ever losing a finished latent: out of memory, the batch is split, then the picture tiled.

Shapes: B images, C latent channels, h w latent size, H W pixels.
"""

import gc
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from sana.checkpoints.weights import is_finite
from sana.engine.images import check_finite
from sana.errors import OutOfMemory, SanaError

TILES = ((512, 448), (256, 192))
"""Sides of the decoder's tiles and the distances between them, in pixels, tried in turn when memory runs out."""

Say = Callable[[str], None]
Made = TypeVar("Made")


class DecodeOutOfMemory(OutOfMemory):
    """Not even one tile could be decoded; `latents` holds the finished latents, on the CPU, for another `decode`."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__(
            "The memory is full: not even a picture in tiles can be decoded. The finished latents are kept in the"
            " `latents` of this error: free memory, or move the VAE to the CPU, and decode them again."
        )
        self.latents = latents


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception is a library's way to say that a device, or the computer itself, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, SanaError):
        return False
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS_OF_FULL_MEMORY)


def free_memory() -> bool:
    """Give back what is no longer used, and tell whether the accelerator has more free memory now."""
    gc.collect()
    if not torch.cuda.is_available():
        return False
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() < before


@contextmanager
def full_memory_told(text: str) -> Generator[None, None, None]:
    """Raise OutOfMemory with this text instead of what the libraries raise inside the `with` block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they keep the tensors of the failed attempt alive
        free_memory()
        raise OutOfMemory(text) from error


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def decode(vae: Any, latents_BChw: Tensor, say: Say = _warn) -> Tensor:
    """Decode latents to images [B, 3, H, W], about -1 to 1, in the dtype of the VAE. All else as `decode_to`."""
    return torch.cat(decode_to(lambda image: image, vae, latents_BChw, say))


@torch.no_grad()
def decode_to(
    finish: Callable[[Tensor], Made],
    vae: Any,
    latents_BChw: Tensor,
    say: Say = _warn,
    *,
    count: int | None = None,
    rescue: Callable[[Tensor], None] | None = None,
) -> list[Made]:
    """Decode latents and return what `finish` makes of the images: one item for the whole batch, or one for each image.

    When memory runs out, here or in `finish`, caches are freed, then the images are decoded one by one, then in tiles;
    nothing is tried twice without a change. A decoder in half precision that gives NaN is run in float32 once.

    Args:
        finish: takes images [B, 3, H, W], about -1 to 1, in the dtype of the VAE.
        vae: an `AutoencoderDC`; its slicing and tiling switches are honoured.
        latents_BChw: what the loop ended with.
        say: receives a sentence when the decoding was changed.
        count: how many of the rows are wanted, all by default; the others only fill the batch.
        rescue: receives the wanted latents, on the CPU, once, when memory runs out; before anything else is tried.

    Raises:
        NonFinite: the latents contain NaN or infinity, or the decoder gives such.
        OutOfMemory: a `DecodeOutOfMemory`, which holds the latents.
    """
    check_finite(latents_BChw, "latents")
    wanted = latents_BChw[:count]
    with closing(_ladder(vae, latents_BChw, count, say)) as ladder:
        for images in ladder:
            # Closing drops what a failed attempt still holds; so does leaving the except block, for its traceback.
            with closing(images):
                try:
                    return [finish(image) for image in images]
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
            if rescue is not None:
                rescue(wanted.cpu())
                rescue = None
    raise DecodeOutOfMemory(wanted.cpu())


Images = Generator[Tensor, None, None]


def _ladder(vae: Any, latents: Tensor, count: int | None, say: Say) -> Generator[Images, None, None]:
    """Yield ways to decode, each of which needs less memory than the one before."""
    yield _images(vae, (latents,), count, say)
    if free_memory():
        yield _images(vae, (latents,), count, say)
    rows = torch.split(latents[:count], 1)
    if len(latents) > 1:
        say("Memory ran out while decoding; the images of the batch are now decoded one by one.")
        yield _images(vae, rows, 1, say)
    side = max(latents.shape[-2:]) * vae.spatial_compression_ratio
    if vae.use_tiling:
        side = min(side, max(vae.tile_sample_min_height, vae.tile_sample_min_width))
    for tile, stride in TILES:
        if tile < side:
            free_memory()
            say(
                f"Memory ran out while decoding; the images are now decoded in tiles of {tile} pixels, which can leave"
                " faint seams. Call vae.enable_tiling() beforehand, or ask for smaller images."
            )
            with _tiling(vae, tile, stride):
                yield _images(vae, rows, 1, say)


def _images(vae: Any, parts: tuple[Tensor, ...], count: int | None, say: Say) -> Images:
    """Decode parts of a batch, one after the other, and yield the first `count` images of each.

    A part for which the VAE's own half precision does not do is decoded in float32.
    """
    dtype = next(vae.parameters()).dtype
    for latents in parts:
        image = _decoded(vae, latents)[:count]
        if dtype in (torch.float16, torch.bfloat16) and not is_finite(image):
            say(f"The decoder gave NaN or infinity in {str(dtype).removeprefix('torch.')}; it was run in float32.")
            with _in_float32(vae):
                image = _decoded(vae, latents)[:count].to(dtype)
        check_finite(image, "decoded images")
        yield image


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    weight = next(vae.parameters())
    scaled = latents.to(weight.device, weight.dtype) / vae.config.scaling_factor
    image: Tensor = vae.decode(scaled.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
    return image


@contextmanager
def _tiling(vae: Any, tile: int, stride: int) -> Generator[None, None, None]:
    """Switch tiling on with standard tiles, and back to the user's settings afterwards."""
    before = {name: value for name, value in vars(vae).items() if name == "use_tiling" or name.startswith("tile_")}
    vae.enable_tiling(tile, tile, stride, stride)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def _in_float32(vae: Any) -> Generator[None, None, None]:
    """Give the weights as float32 for the length of a `with` block, and then the very tensors from before."""
    weights = [(one, one.data) for one in chain(vae.parameters(), vae.buffers()) if one.is_floating_point()]
    try:
        for one, data in weights:
            one.data = data.float()
        yield
    finally:
        for one, data in weights:
            one.data = data


_SIGNS_OF_FULL_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "bad_alloc",
    "bad allocation",
)
