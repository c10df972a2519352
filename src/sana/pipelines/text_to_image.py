"""`SanaPipeline`: the documented text-to-image call, translated into a plan of the engine.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width, C h w latents, H W pixels.
"""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sana.engine.decode import decode_to, full_memory_told
from sana.engine.generate import Change, Plan, denoise
from sana.engine.images import check_finite, check_output_type, resize_and_crop, to_pictures
from sana.engine.predictor import Captions, Predictor
from sana.engine.request import shown
from sana.engine.resolution import check_known, cut_told, nearest_bin
from sana.errors import InvalidInput
from sana.flow.adapter import SchedulerSampler, set_timesteps
from sana.flow.path import draw_noise
from sana.pipelines import checks
from sana.pipelines.base import Pipeline
from sana.pipelines.checks import TextInputs
from sana.pipelines.output import SanaPipelineOutput
from sana.pipelines.prompts import Callback, CallbackBridge, Condition, encode, lengthened, repeated
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


class SanaPipeline(Pipeline):
    """Text to image with SANA (arXiv 2410.10629), with the documented interface.

    pipe = SanaPipeline.from_pretrained("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", variant="bf16")
    image = pipe("a cyberpunk cat").images[0]
    """

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    _guidance_scale: float = 1.0
    _attention_kwargs: Mapping[str, Any] | None = None
    _num_timesteps: int = 0
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that scale guides, which it does above 1."""
        return self._guidance_scale > 1.0

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
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return embeddings [R, T, E] and mask [R, T] of the prompts, then those of the negative prompts or None twice.

        T is `max_sequence_length`; masked rows are zero. With several prompts and several images per prompt, embeddings
        and masks both come in the order p0 p0 p1 p1. `lora_scale` is accepted; there are no adapters of text encoders.

        Raises:
            InvalidInput: the text arguments contradict each other.
        """
        text = TextInputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        checks.check_text(text, guided=do_classifier_free_guidance)
        checks.check_counts(checks.MAX_LENGTH, max_sequence_length=max_sequence_length)
        positive = self._positive(text, complex_human_instruction, max_sequence_length, clean_caption)
        place = device if device is not None else self.device
        prompt_embeds, prompt_attention_mask = (
            tensor.to(place) for tensor in repeated(positive, num_images_per_prompt)
        )
        negative_prompt_embeds = negative_prompt_attention_mask = None
        if do_classifier_free_guidance:
            negative = repeated(self._negative(text, max_sequence_length, clean_caption), num_images_per_prompt)
            negative_prompt_embeds, negative_prompt_attention_mask = (tensor.to(place) for tensor in negative)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _positive(
        self, text: TextInputs, instruction: Sequence[str] | None, limit: int, clean_caption: bool
    ) -> Condition:
        """Return the prompts' embeddings in their documented length, or those that were given."""
        if text.prompt_embeds is not None and text.prompt_attention_mask is not None:
            return text.prompt_embeds, text.prompt_attention_mask
        return lengthened(encode(self.parts, text.prompts, instruction, limit, clean_caption), limit)

    def _negative(self, text: TextInputs, limit: int, clean_caption: bool) -> Condition:
        """Return the negative prompts' embeddings in their documented length, or those that were given."""
        if text.negative_prompt_embeds is not None and text.negative_prompt_attention_mask is not None:
            return text.negative_prompt_embeds, text.negative_prompt_attention_mask
        return lengthened(encode(self.parts, text.negative_prompts, None, limit, clean_caption), limit)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int = 1024,
        width: int = 1024,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
    ) -> SanaPipelineOutput | tuple[Any]:
        """Draw pictures.

        Args:
            prompt: one text or a list of texts.
            negative_prompt: what not to draw; one text for all prompts or one for each. Ignored without guidance.
            num_inference_steps: number of denoising steps.
            timesteps: the run's own timesteps, falling, for schedulers that take them.
            sigmas: the run's own noise levels, falling, for schedulers that take them.
            guidance_scale: strength of classifier-free guidance; it acts above 1.
            num_images_per_prompt: pictures for each prompt, in the order p0 p0 p1 p1.
            height, width: size in pixels; any with binning, else multiples of 32.
            eta: ignored, as documented; a value other than 0 warns.
            generator: one, from which the whole batch is drawn at once, or a list with one for each picture.
            latents: the start noise [R, C, h, w] instead of drawn one.
            prompt_embeds, prompt_attention_mask: what `encode_prompt` returned, instead of `prompt`.
            negative_prompt_embeds, negative_prompt_attention_mask: likewise, with `negative_prompt=None`.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: whether to return a `SanaPipelineOutput` or a tuple.
            clean_caption: remove web clutter from the prompts; without its packages it is ignored with a warning.
            use_resolution_binning: draw at the nearest trained size, then resize and crop to the requested one.
            attention_kwargs: `{"scale": s}` is the strength of adapters; without adapters it is ignored with a warning.
            callback_on_step_end: called after each step as `callback(pipe, step, timestep, tensors)`; those in the
                dict that it returns replace the tensors of the run.
            callback_on_step_end_tensor_inputs: which tensors it is shown.
            max_sequence_length: longest prompt in tokens; the rest is not read, with a warning.
            complex_human_instruction: lines that tell the text encoder to enrich the prompt; None for none.

        Raises:
            InvalidInput: an argument is impossible or contradicts another (a ValueError); nothing was computed.
            NonFinite: latents or pictures contain NaN or infinity.
            OutOfMemory: the text or the steps need too much; or not even one tile can be decoded, and then the finished
                latents are on the error.
        """
        text = TextInputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        images = 1 if num_images_per_prompt is None else num_images_per_prompt
        self._check_parts(text, output_type)
        checks.check_switches(
            return_dict=return_dict, clean_caption=clean_caption, use_resolution_binning=use_resolution_binning
        )
        checks.check_numbers(num_inference_steps, guidance_scale, images, eta)
        checks.check_rest(max_sequence_length, attention_kwargs, callback_on_step_end)
        drawn = self._drawn_size(height, width, use_resolution_binning)
        checks.check_callback_tensors(names, self._callback_tensor_inputs)
        checks.check_text(text, guided=guidance_scale > 1)
        shape = self._latent_shape(text.batch_size * images, drawn)
        checks.check_start(generator, latents, shape)
        self._begin(guidance_scale, attention_kwargs)

        guided = self.do_classifier_free_guidance
        with full_memory_told(_NO_ROOM_FOR_TEXT):
            positive = self._positive(text, complex_human_instruction, max_sequence_length, clean_caption)
            negative = self._negative(text, max_sequence_length, clean_caption) if guided else None
        set_timesteps(self.scheduler, num_inference_steps, device=self.device, timesteps=timesteps, sigmas=sigmas)
        with full_memory_told(_NO_ROOM_FOR_STEPS):
            plan = self._plan(positive, negative, images, generator, latents, shape)
            bridge = None
            if callback_on_step_end is not None:
                bridge = CallbackBridge(self, callback_on_step_end, names, positive, negative, images)
            final = self._denoise(plan, bridge)
        pictures = self._pictures(final, output_type, (height, width) if use_resolution_binning else drawn)
        return SanaPipelineOutput(images=pictures) if return_dict else (pictures,)

    def _check_parts(self, text: TextInputs, output_type: str | None) -> None:
        check_output_type(output_type[:60] if isinstance(output_type, str) else shown(output_type))
        self.parts.require("transformer", "scheduler")
        if output_type != "latent":
            self.parts.require("vae")
        if text.prompt_embeds is None:
            self.parts.require("tokenizer", "text_encoder")
        if self.transformer.config.guidance_embeds:
            raise InvalidInput(
                "This checkpoint is a SANA-Sprint model, which embeds its guidance; SanaPipeline cannot run it."
                " Use sana.generate_images, which takes its own sampler."
            )

    def _drawn_size(self, height: int, width: int, binning: bool) -> tuple[int, int]:
        """Return the (height, width) that is drawn, which binning may make another than the requested one."""
        checks.check_size(height, width, binning=binning)
        if not binning:
            card = self.parts.card
            check_known(card.name if card is not None else "", card.sizes if card is not None else None, height, width)
            return height, width
        drawn = nearest_bin(height, width, self.transformer.config.sample_size)
        told = cut_told(drawn, height, width)
        if told is not None:
            warnings.warn(told, stacklevel=3)
        return drawn

    def _latent_shape(self, rows: int, drawn: tuple[int, int]) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return rows, self.transformer.config.in_channels, drawn[0] // factor, drawn[1] // factor

    def _begin(self, guidance_scale: float, attention_kwargs: Mapping[str, Any] | None) -> None:
        """Set what the properties tell about the current call."""
        if attention_kwargs:
            warnings.warn(
                f"`attention_kwargs` {shown(attention_kwargs)} is ignored: no adapter is loaded.", stacklevel=3
            )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False

    def _plan(
        self,
        positive: Condition,
        negative: Condition | None,
        images: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        shape: tuple[int, int, int, int],
    ) -> Plan:
        """Fill the loop's five slots; the scheduler has its timesteps by now."""
        sampler = SchedulerSampler(self.scheduler, generator)
        self._num_timesteps = sampler.grid.num_steps
        groups = [condition for condition in (negative, positive) if condition is not None]
        if latents is None:
            start = draw_noise(shape, generator, device=self.device)
        else:
            start = latents.to(self.device, torch.float32)
        return Plan(
            sampler=sampler,
            latents=start,
            predictor=Predictor(self.transformer, sampler.grid.timesteps, Captions.stack(groups, images).trimmed()),
            guidance=self._guidance_scale if negative is not None else 1.0,
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
                progress.update()
        return latents

    def _pictures(self, latents: Tensor, output_type: str | None, size: tuple[int, int]) -> Any:
        """Decode, resize and convert the final latents."""
        if output_type == "latent":
            check_finite(latents, "latents")
            return latents
        made = decode_to(
            lambda images: to_pictures(resize_and_crop(images, *size), str(output_type)), self.vae, latents
        )
        if output_type == "pil":
            return [picture for batch in made for picture in batch]
        return torch.cat(made) if output_type == "pt" else np.concatenate(made)


_NO_ROOM_FOR_TEXT = (
    "The memory is full: the prompts cannot be encoded. Give fewer of them, lower `max_sequence_length`, or load the"
    " text encoder in bfloat16."
)
_NO_ROOM_FOR_STEPS = (
    "The memory is full: the pictures cannot be denoised. Ask for fewer at once (`num_images_per_prompt`, prompts), for"
    " a smaller `height` and `width`, or take a smaller model."
)
