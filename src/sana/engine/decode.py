"""Latents to pixels without ever losing a finished latent: out of memory, the batch is split, then the picture tiled.

Shapes: B images, C latent channels, h w latent size, H W pixels.
"""

import gc
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sana.engine.images import check_finite
from sana.errors import OutOfMemory

TILE, STRIDE = 512, 448
"""Side of the decoder's tiles and the distance between them, in pixels, when memory runs out."""


class DecodeOutOfMemory(OutOfMemory):
    """Not even one tile could be decoded; `latents` holds the finished latents, on the CPU, for another `decode`."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__(
            "The device ran out of memory while decoding, even one tile at a time. The finished latents are kept in the"
            " `latents` of this error: free memory or move the VAE to the CPU, and decode them again."
        )
        self.latents = latents


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that a device, or the computer itself, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "not enough memory" in text)


def free_memory() -> None:
    """Give back what is no longer used, on the accelerator too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


@torch.no_grad()
def decode(vae: Any, latents_BChw: Tensor, say: Callable[[str], None] = _warn) -> Tensor:
    """Decode latents to images [B, 3, H, W], about -1 to 1, in the dtype of the VAE.

    Args:
        vae: an `AutoencoderDC`; its slicing and tiling switches are honoured.
        latents_BChw: what the loop ended with.
        say: receives a sentence when memory ran out and the decoding was changed.

    Raises:
        NonFinite: the latents contain NaN or infinity.
        OutOfMemory: a `DecodeOutOfMemory`, which holds the latents.
    """
    check_finite(latents_BChw, "latents")
    weight = next(vae.parameters())
    scaled = latents_BChw.to(weight.device, weight.dtype) / vae.config.scaling_factor
    scaled = scaled.contiguous(memory_format=torch.channels_last)
    for attempt in (_whole, _one_by_one, _tiled):
        try:
            return attempt(vae, scaled, say)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except block: the traceback keeps the tensors of the failed attempt alive.
        free_memory()
    raise DecodeOutOfMemory(latents_BChw.cpu())


def _whole(vae: Any, scaled: Tensor, say: Callable[[str], None]) -> Tensor:
    image: Tensor = vae.decode(scaled, return_dict=False)[0]
    return image


def _one_by_one(vae: Any, scaled: Tensor, say: Callable[[str], None]) -> Tensor:
    if len(scaled) > 1:
        say("Memory ran out while decoding; the images of the batch are now decoded one by one.")
    return torch.cat([_whole(vae, row, say) for row in torch.split(scaled, 1)])


def _tiled(vae: Any, scaled: Tensor, say: Callable[[str], None]) -> Tensor:
    say(
        f"Memory ran out while decoding; the images are now decoded in tiles of {TILE} pixels, which can leave faint"
        " seams. Call vae.enable_tiling() beforehand, or ask for smaller images."
    )
    with _tiling(vae):
        return torch.cat([_whole(vae, row, say) for row in torch.split(scaled, 1)])


@contextmanager
def _tiling(vae: Any) -> Generator[None, None, None]:
    """Switch tiling on with standard tiles, and back to the user's settings afterwards."""
    before = {name: value for name, value in vars(vae).items() if name == "use_tiling" or name.startswith("tile_")}
    vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
