"""The network as the loop sees it: `predict(x, i)`, with everything that does not change between steps computed once.

Shapes: B latents, R rows of captions (B, or 2 B under guidance: unconditional first), C H W latents, n steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sana.engine.captions import Captions as Captions
from sana.engine.captions import Text, padded
from sana.engine.compilation import is_compiled
from sana.engine.controls import Control as Control
from sana.engine.controls import ControlBranch, Residuals, add_up
from sana.errors import InvalidInput
from sana.models.linear_dit import Modulation

CPU_TEXT_MULTIPLE = 16
"""Captions are padded to a multiple of this on a CPU: its attention takes twice the time for lengths in between."""
COMPILED_TEXT_MULTIPLE = 64
"""Captions are padded to a multiple of this for compiled code, which is made for one length."""


class Predictor:
    """The guided loop's network: `predict(x, i, guided=...)` is one forward pass of the transformer at step i.

    Caption projection, the keys and values of all cross-attentions, the modulation of all steps and the embedded
    controls are computed when the captions are set, not per step.

    Args:
        transformer: a `LinearDiT`.
        timesteps: [n], as the sampler's grid holds them; the model's `timestep_scale` is applied here.
        captions: with 2 B rows, the B unconditional ones first, or with B rows.
        guidance: scale for models that embed it (SANA-Sprint), times `guidance_embeds_scale` here.
        perturbed_layers: blocks whose self-attention the perturbed rows skip (see `sana.models.linear_dit.pag_layers`).
        controls: control networks whose residuals are added up.

    Raises:
        InvalidInput: the transformer is of another kind, the captions are of another width than it was trained on, or a
            control network does not fit or would never act.
    """

    def __init__(
        self,
        transformer: Any,
        timesteps: Tensor,
        captions: Captions,
        *,
        guidance: float | None = None,
        perturbed_layers: Sequence[int] = (),
        controls: Sequence[Control] = (),
    ) -> None:
        for name in ("encode_caption", "cross_attention_kv", "modulation", "denoise"):
            if not hasattr(transformer, name):
                kind = type(transformer).__name__
                raise InvalidInput(f"The transformer is a {kind}, which has no `{name}`. Use a SanaTransformer2DModel.")
        self.transformer, self.perturbed_layers = transformer, tuple(perturbed_layers)
        weight = next(p for p in transformer.parameters() if p.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype
        config = transformer.config
        told = timesteps.to(self.device) * config.timestep_scale
        embedded = None
        if config.guidance_embeds and guidance is not None:
            # The published order: the scale is rounded to the captions' dtype before the factor.
            scale = torch.full_like(told, guidance, dtype=torch.float32).to(captions.embeds.dtype)
            embedded = scale * config.guidance_embeds_scale
        with torch.no_grad():
            self._modulation = transformer.modulation(told, embedded)
            self._controls = [ControlBranch(control, transformer, timesteps) for control in controls]
        self._read(captions)

    def use(self, captions: Captions) -> None:
        """Set the captions; unless they are the same object, what was computed from the previous ones is dropped."""
        if captions is not self.captions:
            self._read(captions)

    @torch.no_grad()
    def _read(self, captions: Captions) -> None:
        wanted, given = self.transformer.config.caption_channels, captions.embeds.shape[2]
        if given != wanted:
            raise InvalidInput(
                f"The prompt embeddings have width {given}, the transformer reads {wanted}. Use the text encoder of"
                " this model (without a language-model head), or embeddings made with it."
            )
        self.captions = captions
        if is_compiled(self.transformer):
            captions = padded(captions, COMPILED_TEXT_MULTIPLE)
        elif self.device.type == "cpu":
            captions = padded(captions, CPU_TEXT_MULTIPLE)
        self._text = Text.of(self.transformer, captions, self.device, self.dtype)
        self._text_again: dict[int, Text] = {}
        for control in self._controls:
            control.read(captions)

    def __call__(self, x: Tensor, i: int, *, guided: bool, perturbed: bool = False) -> Tensor:
        """Return velocities of latents [B, C, H, W] at step i, in groups of B rows.

        Unconditional rows come first if `guided`, then the conditional ones, then perturbed ones if `perturbed`.
        """
        batch, total = len(x), len(self.captions.rows)
        if total not in ((2 * batch,) if guided else (batch, 2 * batch)):
            raise InvalidInput(
                f"{total} caption rows do not fit {batch} latents. Give one per latent, or two with guidance."
            )
        first = 0 if guided else total - batch
        residuals = self._residuals(x, i, first)
        if not perturbed:
            return self._run(x, i, self._text.since(first), residuals)
        if batch not in self._text_again:
            self._text_again[batch] = self._text.with_last_again(batch)
        return self._run(x, i, self._text_again[batch].since(first), residuals, again=batch)

    def one_by_one(self, x: Tensor, i: int) -> Tensor:
        """Return the B conditional and then the B perturbed velocities, computed in a pass each."""
        first = len(self.captions.rows) - len(x)
        residuals, text = self._residuals(x, i, first).kept(), self._text.since(first)
        return torch.cat([self._run(x, i, text, residuals), self._run(x, i, text, residuals, again=0)])

    def _run(self, x: Tensor, i: int, text: Text, residuals: Residuals, again: int | None = None) -> Tensor:
        """Run the transformer on the rows of `text`; `again` as `perturbed_rows` there, None perturbs nothing."""
        rows = text.rows - (again or 0)
        latents = x if rows == len(x) else torch.cat([x, x])
        options: dict[str, Any] = {}
        if again is not None:
            if not self.perturbed_layers:
                raise InvalidInput("No layer is perturbed. Name some with `perturbed_layers`, or leave PAG off.")
            options = {"perturbed_layers": self.perturbed_layers, "perturbed_rows": again}
        if residuals.samples:
            options["controlnet_block_samples"] = residuals.samples
        if residuals.branch is not None:
            options["branch"] = residuals.branch
        modulation = Modulation(*(tensor[i : i + 1] for tensor in self._modulation))
        velocity: Tensor = self.transformer.denoise(
            latents.to(self.device, self.dtype), modulation, text.kv, text.mask, **options
        )
        # As published, branches are combined in float32, whatever the network computes in.
        velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
        # A model that also predicts a variance puts it into the second half of its channels.
        channels = x.shape[1]
        return velocity[:, :channels] if velocity.shape[1] // 2 == channels else velocity

    def _residuals(self, x: Tensor, i: int, first: int) -> Residuals:
        """Return what the controls that act in step i add to the caption rows from `first` on."""
        acting = [control for control in self._controls if control.acts[i]]
        native = [control for control in acting if control.native]
        samples = [control.from_latents(x, i, first) for control in acting if not control.native]

        def branch(tokens: Tensor) -> list[Tensor]:
            return self._fitting(add_up([control.from_tokens(tokens, x, i, first) for control in native]))

        return Residuals(samples=self._fitting(add_up(samples)), branch=branch if native else None)

    def _fitting(self, residuals: list[Tensor]) -> list[Tensor]:
        return [residual.to(self.device, self.dtype) for residual in residuals]
