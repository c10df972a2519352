"""`SanaPipeline`: the documented text-to-image call.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width, C h w latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sana.pipelines.call import Callback, taken
from sana.pipelines.guided import GuidedPipeline
from sana.pipelines.output import SanaPipelineOutput
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


class SanaPipeline(GuidedPipeline):
    """Text to image with SANA (arXiv 2410.10629), with the documented interface.

    pipe = SanaPipeline.from_pretrained("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", variant="bf16")
    image = pipe("a cyberpunk cat").images[0]
    """

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
        drawn: SanaPipelineOutput | tuple[Any] = self._draw(taken(locals()))
        return drawn
