"""Prompts to the documented embeddings, and the callback's view of them.

Shapes: B prompts, n images per prompt, R = B n images, T text length, E text width.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sana.engine.generate import Change
from sana.engine.parts import Parts
from sana.engine.predictor import Captions
from sana.engine.request import shown
from sana.errors import MissingDependency, did_you_mean
from sana.flow.samplers import Step

Condition = tuple[Tensor, Tensor]
"""Embeddings [B, T, E] and their mask [B, T]."""
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]


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


class CallbackBridge:
    """Shows a documented callback its tensors after each step, and turns what it returns into a change of the run.

    `prompt_embeds` is the tensor under guidance, [2 R, T, E] with the negative half first, as documented; returning
    only its positive half switches guidance off. A tensor changed in place counts as replaced. `negative_prompt_embeds`
    is read back without effect, as documented.
    """

    def __init__(
        self,
        pipeline: Any,
        callback: Callback,
        names: Sequence[str],
        positive: Condition,
        negative: Condition | None,
        num_images: int,
    ) -> None:
        self.pipeline = pipeline
        self.callback = callback
        self.names = names
        self.guided = negative is not None
        captions = Captions.stack([positive] if negative is None else [negative, positive])
        embeds, self.mask = repeated((captions.embeds, captions.mask), num_images)
        self.rows = len(positive[0]) * num_images
        self.tensors = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds[: self.rows] if self.guided else None}

    def __call__(self, step: Step) -> Change:
        """Call the callback after a step."""
        before = self.tensors["prompt_embeds"]
        assert before is not None
        version = before._version
        shown = {"latents": step.latents, **self.tensors}
        timestep = self.pipeline.scheduler.timesteps[step.index]
        arguments = {name: shown[name] for name in self.names}
        returned = self.callback(self.pipeline, step.index, timestep, arguments) or {}
        unknown = [name for name in returned if name not in shown]
        if unknown:
            hint = did_you_mean(str(unknown[0]), shown)
            warnings.warn(
                f"`callback_on_step_end` returned `{unknown[0]}`, which is ignored: no tensor has this name.{hint}",
                stacklevel=2,
            )
        latents = returned.get("latents", step.latents)
        self.tensors |= {name: returned[name] for name in self.tensors if name in returned}
        embeds = self.tensors["prompt_embeds"]
        assert embeds is not None
        replaced = embeds is not before or embeds._version != version
        unguided = replaced and self.guided and len(embeds) == self.rows
        return Change(
            latents=None if latents is step.latents else latents,
            captions=self._captions(embeds) if replaced else None,
            guidance=1.0 if unguided else None,
        )

    def _captions(self, embeds: Tensor) -> Captions:
        return Captions(embeds=embeds, mask=self.mask[-len(embeds) :], rows=tuple(range(len(embeds)))).trimmed()
