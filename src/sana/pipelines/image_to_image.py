"""`SanaSprintImg2ImgPipeline`: the documented image-to-image call of SANA-Sprint."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.pipelines.call import Call, Callback, taken
from sana.pipelines.drawing import Job
from sana.pipelines.output import SanaPipelineOutput
from sana.pipelines.pictures import ImageInput
from sana.pipelines.sprint import EmbeddedGuidancePipeline
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION


class SanaSprintImg2ImgPipeline(EmbeddedGuidancePipeline):
    """Image to image with SANA-Sprint, with the documented interface.

    pipe = SanaSprintImg2ImgPipeline.from_pretrained("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers")
    image = pipe("a cute pink bear", image=load_image("penguin.png"), strength=0.5).images[0]
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = 1.57080,
        intermediate_timesteps: float | None = 1.3,
        guidance_scale: float = 4.5,
        image: ImageInput | None = None,
        strength: float = 0.6,
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
        """Draw pictures; arguments that are not named here are those of `SanaSprintPipeline.__call__`.

        Args:
            image: one picture for all, one for each prompt, or as many as divide the number of pictures: PIL images,
                arrays, tensors (0 to 1, or -1 to 1), or latents as `output_type="latent"` returns them. It is resized
                to what is drawn.
            strength: how far to go from it, 0 to 1. The last `strength` of the steps are done, as in the reference;
                where that would be all of them, the first begins at an angle between the first two, so that only 1
                ignores the picture.
            latents: the noised picture itself in TrigFlow coordinates, with data of standard deviation 0.5; `image` is
                not needed then.
        """
        drawn: SanaPipelineOutput | tuple[Any] = self._draw(taken(locals()))
        return drawn

    def _checked(self, call: Call) -> Job:
        if call.strength is None:  # in the table of arguments it stands for a call that is no image-to-image
            raise InvalidInput("The value of strength should in [0.0, 1.0] but is None")
        return super()._checked(call)
