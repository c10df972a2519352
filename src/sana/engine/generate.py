"""The one loop from noise to latents, and the road of a request through it.

Shapes: B latents of a batch, C latent channels, h w latent size (pixels / 32).
"""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from sana.engine.decode import decode
from sana.engine.images import resize_and_crop, to_pictures
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Predictor
from sana.engine.request import Request, ResolvedRequest, Result
from sana.engine.resolution import BINS, nearest_bin
from sana.errors import InvalidInput
from sana.flow.guidance import Interval, cfg_batched, guided_steps
from sana.flow.path import draw_noise
from sana.flow.samplers import BoundSampler, Noise, Step, Steps, Velocity, find_sampler
from sana.flow.schedules import Grid
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


class LoopSampler(Protocol):
    """A sampler bound to its grid: a named one, or a scheduler object behind its adapter."""

    @property
    def grid(self) -> Grid:
        """The levels and timesteps of the run."""
        ...

    def run(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> Steps: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One batch, ready to run: the five slots of the loop."""

    sampler: LoopSampler
    """Sigma grid and the rule of the steps."""
    latents: Tensor
    """Start, [B, C, h, w] in flow coordinates."""
    predictor: Predictor
    """The network with this batch's captions."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none, and then the captions need no unconditional rows."""
    guidance_interval: Interval | None = None
    """Sigmas (low, high) between which guidance acts; None is everywhere."""
    noise: Noise | None = None
    """Fresh noise for samplers that draw it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What the consumer of the loop wants different from the next step on."""

    latents: Tensor | None = None
    """Replaces the state, [B, C, h, w]."""
    captions: Captions | None = None
    """Replaces the captions; what was computed from the old ones is computed again."""
    guidance: float | None = None
    """Replaces the guidance scale."""


Reply = Tensor | Change | None
"""What may be sent into the loop after a step; a bare tensor replaces the latents."""


@torch.no_grad()
def denoise(plan: Plan) -> Generator[Step, Reply, Tensor]:
    """Run the loop: yield a typed step after each update, return the final latents.

    Closing the generator stops the run; what is sent into it holds from the next step on (sent after the last step,
    latents become the result).
    """
    grid = plan.sampler.grid
    guided = guided_steps(grid, plan.guidance_interval)
    scale, latents = plan.guidance, plan.latents

    def velocity(x: Tensor, i: int) -> Tensor:
        return cfg_batched(plan.predictor, scale, guided)(x, i)

    with contextlib.closing(plan.sampler.run(velocity, plan.latents, plan.noise)) as walk:
        reply: Tensor | None = None
        for _ in range(grid.num_steps):
            step = walk.send(reply)
            sent = yield step
            change = sent if isinstance(sent, Change) else Change(latents=sent)
            reply = change.latents
            latents = step.latents if reply is None else reply
            if change.captions is not None:
                plan.predictor.use(change.captions)
            if change.guidance is not None:
                scale = change.guidance
    return latents


class _Clock:
    """Seconds per stage, with the device waited for at each stroke."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def stroke(self, stage: str) -> None:
        """Book the time since the last stroke to a stage."""
        self.parts.synchronize()
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.seconds["total"] = now - self.start
        self.last = now


def generate(parts: Parts, request: Request) -> Generator[Step, Reply, Result]:
    """Carry out a request, yielding every denoising step of every batch; the result is the generator's return value.

    Image i starts from noise drawn on the CPU by its own generator, seeded with seed + i. Batches are filled up to
    `batch_size` rows (the surplus is dropped), so a picture does not depend on its company, to the last bit.

    Raises:
        InvalidInput: the model cannot do what is asked; nothing has been computed then.
        NonFinite: the latents or a picture contain NaN or infinity.
        OutOfMemory: not even one tile can be decoded; the finished latents are on the error.
    """
    parts.require("tokenizer", "text_encoder", "transformer", "vae")
    settings = request.resolve(parts.effective_card)
    height, width = drawn_size(parts, settings)
    shape = (parts.transformer.config.in_channels, height // parts.compression, width // parts.compression)
    clock, notes, images = _Clock(parts), list[str](), list[Image]()
    captions = _captions(parts, settings, notes.append)
    sampler = find_sampler(settings.sampler)
    bound = sampler.on(sampler.make_grid(settings.steps, parts.flow_shift))
    predictor = Predictor(parts.transformer, bound.grid.timesteps, captions, guidance=settings.guidance)
    clock.stroke("text")
    for first in range(0, settings.count, settings.batch_size):
        real = min(settings.batch_size, settings.count - first)
        rows = [settings.seed + first + min(row, real - 1) for row in range(settings.batch_size)]
        predictor.use(captions)
        latents = yield from denoise(_plan(settings, bound, predictor, shape, rows))
        clock.stroke("denoise")
        pixels = resize_and_crop(decode(parts.vae, latents, notes.append), settings.height, settings.width)
        images += to_pictures(pixels)[:real]
        clock.stroke("decode")
    return Result(
        images=images,
        seeds=[settings.seed + i for i in range(settings.count)],
        settings=settings,
        timings=clock.seconds,
        model=parts.describe(),
        warnings=notes,
    )


def generate_images(parts: Parts, request: Request) -> Result:
    """Carry out a request and return its pictures. Errors as `generate`."""
    steps = generate(parts, request)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            result: Result = finished.value
            return result


def drawn_size(parts: Parts, settings: ResolvedRequest) -> tuple[int, int]:
    """Return the (height, width) that the model draws for a request, before the picture is resized to its size.

    Raises:
        InvalidInput: the size is no multiple of the latent's pixel, and there are no bins to fall back on.
    """
    sample_size = parts.transformer.config.sample_size
    if settings.binning and sample_size in BINS:
        return nearest_bin(settings.height, settings.width, sample_size)
    pixel = parts.compression * parts.transformer.config.patch_size
    if settings.height % pixel or settings.width % pixel:
        size = f"{settings.width} x {settings.height}"
        raise InvalidInput(f"{parts.name} draws multiples of {pixel} pixels, not {size}. Ask for such a size.")
    return settings.height, settings.width


def _captions(parts: Parts, settings: ResolvedRequest, say: Callable[[str], None]) -> Captions:
    """Encode the prompt, and the negative prompt if guidance needs one, for `batch_size` latents."""
    limit, clean = settings.max_prompt_tokens, settings.clean_caption
    instruction = COMPLEX_HUMAN_INSTRUCTION if settings.instruction else None
    positive = parts.prompts.encode([settings.prompt], instruction, limit, clean)
    if positive.truncated[0]:
        say(f"The prompt is longer than {limit} tokens; this end of it was not read: {positive.truncated[0]!r}")
    groups = [(positive.embeds, positive.mask)]
    if settings.guidance > 1 and not parts.transformer.config.guidance_embeds:
        negative = parts.prompts.encode([settings.negative_prompt], None, limit, clean)
        groups.insert(0, (negative.embeds, negative.mask))
    return Captions.stack(groups, settings.batch_size)


def _plan(
    settings: ResolvedRequest,
    sampler: BoundSampler,
    predictor: Predictor,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
) -> Plan:
    """Fill the five slots for one batch, whose row r starts from the noise, [C, h, w], of seeds[r]."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def noise(_: int) -> Tensor:
        return draw_noise((len(seeds), *shape), generators, device=predictor.device)

    return Plan(
        sampler=sampler,
        latents=noise(0),
        predictor=predictor,
        guidance=settings.guidance if len(predictor.captions.rows) > len(seeds) else 1.0,
        guidance_interval=settings.guidance_interval,
        noise=noise,
    )
