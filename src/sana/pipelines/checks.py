"""The checks of a documented call, made before anything is computed. The wording of the documented errors is kept.

Shapes: B prompts, n images per prompt, T text length, E text width, C h w latents.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Generator, Tensor

from sana.engine.images import check_output_type
from sana.engine.request import MAX_SIDE, MAX_STEPS, shown
from sana.engine.resolution import check_step
from sana.errors import InvalidInput
from sana.flow.schedules import MAX_ANGLE
from sana.pipelines.call import Call, TextInputs

MAX_IMAGES = 10_000
MAX_SCALE = 1e6
MAX_LENGTH = 8192
"""Longest prompt in tokens: what a Gemma-2 model can read."""


def check_counts(most: int, **values: Any) -> None:
    """Raise InvalidInput, naming the argument, unless each is a whole number from 1 to `most`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInput(f"`{name}` has to be a whole number of at least 1 but is {shown(value)}.")
        if value > most:
            raise InvalidInput(f"`{name}` has to be at most {most} but is {shown(value)}.")


def check_text(text: TextInputs, *, guided: bool) -> None:
    """Raise InvalidInput for text arguments that are missing, contradict each other or do not fit together."""
    _check_prompt(text)
    _check_negative(text, guided=guided)
    _check_embeds(text)


def _check_prompt(text: TextInputs) -> None:
    if text.prompt is not None and text.prompt_embeds is not None:
        raise InvalidInput(
            f"Cannot forward both `prompt`: {_plain(text.prompt)} and `prompt_embeds`:"
            f" {shown(text.prompt_embeds)}. Please make sure to only forward one of the two."
        )
    if text.prompt is None and text.prompt_embeds is None:
        raise InvalidInput(
            "Provide either `prompt` or `prompt_embeds`. Cannot leave both `prompt` and `prompt_embeds` undefined."
        )
    if text.prompt is not None:
        _check_strings("prompt", text.prompt)


def _plain(value: object) -> str:
    """Return text as the documented messages have it, without quotes, but not all of a long one."""
    return value[:60] if isinstance(value, str) else shown(value)


def _check_strings(name: str, value: Any) -> None:
    if not isinstance(value, str | list):
        raise InvalidInput(f"`{name}` has to be of type `str` or `list` but is {type(value)}")
    if isinstance(value, list) and not value:
        raise InvalidInput(f"`{name}` is an empty list. Give at least one text.")
    for item in value if isinstance(value, list) else ():
        if not isinstance(item, str):
            raise InvalidInput(f"`{name}` has to be a list of `str` but holds a {type(item)}.")


def _check_negative(text: TextInputs, *, guided: bool) -> None:
    for name in ("prompt", "negative_prompt"):
        given = getattr(text, name)
        if given is not None and text.negative_prompt_embeds is not None:
            raise InvalidInput(
                f"Cannot forward both `{name}`: {_plain(given)} and `negative_prompt_embeds`:"
                f" {shown(text.negative_prompt_embeds)}. Please make sure to only forward one of the two."
            )
    negative = text.negative_prompt
    if negative is None:
        return
    _check_strings("negative_prompt", negative)
    if isinstance(negative, list) and len(negative) != text.batch_size:
        raise InvalidInput(
            f"`negative_prompt` has {len(negative)} entries but there are {text.batch_size} prompts. Give one for each,"
            " or a single text for all."
        )
    if not guided and any(text.negative_prompts):
        warnings.warn("`negative_prompt` is ignored because guidance_scale is not above 1.", stacklevel=4)


def _check_embeds(text: TextInputs) -> None:
    for name in ("prompt", "negative_prompt"):
        embeds, mask = getattr(text, f"{name}_embeds"), getattr(text, f"{name}_attention_mask")
        if embeds is None:
            continue
        if mask is None:
            raise InvalidInput(f"Must provide `{name}_attention_mask` when specifying `{name}_embeds`.")
        for kind, tensor in (("embeds", embeds), ("attention_mask", mask)):
            check_tensor(f"{name}_{kind}", tensor)
        if embeds.ndim != 3 or mask.shape != embeds.shape[:2]:
            raise InvalidInput(
                f"`{name}_embeds` must be [B, T, E] and `{name}_attention_mask` [B, T], but got {tuple(embeds.shape)}"
                f" and {tuple(mask.shape)}. Pass the two as `encode_prompt` returns them."
            )
    for kind in ("embeds", "attention_mask"):
        ours, other = getattr(text, f"prompt_{kind}"), getattr(text, f"negative_prompt_{kind}")
        both = text.prompt_embeds is not None and text.negative_prompt_embeds is not None
        if both and ours.shape != other.shape:
            names = f"`prompt_{kind}` and `negative_prompt_{kind}`"
            raise InvalidInput(
                f"{names} must have the same shape when passed directly, but got: `prompt_{kind}` {ours.shape} !="
                f" `negative_prompt_{kind}` {other.shape}."
            )


def check_tensor(name: str, value: Any) -> None:
    """Raise InvalidInput unless a value is a tensor."""
    if not isinstance(value, Tensor):
        raise InvalidInput(f"`{name}` has to be a `torch.Tensor` but is {shown(value)}.")


def check_call(call: Call, callback_tensors: Sequence[str]) -> None:
    """Raise InvalidInput, naming the argument, for a value that no picture can be made with; texts are looked at apart.

    Args:
        callback_tensors: what the pipeline can show a callback.
    """
    for name in ("return_dict", "clean_caption", "use_resolution_binning"):
        _check_switch(name, getattr(call, name))
    check_counts(MAX_STEPS, num_inference_steps=call.num_inference_steps)
    check_counts(MAX_IMAGES, num_images_per_prompt=call.images)
    _check_scale("guidance_scale", call.guidance_scale)
    for name in ("pag_scale", "pag_adaptive_scale"):
        _check_scale(name, getattr(call, name), least=0)
    _check_angle("max_timesteps", call.max_timesteps)
    _check_angle("intermediate_timesteps", call.intermediate_timesteps)
    _check_eta(call.eta)
    check_counts(MAX_LENGTH, max_sequence_length=call.max_sequence_length)
    if call.attention_kwargs is not None and not isinstance(call.attention_kwargs, Mapping):
        raise InvalidInput(f"`attention_kwargs` has to be a mapping but is {shown(call.attention_kwargs)}.")
    if call.callback_on_step_end is not None and not callable(call.callback_on_step_end):
        raise InvalidInput(f"`callback_on_step_end` has to be a function but is {shown(call.callback_on_step_end)}.")
    _check_strength(call)
    _check_size(call)
    _check_callback_tensors(call.callback_names, callback_tensors)


def _check_switch(name: str, value: Any) -> None:
    """Refuse what is neither true nor false, nor the 0, 1 or None of old callers."""
    if value is not None and not (isinstance(value, int) and value in (0, 1)):
        raise InvalidInput(f"`{name}` has to be True or False but is {shown(value)}.")


def _check_scale(name: str, value: Any, least: float = -MAX_SCALE) -> None:
    if not _is_number(value, least, MAX_SCALE):
        wanted = "a finite number, at most a million," if least else "a number from 0 to a million"
        raise InvalidInput(f"`{name}` has to be {wanted} but is {shown(value)}.")


def _check_angle(name: str, value: Any) -> None:
    if value is not None and not _is_number(value, 1e-3, MAX_ANGLE):
        raise InvalidInput(f"`{name}` has to be an angle from 0.001 to {MAX_ANGLE} but is {shown(value)}.")


def _is_number(value: Any, least: float, most: float) -> bool:
    # No number is between NaN and anything.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _check_eta(eta: Any) -> None:
    if not isinstance(eta, int | float):
        raise InvalidInput(f"`eta` has to be a number but is {shown(eta)}.")
    if eta:
        warnings.warn("`eta` is ignored: no scheduler of SANA takes it.", stacklevel=6)


def _check_strength(call: Call) -> None:
    """Check what image-to-image needs; a call without a strength is none."""
    if call.strength is None:
        return
    if not _is_number(call.strength, 0, 1):
        raise InvalidInput(f"The value of strength should in [0.0, 1.0] but is {shown(call.strength)}")
    if call.image is None and call.latents is None:
        raise InvalidInput("`image` is missing. Give the picture to begin with, or its noised `latents`.")
    if call.image is not None and call.latents is not None:
        warnings.warn("`image` is ignored: the run begins with the given `latents`.", stacklevel=6)


def _check_size(call: Call) -> None:
    """Refuse sides that cannot be drawn; without binning they must be multiples of 32."""
    check_counts(MAX_SIDE, height=call.height, width=call.width)
    if not call.use_resolution_binning:
        check_step(call.height, call.width)


def _check_callback_tensors(wanted: Any, known: Sequence[str]) -> None:
    if not isinstance(wanted, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in wanted):
        raise InvalidInput(f"`callback_on_step_end_tensor_inputs` has to be a list of names but is {shown(wanted)}.")
    bad = [name[:60] for name in wanted if name not in known]
    if bad:
        raise InvalidInput(f"`callback_on_step_end_tensor_inputs` has to be in {list(known)}, but found {bad}")


def check_output(output_type: Any) -> None:
    """Raise InvalidInput for an unknown output type."""
    check_output_type(output_type[:60] if isinstance(output_type, str) else shown(output_type))


def check_guidance_model(transformer: Any, pipeline: str, *, embeds: bool) -> None:
    """Raise InvalidInput, naming the right class, for a model of the other kind than the pipeline is for.

    Args:
        embeds: whether the pipeline is for models that take the guidance scale as an input.
    """
    if transformer.config.guidance_embeds and not embeds:
        raise InvalidInput(
            f"This checkpoint is a SANA-Sprint model, which embeds its guidance; {pipeline} cannot run it. Use"
            " SanaSprintPipeline, or SanaSprintImg2ImgPipeline to begin with a picture."
        )
    if embeds and not transformer.config.guidance_embeds:
        raise InvalidInput(
            f"This checkpoint is no SANA-Sprint model: it does not embed its guidance, which {pipeline} relies on. Use"
            " SanaPipeline."
        )


def check_image(image: Tensor, call: Call, shape: tuple[int, int, int, int]) -> None:
    """Raise InvalidInput for pictures or latents to begin with that do not fit the R latents (R, C, h, w)."""
    if len(image) > call.rows or call.rows % len(image):
        raise InvalidInput(f"Cannot duplicate `image` of batch size {len(image)} to {call.rows} text prompts.")
    if image.shape[1] == shape[1] and image.shape[-2:] != shape[-2:]:
        raise InvalidInput(
            f"`image` holds latents of {list(image.shape[-2:])}, but this call draws {list(shape[-2:])}. Ask for their"
            " size, without resolution binning, or give pictures."
        )


def check_start(generator: Any, latents: Tensor | None, expected: tuple[int, int, int, int]) -> None:
    """Raise InvalidInput for start latents of another shape, and for generators of another type or number."""
    for one in generator if isinstance(generator, list | tuple) else [generator]:
        if not isinstance(one, Generator) and generator is not None:
            raise InvalidInput(
                f"`generator` has to be a `torch.Generator` or a list of them but is {shown(generator)}. For a seed"
                " write `torch.Generator().manual_seed(seed)`."
            )
    if latents is not None:
        check_tensor("latents", latents)
    if latents is not None and tuple(latents.shape) != expected:
        raise InvalidInput(
            f"`latents` has shape {tuple(latents.shape)} but this call needs {expected}. Give one row per image and the"
            " size of the drawn picture divided by 32; with resolution binning that is the size of the bin."
        )
    if isinstance(generator, list | tuple) and len(generator) != expected[0]:
        raise InvalidInput(
            f"You have passed a list of generators of length {len(generator)}, but requested an effective batch size of"
            f" {expected[0]}. Make sure the batch size matches the length of the generators."
        )
