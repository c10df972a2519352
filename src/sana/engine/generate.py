"""The one loop from noise to latents, and the road of a request through it.

Shapes: B latents of a batch, C latent channels, h w latent size (pixels / 32).
"""

import contextlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from sana.checkpoints.weights import is_finite
from sana.engine.apart import Apart
from sana.engine.decode import decode_to, free_memory, is_out_of_memory
from sana.engine.edits import Edit
from sana.engine.latents import Finished
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Control, Predictor
from sana.engine.request import Request, ResolvedRequest, Result
from sana.engine.start import adapters_of, attach, conditions, controls_of, edit_of, perturbed_blocks, sampler_of
from sana.errors import NonFinite, OutOfMemory
from sana.flow.guidance import BatchedVelocity, Interval, guided_steps, guided_velocity, pag_scales
from sana.flow.path import draw_noise
from sana.flow.samplers import Noise, Step, Steps, Velocity
from sana.flow.schedules import Grid


class LoopSampler(Protocol):
    """A sampler bound to its grid: a named one, or a scheduler object behind its adapter."""

    @property
    def grid(self) -> Grid:
        """The levels and timesteps of the run."""
        ...

    def run(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> Steps: ...


class Network(BatchedVelocity, Protocol):
    """The network with the captions of a batch: a `Predictor`, or something like it."""

    device: torch.device

    def use(self, captions: Captions) -> None:
        """Set other captions."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One batch, ready to run: the five slots of the loop."""

    sampler: LoopSampler
    """Sigma grid and the rule of the steps."""
    latents: Tensor
    """Start, [B, C, h, w] in flow coordinates."""
    predictor: Network
    """The network with this batch's captions."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none, and then the captions need no unconditional rows."""
    guidance_interval: Interval | None = None
    """Sigmas (low, high) between which guidance acts; None is everywhere."""
    noise: Noise | None = None
    """Fresh noise for samplers that draw it."""
    pag_scale: float = 0.0
    """Scale of perturbed-attention guidance; 0 is none."""
    pag_adaptive_scale: float = 0.0
    """By how much that scale falls with each of the 1000 training timesteps."""
    project: Callable[[Tensor, int], Tensor] | None = None
    """Maps the state after step i, at level sigmas[i + 1], to one that keeps what must be kept."""


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
    latents become the result). What the plan's `project` makes of a state is what the consumer sees; what is sent goes
    in as it is.

    Raises:
        NonFinite: the network gave NaN or infinity; the message names the step.
    """
    grid = plan.sampler.grid
    guided = guided_steps(grid, plan.guidance_interval)
    pag = pag_scales(grid, plan.pag_scale, plan.pag_adaptive_scale)
    scale, latents = plan.guidance, plan.latents

    def velocity(x: Tensor, i: int) -> Tensor:
        v = guided_velocity(plan.predictor, scale, guided, pag)(x, i)
        # Looked at here, because what comes later can hide it: a clamp, a level that is passed over.
        if not is_finite(v):
            raise _not_finite(x, i, grid.num_steps)
        return v

    with contextlib.closing(plan.sampler.run(velocity, plan.latents, plan.noise)) as walk:
        reply: Tensor | None = None
        for i in range(grid.num_steps):
            step = walk.send(reply)
            if plan.project is not None:
                step = replace(step, latents=plan.project(step.latents, i))
            sent = yield step
            change = sent if isinstance(sent, Change) else Change(latents=sent)
            latents = step.latents if change.latents is None else change.latents
            reply = latents if change.latents is not None or plan.project is not None else None
            if change.captions is not None:
                plan.predictor.use(change.captions)
            if change.guidance is not None:
                scale = change.guidance
    return latents


def _not_finite(x: Tensor, i: int, num_steps: int) -> NonFinite:
    where = f"in step {i + 1} of {num_steps}"
    if not is_finite(x):
        return NonFinite(
            f"The latents contain NaN or infinity {where}, before the network saw them. Check their source."
        )
    return NonFinite(
        f"The transformer gave NaN or infinity {where}, so there is no picture. Load it in the dtype that its model"
        " card names, or in float32."
    )


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


def generate(
    parts: Parts, request: Request, *, rescue: Callable[[Finished], None] | None = None, keep: bool = True
) -> Generator[Step | Result, Reply, Result]:
    """Carry out a request: yield every denoising step, and after each batch a `Result` with just its pictures.

    The whole `Result` is the generator's return value; settings and model are the same in all of them, timings and
    warnings those up to then. Image i starts from noise drawn on the CPU by its own generator, seeded with seed + i.
    Batches are filled up to `batch_size` rows (the surplus is dropped), so a picture does not depend on its company,
    to the last bit. When memory runs out, the batch begins again in smaller parts, with steps numbered from 0.

    Args:
        rescue: receives the finished latents of a batch, once, if memory runs out while they are decoded; before the
            decoder is tried again with less. `engine.latents.save_latents` writes them into a file.
        keep: whether the return value holds the pictures, too; if not, memory does not grow with their number.

    Raises:
        InvalidInput: the model cannot do what is asked; nothing has been computed then.
        NonFinite: a part of the model gave NaN or infinity; the message says which, and in which step.
        OutOfMemory: even the smallest way needs too much. While decoding it is a `DecodeOutOfMemory` with the latents.
    """
    parts.require("tokenizer", "text_encoder", "transformer", "vae")
    run = _Run(parts, request.resolve(parts.effective_card), rescue)
    pictures: list[Image] = []
    seeds = [run.settings.seed + i for i in range(run.settings.count)]
    first = 0
    while first < len(seeds):
        batch = seeds[first : first + run.rows]
        latents = yield from run.denoise(batch)
        if latents is None:
            continue
        made = run.decode(latents, batch)
        pictures += made if keep else ()
        first += len(batch)
        yield run.result(made, batch)
    return run.result(pictures, seeds)


def generate_images(parts: Parts, request: Request) -> Result:
    """Carry out a request and return its pictures. Errors as `generate`."""
    steps = generate(parts, request)
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            result: Result = finished.value
            return result


class _Run:
    """What the batches of a request share; they become smaller from where memory ran out on."""

    def __init__(
        self, parts: Parts, settings: ResolvedRequest, rescue: Callable[[Finished], None] | None = None
    ) -> None:
        self.parts, self.rescue = parts, rescue
        self.attached = attach(parts, settings)
        self.settings, self.canvas = self.attached.settings, self.attached.canvas
        self.notes = list(self.attached.notes)
        self.rows = settings.batch_size
        """Pictures computed at once."""
        self.sampler = sampler_of(settings, parts.flow_shift, parts.angles)
        self.perturbed = perturbed_blocks(parts, settings)
        self.settings, self.strengths = adapters_of(parts, self.settings)
        self.facts, self.clock = self._facts(), _Clock(parts)
        self.shape = (parts.transformer.config.in_channels, *(side // parts.compression for side in self.canvas.drawn))
        with parts.using("text_encoder"):
            self.conditions = self._read()
        self.clock.stroke("text")
        self.edit, self.controls = self._encode()
        self._network: Network | None = None
        self._apart = self._freed = False

    def _facts(self) -> dict[str, str]:
        """Return what records say of the model, and of adapters that act on it without having been asked for here."""
        standing = self.parts.adapters.describe() if self.strengths is None else []
        return self.parts.describe() | ({"adapters": json.dumps(standing)} if standing else {})

    def say(self, text: str) -> None:
        """Note what the user should know, each sentence once."""
        if text not in self.notes:
            self.notes.append(text)

    def result(self, pictures: Sequence[Image], seeds: Sequence[int]) -> Result:
        """Return pictures with all that is known so far."""
        return Result(
            images=pictures,
            seeds=seeds,
            settings=self.settings,
            timings=dict(self.clock.seconds),
            model=self.facts,
            warnings=list(self.notes),
        )

    def decode(self, latents: Tensor, seeds: Sequence[int]) -> list[Image]:
        """Return the pictures of finished latents; the rows beyond the seeds only fill the batch."""
        rescue = None if self.rescue is None else partial(self._keep, self.rescue, seeds)
        finish = self._finished(latents, seeds).pictures
        with self.parts.using("vae"):
            pictures = decode_to(finish, self.parts.vae, latents, self.say, count=len(seeds), rescue=rescue)
        self.clock.stroke("decode")
        return list(chain.from_iterable(pictures))

    def _keep(self, rescue: Callable[[Finished], None], seeds: Sequence[int], latents: Tensor) -> None:
        rescue(self._finished(latents, seeds))

    def _finished(self, latents: Tensor, seeds: Sequence[int]) -> Finished:
        return Finished(
            latents=latents,
            settings=self.settings,
            seeds=seeds,
            model=self.facts,
            canvas=self.attached.canvas if self.edit is not None else None,
            kept=self.attached.kept,
        )

    def _encode(self) -> tuple[Edit | None, Sequence[Control]]:
        """Encode the picture to begin with and those of the controls."""
        if self.attached.image is None and not self.attached.controls:
            return None, ()
        with self.parts.using("vae"):
            made = edit_of(self.parts, self.attached, self.say), controls_of(self.parts, self.attached, self.say)
        self.clock.stroke("encode")
        return made

    def denoise(self, seeds: Sequence[int]) -> Generator[Step, Reply, Tensor | None]:
        """Run the loop for one batch; None if memory ran out and the batch is to be begun again with fewer `rows`.

        Raises:
            OutOfMemory: there is no way that needs less.
        """
        try:
            with (
                self.parts.using("transformer", *(("controlnet",) if self.controls else ())),
                self.parts.adapters.using(self.strengths),
            ):
                latents = yield from denoise(self._plan([*seeds, *[seeds[-1]] * (self.rows - len(seeds))]))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self.clock.stroke("denoise")
            return latents
        # Outside the except block: the traceback keeps the tensors of the failed attempt alive.
        self._network = None
        self._narrow(freed=free_memory())
        return None

    def _narrow(self, *, freed: bool) -> None:
        """Choose a way that needs less memory; at first it may be enough that some was given back."""
        if freed and not self._freed:
            self._freed = True
        elif self.rows > 1:
            self.rows = 1
            self.say(
                f"Memory ran out while denoising {self.settings.batch_size} pictures at once; they are now drawn one by"
                " one, which changes them by rounding only. Lower `batch_size`."
            )
        elif (len(self.conditions) > 1 or self.perturbed) and not self._apart:
            self._apart = True
            self.say(
                "Memory ran out while denoising; prompt and negative prompt now go through the network one after the"
                " other, which takes longer and changes the picture by rounding only."
            )
        else:
            raise OutOfMemory(
                "The memory is full: not even one picture can be denoised. Ask for a smaller `width` and `height`, a"
                " smaller model, or a shorter prompt."
            )

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        """Encode the prompt, and before it the negative prompt if guidance needs one: embeds and mask of each."""
        for _ in range(2):
            try:
                return conditions(self.parts, self.settings, self.say)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            if not free_memory():
                break
        raise OutOfMemory(
            "The memory is full: the prompt cannot be encoded. Lower `max_prompt_tokens`, or load a smaller model or"
            " the text encoder in bfloat16."
        )

    def _plan(self, seeds: Sequence[int]) -> Plan:
        """Fill the slots of the loop for one batch, whose row r starts from the noise, [C, h, w], of seeds[r]."""
        grid, settings, edit = self.sampler.grid, self.settings, self.edit
        if self._network is None:
            make = Apart if self._apart else Predictor
            self._captions = Captions.stack(self.conditions, self.rows)
            self._network = make(
                self.parts.transformer,
                grid.timesteps,
                self._captions,
                guidance=settings.guidance,
                perturbed_layers=self.perturbed,
                controls=self.controls,
            )
        network = self._network
        network.use(self._captions)  # the consumer of the last batch may have set others
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

        def noise(_: int) -> Tensor:
            return draw_noise((len(seeds), *self.shape), generators, device=network.device)

        first = noise(0)
        return Plan(
            sampler=self.sampler,
            latents=self.sampler.first(first) if edit is None else edit.start(first, grid.sigmas[0].item()),
            predictor=network,
            guidance=settings.guidance if len(self.conditions) > 1 else 1.0,
            guidance_interval=settings.guidance_interval,
            noise=noise,
            pag_scale=settings.pag_scale,
            pag_adaptive_scale=settings.pag_adaptive_scale,
            project=None if edit is None else edit.project(first, grid.sigmas),
        )
