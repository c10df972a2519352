"""The documented callback's view of a run, and what it changes.

Shapes: R images, T text length, E text width, C h w latents.
"""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sana.engine.generate import Change
from sana.engine.predictor import Captions
from sana.errors import did_you_mean
from sana.flow.adapter import SchedulerSampler
from sana.flow.samplers import Step
from sana.pipelines.call import Call
from sana.pipelines.checks import check_tensor
from sana.pipelines.prompts import Condition, repeated


class CallbackBridge:
    """Shows a documented callback its tensors after each step, and turns what it returns into a change of the run.

    `latents` is the state in the scheduler's own coordinates, for SANA-Sprint TrigFlow's times sigma_data.
    `prompt_embeds` is the tensor under guidance, as documented: the negative rows if it guides, the R positive ones,
    and these again if attention is perturbed. Returning only positive rows switches guidance off. A tensor changed in
    place counts as replaced. As documented `negative_prompt_embeds` is read back without effect, `control_image` never.
    """

    def __init__(
        self,
        pipeline: Any,
        call: Call,
        sampler: SchedulerSampler,
        positive: Condition,
        negative: Condition | None,
        *,
        perturbed: bool = False,
        controls: Sequence[Tensor] = (),
    ) -> None:
        assert call.callback_on_step_end is not None
        self.pipeline = pipeline
        self.callback = call.callback_on_step_end
        self.names = call.callback_names
        self.sampler = sampler
        self.rows = call.rows
        self.guided = negative is not None
        groups = [positive] if negative is None else [negative, positive]
        captions = Captions.stack([*groups, positive] if perturbed else groups)
        embeds, self.mask = repeated((captions.embeds, captions.mask), call.images)
        self.tensors: dict[str, Any] = {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": embeds[: self.rows] if self.guided else None,
        }
        if controls:
            rows = self.rows * (2 if self.guided else 1)
            shown = [control.repeat(rows // len(control), 1, 1, 1) for control in controls]
            self.tensors["control_image"] = shown[0] if len(shown) == 1 else shown

    def __call__(self, step: Step) -> Change:
        """Call the callback after a step."""
        before = self.tensors["prompt_embeds"]
        latents = self.sampler.own(step.latents, step.sigma_next)
        versions = before._version, latents._version
        shown = {"latents": latents, **self.tensors}
        arguments = {name: shown[name] for name in self.names}
        returned = self.callback(self.pipeline, step.index, self.sampler.timestep(step.index), arguments) or {}
        self._check(returned, shown)
        state = returned.get("latents", latents)
        check_tensor("latents", state)
        moved = state is not latents or latents._version != versions[1]
        read_back = ("prompt_embeds", "negative_prompt_embeds")
        self.tensors |= {name: returned[name] for name in read_back if name in returned}
        embeds = self.tensors["prompt_embeds"]
        check_tensor("prompt_embeds", embeds)
        replaced = embeds is not before or embeds._version != versions[0]
        unguided = replaced and self.guided and len(embeds) == self.rows
        return Change(
            latents=self.sampler.flow(state, step.sigma_next) if moved else None,
            captions=self._captions(embeds) if replaced else None,
            guidance=1.0 if unguided else None,
        )

    def _check(self, returned: dict[str, Any], shown: dict[str, Any]) -> None:
        for name in returned:
            if name not in shown:
                hint = did_you_mean(str(name), shown)
                warnings.warn(
                    f"`callback_on_step_end` returned `{name}`, which is ignored: no tensor has this name.{hint}",
                    stacklevel=3,
                )
                return

    def _captions(self, embeds: Tensor) -> Captions:
        groups = 2 if self.guided else 1
        embeds = embeds[: groups * self.rows]  # perturbed rows read the positive rows' captions
        mask = self.mask[: groups * self.rows][-len(embeds) :]
        return Captions(embeds=embeds, mask=mask, rows=tuple(range(len(embeds)))).trimmed()
