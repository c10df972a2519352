"""`SanaControlNetPipeline`: the documented text-to-image call with control networks."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sana.pipelines.call import Callback, taken
from sana.pipelines.guided import GuidedPipeline
from sana.pipelines.output import SanaPipelineOutput
from sana.pipelines.pictures import ImageInput
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


class SanaControlNetPipeline(GuidedPipeline):
    """Text to image that follows a picture of edges, depth or the like, with the documented interface.

    controlnet = SanaControlNetModel.from_pretrained("ishan24/Sana_600M_1024px_ControlNet_diffusers")
    pipe = SanaControlNetPipeline.from_pretrained("...", controlnet=controlnet)
    image = pipe("a cat", control_image=load_image("edges.png")).images[0]
    """

    model_cpu_offload_seq: ClassVar[str] = "text_encoder->controlnet->transformer->vae"
    component_names: ClassVar[tuple[str, ...]] = (
        *("tokenizer", "text_encoder", "vae", "transformer"),
        *("controlnet", "scheduler"),
    )
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (
        *("latents", "control_image"),
        *("prompt_embeds", "negative_prompt_embeds"),
    )

    def __init__(
        self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, controlnet: Any, scheduler: Any
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.parts.controlnet = controlnet

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
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
        *,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
    ) -> SanaPipelineOutput | tuple[Any]:
        """Draw pictures; arguments that are not named here are those of `SanaPipeline.__call__`, as are the errors.

        Args:
            control_image: what to follow: one picture for all, or one for each prompt; PIL images and arrays are
                resized to what is drawn, a tensor [P, 3, H, W] from -1 to 1 and latents as `output_type="latent"`
                returns them are taken as they are and say what size is drawn. With a list of control networks, a list
                with an entry for each.
            controlnet_conditioning_scale: strength of the control; a list has one for each control network, or for
                each picture that is drawn if there is a single network.
            control_guidance_start, control_guidance_end: share of the steps in which the control acts, for all control
                networks or one for each.
        """
        drawn: SanaPipelineOutput | tuple[Any] = self._draw(taken(locals()))
        return drawn
