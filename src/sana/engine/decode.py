"""Latents to pictures and back without ever losing a finished latent: when memory runs out, less is done at a time.

First the caches are freed, then the batch is split, then each picture is computed in exact strips of rows with the
least memory, and only what cannot be computed so is done in tiles that are blended.
Shapes: B images, C latent channels, h w latent size, H W pixels.
"""

import gc
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from sana.checkpoints.weights import is_finite
from sana.engine.images import check_finite
from sana.errors import OutOfMemory, SanaError

TILES = ((512, 448), (256, 192))
"""Sides of the decoder's tiles and the distances between them, in pixels, tried in turn when memory runs out."""
SWITCHES = ("use_tiling", "streaming_min_pixels", "frugal_streaming")

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

    When memory runs out, here or in `finish`, caches are freed, then the images are decoded one by one, then in strips
    of rows, then in tiles; nothing is tried twice without a change. A decoder in half precision that gives NaN is run
    in float32 once.

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
    attempt = partial(_images, vae, count=count, say=say)
    side = max(latents_BChw.shape[-2:]) * vae.spatial_compression_ratio
    with closing(_ladder(vae, latents_BChw, attempt, side, DECODING, say)) as ladder:
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


@torch.no_grad()
def encode_from(vae: Any, images_B3HW: Tensor, say: Say = _warn) -> Tensor:
    """Return the latents that the transformer works on, [B, 3, H, W] in -1..1 -> [B, C, h, w], scaled.

    Device and dtype of the images do not matter; the latents are in those of the VAE. When memory runs out, less is
    done at a time, as in `decode_to`.

    Raises:
        InvalidInput: a side is no multiple of the VAE's ratio.
        NonFinite: the images contain NaN or infinity, or the encoder gives such.
        OutOfMemory: the memory does not do for one picture.
    """
    check_finite(images_B3HW, "images")
    pixels = images_B3HW.shape[-2:]
    with closing(_ladder(vae, images_B3HW, partial(_latents, vae, say=say), max(pixels), ENCODING, say)) as ladder:
        for attempt in ladder:
            with closing(attempt):
                try:
                    return torch.cat(list(attempt))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
    raise OutOfMemory(
        "The memory is full: the image cannot be encoded, not even in tiles. Use a smaller image, or free memory."
    )


Attempt = Generator[Tensor, None, None]


@dataclass(frozen=True, kw_only=True)
class Doing:
    """How the sentences name what is done."""

    now: str
    done: str
    part: str


DECODING = Doing(now="decoding", done="decoded", part="decoder")
ENCODING = Doing(now="encoding", done="encoded", part="encoder")


def _ladder(
    vae: Any, batch: Tensor, attempt: Callable[[tuple[Tensor, ...]], Attempt], side: int, doing: Doing, say: Say
) -> Generator[Attempt, None, None]:
    """Yield ways to work through a batch, each of which needs less memory than the one before."""
    yield attempt((batch,))
    if free_memory():
        yield attempt((batch,))
    rows = torch.split(batch, 1)
    ran_out = f"Memory ran out while {doing.now}; the images"
    if len(rows) > 1:
        say(f"{ran_out} of the batch are now {doing.done} one by one.")
        yield attempt(rows)
    if not vae.use_tiling and vae.can_stream(doing.part) and not vae.frugal_streaming:
        free_memory()
        say(f"{ran_out} are now {doing.done} in strips with the least memory, which gives the same images.")
        with _settings(vae):
            vae.enable_streaming(frugal=True)
            yield attempt(rows)
    if vae.use_tiling:
        side = min(side, max(vae.tile_sample_min_height, vae.tile_sample_min_width))
    for tile, stride in TILES:
        if tile < side:
            free_memory()
            say(
                f"{ran_out} are now {doing.done} in tiles of {tile} pixels, which can leave faint seams. Call"
                " vae.enable_tiling() beforehand, or ask for smaller images."
            )
            with _settings(vae):
                vae.enable_tiling(tile, tile, stride, stride)
                yield attempt(rows)


def _images(vae: Any, parts: tuple[Tensor, ...], *, count: int | None, say: Say) -> Attempt:
    """Decode parts of a batch, one after the other, and yield the images of the first `count` rows.

    A part for which the VAE's own half precision does not do is decoded in float32.
    """
    for latents in parts[:count]:
        image = _or_in_float32(vae, partial(_decoded, vae, latents, count), "decoder", say)
        check_finite(image, "decoded images")
        yield image


def _latents(vae: Any, parts: tuple[Tensor, ...], *, say: Say) -> Attempt:
    """Encode parts of a batch, one after the other, and yield their latents; in float32 as in `_images`."""
    for images in parts:
        latents = _or_in_float32(vae, partial(_encoded, vae, images), "encoder", say)
        check_finite(latents, "encoded images")
        yield latents


def _or_in_float32(vae: Any, run: Callable[[], Tensor], part: str, say: Say) -> Tensor:
    """Return what `run` gives, in float32 instead of half precision where that gives NaN or infinity."""
    dtype = next(vae.parameters()).dtype
    out = run()
    if dtype in (torch.float16, torch.bfloat16) and not is_finite(out):
        say(f"The {part} gave NaN or infinity in {str(dtype).removeprefix('torch.')}; it was run in float32.")
        with _in_float32(vae):
            out = run().to(dtype)
    return out


def _decoded(vae: Any, latents: Tensor, count: int | None) -> Tensor:
    weight = next(vae.parameters())
    scaled = latents.to(weight.device, weight.dtype) / vae.config.scaling_factor
    image: Tensor = vae.decode(scaled.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
    return image[:count]


def _encoded(vae: Any, images: Tensor) -> Tensor:
    weight = next(vae.parameters())
    latents: Tensor = vae.encode(images.to(weight.device, weight.dtype), return_dict=False)[0]
    scale: float = vae.config.scaling_factor
    return latents * scale


@contextmanager
def _settings(vae: Any) -> Generator[None, None, None]:
    """Put the user's switches of a VAE back at the end of a `with` block."""
    before = {name: value for name, value in vars(vae).items() if name in SWITCHES or name.startswith("tile_")}
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
