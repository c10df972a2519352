"""The arguments of the five documented calls in one table; an option that a product lacks keeps its neutral value.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width, C h w latents, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana.flow.schedules import MAX_ANGLE, MIDDLE_ANGLE
from sana.pipelines.pictures import ImageInput

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextInputs:
    """The text arguments of a call, as the caller gave them."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = ""
    prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of prompts B."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or ())

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list; empty when embeddings were given."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or ())

    @property
    def negative_prompts(self) -> list[str]:
        """One negative prompt per prompt; None stands for the empty one."""
        negative = self.negative_prompt
        return list(negative) if isinstance(negative, list) else [negative or ""] * self.batch_size


@dataclass(frozen=True, kw_only=True, eq=False)
class Call(TextInputs):
    """What a documented call was given; the fields have the names of its arguments, which explain them."""

    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int | None
    height: int
    width: int
    eta: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: Tensor | None
    output_type: str | None
    return_dict: bool
    clean_caption: bool
    use_resolution_binning: bool
    callback_on_step_end: Callback | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    max_sequence_length: int
    complex_human_instruction: Sequence[str] | None
    timesteps: Sequence[float] | Tensor | None = None
    sigmas: Sequence[float] | Tensor | None = None
    max_timesteps: float | None = MAX_ANGLE
    intermediate_timesteps: float | None = MIDDLE_ANGLE
    attention_kwargs: Mapping[str, Any] | None = None
    image: ImageInput | None = None
    strength: float | None = None
    control_image: ImageInput | None = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0

    @property
    def images(self) -> int:
        """Number of images per prompt n."""
        return 1 if self.num_images_per_prompt is None else self.num_images_per_prompt

    @property
    def rows(self) -> int:
        """Number of images R."""
        return self.batch_size * self.images

    @property
    def callback_names(self) -> Sequence[str]:
        """The tensors that the callback is shown; a callback object brings its own list."""
        names: Sequence[str] = getattr(
            self.callback_on_step_end, "tensor_inputs", self.callback_on_step_end_tensor_inputs
        )
        return names


def taken(arguments: Mapping[str, Any]) -> Call:
    """Return the call with the `locals()` of a documented `__call__`, taken before its first statement."""
    return Call(**{name: value for name, value in arguments.items() if name not in ("self", "__class__")})
