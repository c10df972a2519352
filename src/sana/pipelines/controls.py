"""The control arguments of a documented call: pictures, scales and spans, one of each for every control network.

Shapes: P pictures, R = B n images, C h w latents, H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana.engine.controls import Control
from sana.engine.edits import encode_picture
from sana.engine.request import MAX_SIDE, shown
from sana.errors import InvalidInput
from sana.pipelines.call import Call
from sana.pipelines.checks import MAX_SCALE
from sana.pipelines.pictures import is_latent, read_control

MAX_CONTROLS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlInput:
    """What one control network follows."""

    network: Any
    picture: Tensor
    """Pictures [P, 3, H, W] or latents [P, C, h, w]; P is 1 or R."""
    scale: float | tuple[float, ...]
    start: float
    end: float

    def encoded(self, vae: Any, channels: int) -> Control:
        """Encode the pictures, unless they are latents."""
        latents = self.picture if is_latent(self.picture, channels) else encode_picture(vae, self.picture)
        return Control(network=self.network, latents=latents, scale=self.scale, start=self.start, end=self.end)


def read_controls(
    call: Call, controlnet: Any, drawn: tuple[int, int], channels: int, factor: int
) -> tuple[ControlInput, ...]:
    """Check and read the control arguments of a call.

    Args:
        controlnet: one network, or a list of them, for which pictures are a list, too; scales may be.
        drawn: (height, width) to which pictures are resized; tensors and latents keep their own size.
        channels: of latents.
        factor: pixels per latent pixel along one side.

    Raises:
        InvalidInput: something is missing, does not fit, or is no number.
    """
    several = isinstance(controlnet, list | tuple)
    networks = list(controlnet) if several else [controlnet]
    for network in networks:
        if not hasattr(network, "residuals"):
            raise InvalidInput(
                f"`controlnet` must be of type `SanaControlNetModel`. It is {shown(type(network).__name__)}."
            )
    if not 1 <= len(networks) <= MAX_CONTROLS:
        raise InvalidInput(f"`controlnet` is a list of {len(networks)} networks. Give 1 to {MAX_CONTROLS}.")
    given = call.control_image
    if given is None:
        raise InvalidInput("`control_image` is missing. Give the picture that the control network is to follow.")
    pictures: list[Any] = list(given) if several and isinstance(given, list | tuple) else [given]
    if len(pictures) != len(networks):
        raise InvalidInput(
            f"There are {len(networks)} control networks but {len(pictures)} entries in `control_image`. Give a list"
            " with one entry for each."
        )
    read = [_of_rows(read_control("control_image", picture, drawn, channels), call) for picture in pictures]
    sizes = {pixels(picture, channels, factor) for picture in read}
    if len(sizes) > 1:
        raise InvalidInput("The pictures in `control_image` differ in size. Resize them to one size.")
    if max(max(size) for size in sizes) > MAX_SIDE:
        raise InvalidInput(f"`control_image` stands for more than {MAX_SIDE} pixels along a side. Make it smaller.")
    starts = _numbers("control_guidance_start", call.control_guidance_start, networks, 0, 1)
    ends = _numbers("control_guidance_end", call.control_guidance_end, networks, 0, 1)
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise InvalidInput(
                f"`control_guidance_start` {start:g} must lie below `control_guidance_end` {end:g}. Lower it."
            )
    scales = _scales(call, networks)
    return tuple(
        ControlInput(network=network, picture=picture, scale=scale, start=start, end=end)
        for network, picture, scale, start, end in zip(networks, read, scales, starts, ends, strict=True)
    )


def pixels(picture: Tensor, channels: int, factor: int) -> tuple[int, int]:
    """Return the (height, width) that a picture, or its latents, stands for."""
    height, width = picture.shape[-2:]
    return (height * factor, width * factor) if is_latent(picture, channels) else (height, width)


def _of_rows(picture: Tensor, call: Call) -> Tensor:
    """Return one picture, or one for each image: [P, ...] -> [1 or R, ...], each prompt's for all of its images."""
    if len(picture) == 1:
        return picture
    if len(picture) != call.batch_size:
        raise InvalidInput(
            f"`control_image` holds {len(picture)} pictures for {call.batch_size} prompts. Give one, or one for each."
        )
    return torch.repeat_interleave(picture, call.images, dim=0)


def _scales(call: Call, networks: Sequence[Any]) -> list[float | tuple[float, ...]]:
    """Return a scale for each network; a list for a single network may also have one scale for each image."""
    value = call.controlnet_conditioning_scale
    if len(networks) == 1 and isinstance(value, list | tuple) and len(value) == call.rows > 1:
        return [tuple(_numbers("controlnet_conditioning_scale", value, value, -MAX_SCALE, MAX_SCALE))]
    return [*_numbers("controlnet_conditioning_scale", value, networks, -MAX_SCALE, MAX_SCALE)]


def _numbers(name: str, value: Any, items: Sequence[Any], least: float, most: float) -> list[float]:
    """Return a number for each item of one for all, or of a list with one for each."""
    values = list(value) if isinstance(value, list | tuple) else [value] * len(items)
    for one in values:
        number = isinstance(one, int | float) and not isinstance(one, bool)
        if not number or not least <= one <= most or not math.isfinite(one):
            raise InvalidInput(
                f"`{name}` has to be a finite number from {least:g} to {most:g}, or a list of them, but is"
                f" {shown(value)}."
            )
    if len(values) != len(items):
        raise InvalidInput(f"`{name}` has {len(values)} entries, but {len(items)} are needed. Give one for each.")
    return [float(one) for one in values]
