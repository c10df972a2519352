"""The checks of a documented call, made before anything is computed. The wording of the documented errors is kept.

Shapes: B prompts, n images per prompt, T text length, E text width, C h w latents.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from sana.engine.request import MAX_SIDE, MAX_STEPS, shown
from sana.engine.resolution import check_step
from sana.errors import InvalidInput

MAX_IMAGES = 10_000
MAX_SCALE = 1e6
MAX_LENGTH = 8192
"""Longest prompt in tokens: what a Gemma-2 model can read."""


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


def check_counts(most: int, **values: Any) -> None:
    """Raise InvalidInput, naming the argument, unless each is a whole number from 1 to `most`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidInput(f"`{name}` has to be a whole number of at least 1 but is {shown(value)}.")
        if value > most:
            raise InvalidInput(f"`{name}` has to be at most {most} but is {shown(value)}.")


def check_size(height: Any, width: Any, *, binning: bool) -> None:
    """Raise InvalidInput unless both sides can be drawn; without binning they must be multiples of 32."""
    check_counts(MAX_SIDE, height=height, width=width)
    if not binning:
        check_step(height, width)


def check_callback_tensors(wanted: Sequence[str], known: Sequence[str]) -> None:
    """Raise InvalidInput for a tensor that no callback can have."""
    if not isinstance(wanted, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in wanted):
        raise InvalidInput(f"`callback_on_step_end_tensor_inputs` has to be a list of names but is {shown(wanted)}.")
    bad = [name[:60] for name in wanted if name not in known]
    if bad:
        raise InvalidInput(f"`callback_on_step_end_tensor_inputs` has to be in {list(known)}, but found {bad}")


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


def check_numbers(num_inference_steps: Any, guidance_scale: Any, num_images_per_prompt: Any, eta: Any) -> None:
    """Raise InvalidInput for numbers no picture can be made with; warn about an `eta`, documented as ignored."""
    check_counts(MAX_STEPS, num_inference_steps=num_inference_steps)
    check_counts(MAX_IMAGES, num_images_per_prompt=num_images_per_prompt)
    number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if not number or not -MAX_SCALE <= guidance_scale <= MAX_SCALE:  # no number is between NaN and anything
        raise InvalidInput(
            f"`guidance_scale` has to be a finite number, at most a million, but is {shown(guidance_scale)}."
        )
    if not isinstance(eta, int | float):
        raise InvalidInput(f"`eta` has to be a number but is {shown(eta)}.")
    if eta:
        warnings.warn("`eta` is ignored: no scheduler of SANA takes it.", stacklevel=3)


def check_switches(**values: Any) -> None:
    """Raise InvalidInput, naming the argument, unless each is true or false, or the 0, 1 or None of old callers."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, int) and value in (0, 1)):
            raise InvalidInput(f"`{name}` has to be True or False but is {shown(value)}.")


def check_tensor(name: str, value: Any) -> None:
    """Raise InvalidInput unless a value is a tensor."""
    if not isinstance(value, Tensor):
        raise InvalidInput(f"`{name}` has to be a `torch.Tensor` but is {shown(value)}.")


def check_rest(max_sequence_length: Any, attention_kwargs: Any, callback: Any) -> None:
    """Raise InvalidInput for a length, adapter options or a callback of another kind."""
    check_counts(MAX_LENGTH, max_sequence_length=max_sequence_length)
    if attention_kwargs is not None and not isinstance(attention_kwargs, Mapping):
        raise InvalidInput(f"`attention_kwargs` has to be a mapping but is {shown(attention_kwargs)}.")
    if callback is not None and not callable(callback):
        raise InvalidInput(f"`callback_on_step_end` has to be a function but is {shown(callback)}.")


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
