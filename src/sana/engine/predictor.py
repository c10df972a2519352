"""The network as the loop sees it: `predict(x, i)`, with everything that does not change between steps computed once.

Shapes: B latents, R rows of a forward pass (B, or 2 B under guidance: unconditional first), U distinct captions,
T caption length, E text width, C H W latents, n steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sana.engine.compilation import is_compiled
from sana.errors import InvalidInput
from sana.models.linear_dit import Modulation

CPU_TEXT_MULTIPLE = 16
"""Captions are padded to a multiple of this on a CPU: its attention takes twice the time for lengths in between."""
COMPILED_TEXT_MULTIPLE = 64
"""Captions are padded to a multiple of this for compiled code, which is made for one length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
    """The encoded captions of a batch; captions that several rows share are held once."""

    embeds: Tensor
    """[U, T, E], padded to the longest caption of the batch only."""
    mask: Tensor
    """[U, T], 1 at tokens and 0 at padding."""
    rows: tuple[int, ...]
    """Which caption each of the R rows reads."""

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3 or self.mask.shape != self.embeds.shape[:2]:
            raise InvalidInput(
                f"Captions need embeds [U, T, E] and a mask [U, T], but got {list(self.embeds.shape)} and"
                f" {list(self.mask.shape)}. Pass the mask that belongs to the embeds."
            )

    @classmethod
    def stack(cls, groups: Sequence[tuple[Tensor, Tensor]], repeat: int = 1) -> "Captions":
        """Join groups of captions (embeds [g, t, E], mask [g, t]) in their order, each caption for `repeat` rows."""
        length = max(mask.shape[1] for _, mask in groups)
        device, dtype = groups[-1][0].device, groups[-1][0].dtype
        count = sum(len(mask) for _, mask in groups)
        embeds = torch.zeros(count, length, groups[-1][0].shape[2], device=device, dtype=dtype)
        mask = torch.zeros(count, length, device=device, dtype=groups[-1][1].dtype)
        start = 0
        for one_embeds, one_mask in groups:
            stop = start + len(one_mask)
            embeds[start:stop, : one_mask.shape[1]] = one_embeds
            mask[start:stop, : one_mask.shape[1]] = one_mask
            start = stop
        return cls(embeds=embeds, mask=mask, rows=tuple(row for row in range(count) for _ in range(repeat)))

    def trimmed(self) -> "Captions":
        """Return the captions without positions that are masked in every row; exact, because masked keys weigh nothing.

        A row without any token reads all of its positions in the published models, so nothing is dropped then.
        """
        used = self.mask != 0
        keep = used.any(dim=0)
        if bool(keep.all()) or not bool(used.any(dim=1).all()):
            return self
        return replace(self, embeds=self.embeds[:, keep], mask=self.mask[:, keep])


def padded(captions: Captions, multiple: int) -> Captions:
    """Return the captions padded to a length that `multiple` divides; exact, because masked keys weigh nothing.

    A row without any token reads all of its positions in the published models, so nothing is added then.
    """
    extra = -captions.mask.shape[1] % multiple
    if not extra or not bool((captions.mask != 0).any(dim=1).all()):
        return captions
    return replace(captions, embeds=F.pad(captions.embeds, (0, 0, 0, extra)), mask=F.pad(captions.mask, (0, extra)))


class Predictor:
    """The guided loop's network: `predict(x, i, guided=...)` is one forward pass of the transformer at step i.

    Caption projection, the keys and values of all cross-attentions and the modulation of all steps are computed when
    the captions are set, not per step.

    Args:
        transformer: a `LinearDiT`.
        timesteps: [n], as the sampler's grid holds them; the model's `timestep_scale` is applied here.
        captions: with 2 B rows, the B unconditional ones first, or with B rows.
        guidance: scale for models that embed it (SANA-Sprint), times `guidance_embeds_scale` here.

    Raises:
        InvalidInput: the transformer is of another kind, or the captions are of another width than it was trained on.
    """

    def __init__(
        self, transformer: Any, timesteps: Tensor, captions: Captions, *, guidance: float | None = None
    ) -> None:
        for name in ("encode_caption", "cross_attention_kv", "modulation", "denoise"):
            if not hasattr(transformer, name):
                kind = type(transformer).__name__
                raise InvalidInput(f"The transformer is a {kind}, which has no `{name}`. Use a SanaTransformer2DModel.")
        self.transformer = transformer
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
        caption = self.transformer.encode_caption(captions.embeds.to(self.device, self.dtype))
        kv = self.transformer.cross_attention_kv(caption)
        mask = captions.mask.to(self.device)
        if captions.rows != tuple(range(len(mask))):
            rows = torch.tensor(captions.rows, device=self.device)
            kv = tuple((key[rows], value[rows]) for key, value in kv)
            mask = mask[rows]
        self._kv = kv
        # Without padding no mask is needed, and the attention kernels are faster without.
        self._mask = None if bool((mask == 1).all()) else mask

    def __call__(self, x: Tensor, i: int, *, guided: bool) -> Tensor:
        """Return velocities of latents [B, C, H, W] at step i: [2 B, ...] if guided, else the B conditional ones."""
        batch = len(x)
        total = len(self.captions.rows)
        if total not in ((2 * batch,) if guided else (batch, 2 * batch)):
            raise InvalidInput(
                f"{total} caption rows do not fit {batch} latents. Give one per latent, or two with guidance."
            )
        kv, mask = self._kv, self._mask
        if not guided and total != batch:
            kv = tuple((key[-batch:], value[-batch:]) for key, value in kv)
            mask = mask if mask is None else mask[-batch:]
        latents = torch.cat([x, x]) if guided else x
        modulation = Modulation(*(tensor[i : i + 1] for tensor in self._modulation))
        velocity: Tensor = self.transformer.denoise(latents.to(self.device, self.dtype), modulation, kv, mask)
        # A model that also predicts a variance puts it into the second half of its channels.
        channels = x.shape[1]
        return velocity[:, :channels] if velocity.shape[1] // 2 == channels else velocity
