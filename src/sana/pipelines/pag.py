"""`SanaPAGPipeline`: the documented text-to-image call with perturbed-attention guidance."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sana.engine.values import check_text
from sana.errors import InvalidInput
from sana.models.linear_dit import pag_layers
from sana.pipelines.call import Call, Callback, TextInputs, taken
from sana.pipelines.guided import GuidedPipeline
from sana.pipelines.output import ImagePipelineOutput
from sana.pipelines.prompts import Condition
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

MAX_PATTERN = 100
"""Longest name or regular expression of a layer, in characters."""


class SanaPAGPipeline(GuidedPipeline):
    """Text to image, guided away from what the network draws without self-attention (arXiv 2403.17377).

    pipe = SanaPAGPipeline.from_pretrained("...", pag_applied_layers="transformer_blocks.8")
    image = pipe("a cyberpunk cat", pag_scale=2.0).images[0]
    """

    output_class = ImagePipelineOutput
    option_names: ClassVar[tuple[str, ...]] = ("pag_applied_layers",)

    _pag_scale: float = 0.0
    _pag_adaptive_scale: float = 0.0

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        pag_applied_layers: str | list[str] = "transformer_blocks.0",
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.set_pag_applied_layers(pag_applied_layers)

    def set_pag_applied_layers(self, pag_applied_layers: str | list[str], pag_attn_processors: Any = None) -> None:
        """Choose the blocks whose self-attention is perturbed: names or regular expressions, one or a list.

        "transformer_blocks.8", ["blocks.0", "blocks.1"] and "blocks.(0|1)" are possible; a number is a whole one, so
        that "blocks.1" is not block 10. `pag_attn_processors` is accepted; there are no processors here.

        Raises:
            InvalidInput: something else than a string or a list of them. Whether the blocks are there is looked at in
                the call, when the model is known.
        """
        layers = list(pag_applied_layers) if isinstance(pag_applied_layers, list | tuple) else [pag_applied_layers]
        for layer in layers:
            if not isinstance(layer, str):
                raise InvalidInput(f"Expected either a string or a list of string but got type {type(layer)}")
            check_text("pag_applied_layers", layer, MAX_PATTERN)
        self.pag_applied_layers: list[str] = layers

    @property
    def pag_scale(self) -> float:
        """Scale of perturbed-attention guidance of the current or last call."""
        return self._pag_scale

    @property
    def pag_adaptive_scale(self) -> float:
        """By how much that scale falls with each timestep below 1000, in the current or last call."""
        return self._pag_adaptive_scale

    @property
    def do_pag_adaptive_scaling(self) -> bool:
        """Whether the scale falls over the run."""
        return self._pag_adaptive_scale > 0 and self.do_perturbed_attention_guidance

    @property
    def do_perturbed_attention_guidance(self) -> bool:
        """Whether the scale of the current or last call perturbs."""
        return self._pag_scale > 0 and len(self.pag_applied_layers) > 0

    @property
    def pag_attn_processors(self) -> Mapping[str, str]:
        """The self-attentions that `pag_applied_layers` name, under the documented names, with what happens there."""
        if not self.pag_applied_layers:
            return {}
        return {
            f"transformer_blocks.{i}.attn1.processor": "perturbed rows skip the attention"
            for i in pag_layers(self.transformer, self.pag_applied_layers)
        }

    def encode_prompt(  # type: ignore[override]  # documented without `lora_scale`
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
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return embeddings and masks as `SanaPipeline.encode_prompt`, but in the dtype of the transformer.

        Negative prompts get the length of the given `prompt_embeds`, if there are such.
        """
        prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
            super().encode_prompt(
                prompt,
                do_classifier_free_guidance,
                negative_prompt,
                num_images_per_prompt,
                device,
                prompt_embeds,
                negative_prompt_embeds,
                prompt_attention_mask,
                negative_prompt_attention_mask,
                clean_caption,
                max_sequence_length,
                complex_human_instruction,
            )
        )
        if self.transformer is not None:
            prompt_embeds = prompt_embeds.to(self.transformer.dtype)
            if negative_prompt_embeds is not None:
                negative_prompt_embeds = negative_prompt_embeds.to(self.transformer.dtype)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

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
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        pag_scale: float = 3.0,
        pag_adaptive_scale: float = 0.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures; all arguments but these are those of `SanaPipeline.__call__`, as are the errors.

        Args:
            pag_scale: how strongly to keep away from what is drawn without self-attention; 0 is off.
            pag_adaptive_scale: by how much the scale falls with each timestep below 1000; 0 keeps it.

        Raises:
            InvalidInput: moreover, no block has the name of one of `pag_applied_layers` (a ValueError).
        """
        drawn: ImagePipelineOutput | tuple[Any] = self._draw(taken(locals()))
        return drawn

    def _perturbed(self, call: Call) -> tuple[int, ...]:
        self._pag_scale, self._pag_adaptive_scale = call.pag_scale, call.pag_adaptive_scale
        return pag_layers(self.transformer, self.pag_applied_layers) if self.do_perturbed_attention_guidance else ()

    def _negative(self, text: TextInputs, limit: int, clean_caption: bool) -> Condition:
        given = text.prompt_embeds
        return super()._negative(text, limit if given is None else given.shape[1], clean_caption)
