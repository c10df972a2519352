"""A loaded model as the metrics see it: prompts to pictures, and pictures through the autoencoder.

Legend: B pictures of a batch, U distinct prompts, C latent channels, h w latent size. Pictures are uint8 [256, 256, 3].
"""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana.data.cutouts import SIZE
from sana.engine.decode import decode
from sana.engine.edits import encode_picture, to_tensor
from sana.engine.generate import Plan, Reply, denoise
from sana.engine.images import resize_and_crop, to_pictures
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Control, Predictor
from sana.engine.request import Request, ResolvedRequest, SamplerName
from sana.engine.start import canvas_of, drawn_size, sampler_of
from sana.evaluation.seams import Draw, Follow, Picture, Restore
from sana.flow.path import draw_noise
from sana.flow.samplers import Step, find_sampler
from sana.flow.schedules import Grid
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


def resolve(
    parts: Parts, *, steps: int | None = None, guidance: float | None = None, sampler: SamplerName | None = None
) -> ResolvedRequest:
    """Return the order that the metrics' pictures follow; None is what the model's card recommends.

    Raises:
        InvalidInput: the model cannot draw what is asked.
    """
    request = Request(prompt="", width=SIZE, height=SIZE, steps=steps, guidance=guidance, sampler=sampler, seed=0)
    return request.resolve(parts.effective_card)


def drawer(parts: Parts, order: ResolvedRequest, *, grid: Grid | None = None) -> Draw:
    """Return a function that draws a batch of different prompts as `engine.generate` draws each alone.

    Only the last bits may differ, because prompts of a batch are padded to a common length.

    Args:
        order: everything but prompt and seed.
        grid: levels in place of those of the order.

    Raises:
        InvalidInput: a part is missing.
    """
    draw = _drawer(parts, order, grid)
    return lambda prompts, seeds: draw(prompts, seeds, ())


def follower(parts: Parts, order: ResolvedRequest) -> Follow:
    """Return a function that draws as that of `drawer` does, each picture under a control picture of its own.

    Raises:
        InvalidInput: a part is missing, or there is not exactly one control network.
    """
    parts.require("controlnet")
    draw, canvas = _drawer(parts, order, None), canvas_of(parts, order)

    def follow(prompts: list[str], seeds: list[int], pictures: list[Picture]) -> list[Picture]:
        placed = [to_tensor(canvas.place(Image.fromarray(picture))) for picture in pictures]
        latents = encode_picture(parts.vae, torch.cat(placed))
        control = Control(network=parts.controlnet, latents=latents)
        return draw(prompts, seeds, (control,))

    return follow


def _drawer(
    parts: Parts, order: ResolvedRequest, grid: Grid | None
) -> Callable[[list[str], list[int], Sequence[Control]], list[Picture]]:
    parts.require("tokenizer", "text_encoder", "transformer", "vae")
    height, width = drawn_size(parts, order)
    shape = (parts.transformer.config.in_channels, height // parts.compression, width // parts.compression)
    bound = sampler_of(order, parts.flow_shift, parts.angles)
    if grid is not None:
        bound = find_sampler(order.sampler).on(grid)
    guided = order.guidance > 1 and not parts.transformer.config.guidance_embeds

    def draw(prompts: list[str], seeds: list[int], controls: Sequence[Control]) -> list[Picture]:
        captions = _captions(parts, prompts, order.max_prompt_tokens, guided=guided)
        predictor = Predictor(
            parts.transformer, bound.grid.timesteps, captions, guidance=order.guidance, controls=controls
        )
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

        def noise(_: int) -> Tensor:
            return draw_noise((len(seeds), *shape), generators, device=predictor.device)

        scale = order.guidance if guided else 1.0
        plan = Plan(sampler=bound, latents=bound.first(noise(0)), predictor=predictor, guidance=scale, noise=noise)
        return _pixels(resize_and_crop(decode(parts.vae, _finished(denoise(plan))), SIZE, SIZE))

    return draw


def restorer(parts: Parts, *, batch_size: int = 32) -> Restore:
    """Return a function that encodes and decodes pictures, `batch_size` at once.

    Raises:
        InvalidInput: there is no autoencoder.
    """
    parts.require("vae")
    weight: Tensor = next(parts.vae.parameters())

    @torch.no_grad()
    def restore(pictures: Sequence[Picture]) -> list[Picture]:
        restored: list[Picture] = []
        for first in range(0, len(pictures), batch_size):
            batch = torch.from_numpy(np.stack(pictures[first : first + batch_size])).permute(0, 3, 1, 2)
            images = (batch.float() / 127.5 - 1).to(weight.device, weight.dtype)
            latents = parts.vae.encode(images, return_dict=False)[0]
            restored += _pixels(decode(parts.vae, latents * parts.vae.config.scaling_factor))
        return restored

    return restore


def _captions(parts: Parts, prompts: Sequence[str], limit: int, *, guided: bool) -> Captions:
    """Encode the distinct prompts once, and for guidance the empty one before them: B rows, or 2 B."""
    distinct = list(dict.fromkeys(prompts))
    read = parts.prompts.encode(distinct, COMPLEX_HUMAN_INSTRUCTION, limit)
    groups = [(read.embeds, read.mask)]
    rows = [distinct.index(prompt) for prompt in prompts]
    if guided:
        empty = parts.prompts.encode([""], None, limit)
        groups.insert(0, (empty.embeds, empty.mask))
        rows = [0] * len(rows) + [1 + row for row in rows]
    joined = Captions.stack(groups)
    return Captions(embeds=joined.embeds, mask=joined.mask, rows=tuple(rows))


def _finished(walk: Generator[Step, Reply, Tensor]) -> Tensor:
    """Run a loop to its end and return the latents, [B, C, h, w]."""
    while True:
        try:
            next(walk)
        except StopIteration as finished:
            latents: Tensor = finished.value
            return latents


def _pixels(decoded: Tensor) -> list[Picture]:
    return [np.asarray(picture) for picture in to_pictures(decoded)]
