"""What the pipelines with classifier-free guidance share: its property, and `encode_prompt` with negative prompts.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sana.pipelines.call import TextInputs
from sana.pipelines.drawing import DrawingPipeline


class GuidedPipeline(DrawingPipeline):
    """A pipeline whose models are guided by a second, unconditional pass."""

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the scale of the current or last call guides, which it does above 1."""
        return self._guidance_scale > 1.0

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
        positive, negative = self._encoded_prompts(
            text,
            do_classifier_free_guidance,
            num_images_per_prompt,
            device,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
        )
        prompt_embeds, prompt_attention_mask = positive
        negative_prompt_embeds, negative_prompt_attention_mask = negative or (None, None)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask
