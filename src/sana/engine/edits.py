"""Pictures on their way into the loop: encoded, mixed with noise, and kept where a mask says so.

Shapes: B pictures, C latent channels, h w latent size (pixels / 32), H W pixels, n steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sana.engine.decode import encode_from
from sana.flow.path import interpolate

Say = Callable[[str], None]


def encode_picture(vae: Any, picture_BCHW: Tensor, say: Say | None = None) -> Tensor:
    """Return the latents [B, C, h, w] of pictures [B, 3, H, W] from -1 to 1, times the scaling factor.

    They are in the dtype and on the device of the VAE, whose switches for tiles and strips hold. `say` receives a
    sentence if memory did not do for the usual way. Errors as `engine.decode.encode_from`.
    """
    return encode_from(vae, picture_BCHW, *(() if say is None else (say,)))


def to_tensor(picture: Image.Image) -> Tensor:
    """Return an RGB picture as [1, 3, H, W], float32 from -1 to 1."""
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    return values.float().div_(127.5).sub_(1)


def latent_mask(mask: Image.Image, cell: int) -> Tensor:
    """Return [1, 1, h, w], 1 for each latent of which any of its `cell` x `cell` pixels is to be drawn anew, else 0."""
    pixels = torch.from_numpy(np.array(mask) > 0).float()[None, None]
    return F.max_pool2d(pixels, cell)


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A picture that the loop begins with, and which of its latents stay."""

    latents: Tensor
    """[1, C, h, w] float32: the encoded picture."""
    mask: Tensor | None = None
    """[1, 1, h, w]: 1 where latents are drawn anew, 0 where they stay; None draws all."""

    def start(self, noise_BChw: Tensor, sigma: float) -> Tensor:
        """Return the picture mixed with each row's noise at the level that the run begins at."""
        return interpolate(self.latents.to(noise_BChw), noise_BChw, sigma)

    def project(self, noise_BChw: Tensor, sigmas: Tensor) -> Callable[[Tensor, int], Tensor] | None:
        """Return what puts the kept latents back after each step, at its level and with each row's own noise.

        Blended diffusion, Avrahami et al. 2022, section 3.2. None where nothing is kept.
        """
        if self.mask is None:
            return None
        levels, mask, latents = sigmas.tolist(), self.mask.to(noise_BChw.device) > 0, self.latents.to(noise_BChw)

        def keep(x: Tensor, i: int) -> Tensor:
            return torch.where(mask, x, interpolate(latents, noise_BChw, levels[i + 1]).to(x.dtype))

        return keep
