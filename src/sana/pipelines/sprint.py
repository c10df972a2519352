"""`SanaSprintPipeline`: the documented text-to-image call of SANA-Sprint, in one step or a few.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sana.pipelines.call import Callback, TextInputs, taken
from sana.pipelines.drawing import DrawingPipeline
from sana.pipelines.output import SanaPipelineOutput
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


class EmbeddedGuidancePipeline(DrawingPipeline):
    """A pipeline whose models take the guidance scale as an input: one pass, no negative prompt."""

    embeds_guidance = True
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds")

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings [R, T, E] and mask [R, T] of the prompts, in the order p0 p0 p1 p1; see `SanaPipeline`."""
        text = TextInputs(prompt=prompt, prompt_embeds=prompt_embeds, prompt_attention_mask=prompt_attention_mask)
        (prompt_embeds, prompt_attention_mask), _ = self._encoded_prompts(
            text,
            False,
            num_images_per_prompt,
            device,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )
        return prompt_embeds, prompt_attention_mask


class SanaSprintPipeline(EmbeddedGuidancePipeline):
    """Text to image in one step or a few with SANA-Sprint (arXiv 2503.09641), with the documented interface.

    pipe = SanaSprintPipeline.from_pretrained("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers")
    image = pipe("a tiny astronaut hatching from an egg on the moon", num_inference_steps=1).images[0]
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = 1.57080,
        intermediate_timesteps: float | None = 1.3,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int = 1024,
        width: int = 1024,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
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
        """Draw pictures; arguments that are not named here are those of `SanaPipeline.__call__`, as are the errors.

        Args:
            num_inference_steps: 1 to 4 are usual.
            timesteps: the run's own angles, falling, one more than there are steps; `max_timesteps` is then left out.
            max_timesteps: angle of the first step; 1.5708 is pure noise.
            intermediate_timesteps: angle between the two steps of a run of two; its default is passed over elsewhere.
            guidance_scale: an input of the network, which was trained with 4 to 5; it costs no second pass.
            latents: the start noise [R, C, h, w], of standard deviation 1.
            callback_on_step_end: is shown latents in TrigFlow coordinates, with data of standard deviation 0.5; the
                picture comes from the last prediction, whatever the last call returns.
        """
        drawn: SanaPipelineOutput | tuple[Any] = self._draw(taken(locals()))
        return drawn
