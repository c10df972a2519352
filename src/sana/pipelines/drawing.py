"""What the five documented calls share: a checked call fills the slots of the engine's loop, and its end is decoded.

Shapes: B prompts, n images per prompt, R = B n images, P pictures, C h w latents, H W pixels.
"""

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sana.engine.angles import chosen
from sana.engine.controls import Control, acting_steps
from sana.engine.decode import decode_to, full_memory_told
from sana.engine.edits import encode_picture
from sana.engine.generate import Change, Plan, denoise
from sana.engine.images import check_finite, resize_and_crop, to_pictures
from sana.engine.predictor import Captions, Predictor
from sana.engine.resolution import check_known, cut_told, nearest_bin
from sana.flow.adapter import SchedulerSampler, begin_at, set_angles, set_timesteps, sigma_data_of
from sana.flow.path import draw_noise, interpolate
from sana.flow.schedules import NUM_TRAIN_TIMESTEPS
from sana.pipelines import checks
from sana.pipelines.call import Call
from sana.pipelines.callbacks import CallbackBridge
from sana.pipelines.controls import ControlInput, pixels, read_controls
from sana.pipelines.lora import LoraMixin
from sana.pipelines.output import ImagePipelineOutput, SanaPipelineOutput
from sana.pipelines.pictures import for_rows, is_latent, read_images
from sana.pipelines.prompts import Condition, PromptPipeline

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A call that was found possible, with what the checks have read."""

    call: Call
    drawn: Size
    """Size that is drawn."""
    shape: tuple[int, int, int, int]
    """Of the latents, (R, C, h, w)."""
    sampler: SchedulerSampler
    """The scheduler with its timesteps set."""
    guided: bool
    """Whether there are unconditional rows."""
    image: Tensor | None
    """Pictures [P, 3, H, W] or latents [P, C, h, w] to begin with."""
    controls: tuple[ControlInput, ...]
    """What the control networks follow."""
    perturbed: tuple[int, ...]
    """Blocks whose self-attention is perturbed."""

    @property
    def encodes(self) -> bool:
        """Whether there are pictures to encode; latents need none."""
        given = (self.image, *(control.picture for control in self.controls))
        return any(picture is not None and not is_latent(picture, self.shape[1]) for picture in given)


class DrawingPipeline(LoraMixin, PromptPipeline):
    """A pipeline that draws; subclasses hold documented signatures, and say what is special about their models."""

    embeds_guidance: ClassVar[bool] = False
    """Whether the models take the guidance scale as an input, as SANA-Sprint's do, and so have no negative prompt."""
    output_class: ClassVar[type[ImagePipelineOutput]] = SanaPipelineOutput

    _guidance_scale: float = 1.0
    _attention_kwargs: Mapping[str, Any] | None = None
    _num_timesteps: int = 0
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def attention_kwargs(self) -> Mapping[str, Any] | None:
        """`attention_kwargs` of the current or last call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run was told to stop; a callback sets `_interrupt`, and what is there by then is decoded."""
        return self._interrupt

    @torch.no_grad()
    def _draw(self, call: Call) -> Any:
        """Carry out a documented call, stage after stage: check, read the text, encode, denoise, decode."""
        job = self._checked(call)
        self._begin(job)
        with self.adapter_scale(call.attention_kwargs):
            final = self._denoised(job)
        with self._using("vae", when=call.output_type != "latent"):
            pictures = self._pictures(final, job)
        return self.output_class(images=pictures) if call.return_dict else (pictures,)

    def _denoised(self, job: Job) -> Tensor:
        """Read the text, encode pictures, and run the loop to its end."""
        call = job.call
        with full_memory_told(_NO_ROOM_FOR_TEXT), self._using("text_encoder", when=self._reads_text(call, job.guided)):
            positive, negative = self._conditions(call, job.guided)
        with full_memory_told(_NO_ROOM_FOR_PICTURES):
            image, controls = self._encoded(job)
        with full_memory_told(_NO_ROOM_FOR_STEPS), self._using("transformer", "controlnet"):
            plan = self._plan(job, positive, negative, image, controls)
            bridge = None
            if call.callback_on_step_end is not None:
                followed = [control.latents for control in controls]
                perturbed = bool(job.perturbed)
                bridge = CallbackBridge(
                    self, call, job.sampler, positive, negative, perturbed=perturbed, controls=followed
                )
            return self._denoise(plan, bridge)

    # Checks

    def _checked(self, call: Call) -> Job:
        """Read and check all arguments; nothing has been computed when one of them is refused."""
        self._check_parts(call)
        checks.check_call(call, self._callback_tensor_inputs)
        guided = call.guidance_scale > 1 and not self.embeds_guidance
        checks.check_text(call, guided=guided)
        if self._reads_text(call, guided):
            self.parts.require("tokenizer", "text_encoder")
        drawn = self._drawn_size(call)
        channels, factor = self.transformer.config.in_channels, self.vae_scale_factor
        controls: tuple[ControlInput, ...] = ()
        if "controlnet" in self.component_names:
            controls = read_controls(call, self.controlnet, drawn, channels, factor)
            drawn = pixels(controls[0].picture, channels, factor)
        shape = (call.rows, channels, drawn[0] // factor, drawn[1] // factor)
        checks.check_start(call.generator, call.latents, shape)
        image = None
        if call.image is not None and call.latents is None:
            image = read_images("image", call.image, drawn, channels)
            checks.check_image(image, call, shape)
        sampler = self._sampler(call)
        for control in controls:
            acting_steps(control.start, control.end, sampler.grid.num_steps)
        job = Job(
            call=call,
            drawn=drawn,
            shape=shape,
            sampler=sampler,
            guided=guided,
            image=image,
            controls=controls,
            perturbed=self._perturbed(call),
        )
        if job.encodes:
            self.parts.require("vae")
        return job

    def _check_parts(self, call: Call) -> None:
        checks.check_output(call.output_type)
        self.parts.require("transformer", "scheduler")
        checks.check_guidance_model(self.transformer, type(self).__name__, embeds=self.embeds_guidance)
        if call.output_type != "latent":
            self.parts.require("vae")
        if "controlnet" in self.component_names:
            self.parts.require("controlnet")

    def _drawn_size(self, call: Call) -> Size:
        """Return the size that is drawn, which binning may make another than the requested one."""
        height, width = call.height, call.width
        if not call.use_resolution_binning:
            card = self.parts.card
            check_known(card.name if card is not None else "", card.sizes if card is not None else None, height, width)
            return height, width
        drawn = nearest_bin(height, width, self.transformer.config.sample_size)
        told = cut_told(drawn, height, width)
        if told is not None:
            warnings.warn(told, stacklevel=5)
        return drawn

    def _perturbed(self, call: Call) -> tuple[int, ...]:
        """Return the blocks whose self-attention this call perturbs."""
        return ()

    def _begin(self, job: Job) -> None:
        """Set what the properties tell about the current call."""
        call = job.call
        self._guidance_scale = call.guidance_scale
        self._attention_kwargs = call.attention_kwargs
        self._num_timesteps = job.sampler.grid.num_steps
        self._interrupt = False

    # The five slots

    def _sampler(self, call: Call) -> SchedulerSampler:
        """Set the scheduler's timesteps, and make it a sampler of the loop."""
        if self.embeds_guidance:
            named = call.max_timesteps, call.intermediate_timesteps
            free = call.timesteps is None and sigma_data_of(self.scheduler) is not None
            kept = chosen(self.parts.angles, call.num_inference_steps, *named) if free else None
            set_angles(
                self.scheduler,
                call.num_inference_steps,
                device=self.device,
                timesteps=call.timesteps if kept is None else kept,
                max_timesteps=call.max_timesteps,
                intermediate_timesteps=call.intermediate_timesteps,
            )
        else:
            set_timesteps(
                self.scheduler,
                call.num_inference_steps,
                device=self.device,
                timesteps=call.timesteps,
                sigmas=call.sigmas,
            )
        strength = 1.0 if call.strength is None else call.strength
        # Given latents are the state at the level that the documented count begins at.
        begin = begin_at(self.scheduler, strength, device=self.device, between=call.latents is None)
        clock = 1 if self.embeds_guidance else NUM_TRAIN_TIMESTEPS
        return SchedulerSampler(self.scheduler, call.generator, begin, clock)

    def _encoded(self, job: Job) -> tuple[Tensor | None, tuple[Control, ...]]:
        """Encode the picture to begin with, and those to follow."""
        channels = job.shape[1]
        with self._using("vae", when=job.encodes):
            image = job.image
            if image is not None and not is_latent(image, channels):
                image = encode_picture(self.vae, image)
            return image, tuple(one.encoded(self.vae, channels) for one in job.controls)

    def _start(self, job: Job, image: Tensor | None) -> Tensor:
        """Return the first state in flow coordinates: noise, given latents, or a noised picture."""
        call, sampler = job.call, job.sampler
        sigma = sampler.grid.sigmas[0].item()
        if call.latents is not None:
            latents = call.latents.to(self.device, torch.float32)
            # As documented, image-to-image takes latents as they are, in the scheduler's own coordinates.
            return sampler.first(latents) if call.strength is None else sampler.flow(latents, sigma)
        noise = draw_noise(job.shape, call.generator, device=self.device)
        if image is None:
            return sampler.first(noise)
        return interpolate(for_rows(image, call.batch_size, call.rows).to(noise), noise, sigma)

    def _plan(
        self,
        job: Job,
        positive: Condition,
        negative: Condition | None,
        image: Tensor | None,
        controls: tuple[Control, ...],
    ) -> Plan:
        """Fill the loop's five slots."""
        call, sampler = job.call, job.sampler
        groups = [condition for condition in (negative, positive) if condition is not None]
        return Plan(
            sampler=sampler,
            latents=self._start(job, image),
            predictor=Predictor(
                self.transformer,
                sampler.grid.timesteps,
                Captions.stack(groups, call.images).trimmed(),
                guidance=call.guidance_scale if self.embeds_guidance else None,
                perturbed_layers=job.perturbed,
                controls=controls,
            ),
            guidance=call.guidance_scale if job.guided else 1.0,
            pag_scale=call.pag_scale if job.perturbed else 0.0,
            pag_adaptive_scale=call.pag_adaptive_scale,
        )

    def _denoise(self, plan: Plan, bridge: CallbackBridge | None) -> Tensor:
        """Run the loop with progress bar and callback until it ends or `_interrupt` is set."""
        latents = plan.latents
        reply: Change | None = None
        total = plan.sampler.grid.num_steps
        with contextlib.closing(denoise(plan)) as loop, self.progress_bar(total=total) as progress:
            while not self._interrupt:
                try:
                    step = loop.send(reply)
                except StopIteration:
                    break
                reply = bridge(step) if bridge is not None else None
                latents = step.latents if reply is None or reply.latents is None else reply.latents
                if self.embeds_guidance:
                    latents = step.x0  # as documented, whatever a callback makes of the state
                progress.update()
        return latents

    def _pictures(self, latents: Tensor, job: Job) -> Any:
        """Decode, resize and convert the final latents."""
        call = job.call
        if call.output_type == "latent":
            check_finite(latents, "latents")
            return latents
        size = (call.height, call.width) if call.use_resolution_binning else job.drawn
        made = decode_to(
            lambda images: to_pictures(resize_and_crop(images, *size), str(call.output_type)), self.vae, latents
        )
        if call.output_type == "pil":
            return [picture for batch in made for picture in batch]
        return torch.cat(made) if call.output_type == "pt" else np.concatenate(made)


_NO_ROOM_FOR_TEXT = (
    "The memory is full: the prompts cannot be encoded. Give fewer of them, lower `max_sequence_length`, or load the"
    " text encoder in bfloat16."
)
_NO_ROOM_FOR_PICTURES = (
    "The memory is full: the given pictures cannot be encoded. Give fewer of them, or ask for a smaller size."
)
_NO_ROOM_FOR_STEPS = (
    "The memory is full: the pictures cannot be denoised. Ask for fewer at once (`num_images_per_prompt`, prompts), for"
    " a smaller `height` and `width`, or take a smaller model."
)
