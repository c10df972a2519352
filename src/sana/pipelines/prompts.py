"""Prompts to the documented embeddings, and what all pipelines do to read them.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.engine.parts import Parts
from sana.engine.request import shown
from sana.errors import MissingDependency
from sana.pipelines import checks
from sana.pipelines.call import Call, TextInputs
from sana.pipelines.surface import DocumentedPipeline

Condition = tuple[Tensor, Tensor]
"""Embeddings [B, T, E] and their mask [B, T]."""


def encode(
    parts: Parts, prompts: Sequence[str], instruction: Sequence[str] | str | None, limit: int, clean_caption: bool
) -> Condition:
    """Encode prompts, no longer than the longest of them; warn about ends that found no room.

    Without the packages that `clean_caption` needs the prompts are only lower-cased and stripped, with a warning.
    """
    try:
        found = parts.prompts.encode(prompts, instruction, limit, clean_caption)
    except MissingDependency as error:
        warnings.warn(f"`clean_caption` is ignored: {error}", stacklevel=4)
        found = parts.prompts.encode(prompts, instruction, limit, clean_caption=False)
    for rest in filter(None, found.truncated):
        warnings.warn(
            f"The end of a prompt was not read because it exceeds {limit} tokens: {shown(rest)}", stacklevel=4
        )
    return found.embeds, found.mask


def lengthened(condition: Condition, length: int) -> Condition:
    """Append masked zero rows up to [B, `length`, E]."""
    embeds, mask = condition
    missing = max(0, length - mask.shape[1])
    return F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def repeated(condition: Condition, count: int) -> Condition:
    """Repeat each row in place, embeddings and mask alike: [B, ...] -> [B n, ...], p0 p0 p1 p1."""
    embeds, mask = condition
    return embeds.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)


class PromptPipeline(DocumentedPipeline):
    """A pipeline that reads prompts."""

    @staticmethod
    def _reads_text(text: TextInputs, guided: bool) -> bool:
        return text.prompt_embeds is None or (guided and text.negative_prompt_embeds is None)

    @torch.no_grad()
    def _encoded_prompts(
        self,
        text: TextInputs,
        guided: bool,
        num_images_per_prompt: int,
        device: torch.device | str | None,
        *,
        clean_caption: bool,
        max_sequence_length: int,
        complex_human_instruction: Sequence[str] | None,
    ) -> tuple[Condition, Condition | None]:
        """Check and encode the texts for `encode_prompt`, every row as often as there are images."""
        checks.check_text(text, guided=guided)
        checks.check_counts(checks.MAX_LENGTH, max_sequence_length=max_sequence_length)
        checks.check_counts(checks.MAX_IMAGES, num_images_per_prompt=num_images_per_prompt)
        place = device if device is not None else self.device
        with self._using("text_encoder", when=self._reads_text(text, guided)):
            positive = self._positive(text, complex_human_instruction, max_sequence_length, clean_caption)
            negative = self._negative(text, max_sequence_length, clean_caption) if guided else None

        def made(condition: Condition) -> Condition:
            embeds, mask = repeated(condition, num_images_per_prompt)
            return embeds.to(place), mask.to(place)

        return made(positive), None if negative is None else made(negative)

    def _conditions(self, call: Call, guided: bool) -> tuple[Condition, Condition | None]:
        """Return embeddings and mask of the prompts, and of the negative ones if they count."""
        settings = (call.max_sequence_length, call.clean_caption)
        positive = self._positive(call, call.complex_human_instruction, *settings)
        return positive, self._negative(call, *settings) if guided else None

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
