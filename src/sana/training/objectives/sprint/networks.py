"""Teacher and student of a distillation, as functions of state and time under given texts.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width, N tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sana.engine.controls import branch_scale
from sana.flow.path import flow_from_trig, sigma_from_angle
from sana.models.controlnet import LinearControlNet
from sana.models.linear_dit import LinearDiT
from sana.training.objectives.sprint.trigflow import Network, trig_network
from sana.training.steering import Steering
from sana.training.trainables import computing

PUBLISHED_TAPS = {20: (2, 8, 14, 19), 28: (2, 8, 14, 20, 27)}
"""Blocks under the discriminator's heads, by the number of blocks."""


class Condition(NamedTuple):
    """What a picture is drawn under."""

    embeds: Tensor
    """Texts [B, T, E]."""
    mask: Tensor
    """[B, T], 1 at the rows that count."""
    control: Tensor | None = None
    """Encoded control pictures [B, C, h, w], where a branch reads them."""

    def since(self, first: int) -> Self:
        """Return the rows from `first` on."""
        return self._replace(
            embeds=self.embeds[first:],
            mask=self.mask[first:],
            control=None if self.control is None else self.control[first:],
        )

    def after(self, other: Self) -> Self:
        """Return the rows of `other` and then these."""
        both = None
        if self.control is not None and other.control is not None:
            both = torch.cat([other.control, self.control])
        return self._replace(
            embeds=torch.cat([other.embeds, self.embeds]), mask=torch.cat([other.mask, self.mask]), control=both
        )


@dataclass(frozen=True)
class Backbone:
    """A transformer, and the control branch in front of it if it has one."""

    transformer: LinearDiT
    branch: LinearControlNet | None = None

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Transformer and branch."""
        return (self.transformer,) if self.branch is None else (self.transformer, self.branch)

    @property
    def told_branch(self) -> float:
        """What the branch is told of sigma = 1."""
        assert self.branch is not None
        config = self.transformer.config
        one = 1.0 if config.guidance_embeds else 1000.0
        return one * branch_scale(self.branch, config)

    def steering(self, under: Condition) -> Steering | None:
        """Return what the branch makes of control pictures, or None without one."""
        if self.branch is None:
            return None
        assert under.control is not None
        return Steering(self.branch, under.embeds, under.mask, under.control)

    def steered(self, steering: Steering | None, x: Tensor, sigma: Tensor) -> dict[str, Any]:
        """Return what the transformer takes from the branch at noisy latents x [B, C, h, w] of level `sigma` [B]."""
        return {} if steering is None else steering(x, sigma * self.told_branch)


def network_of(backbone: Backbone, under: Condition, guidance: Tensor | None = None) -> Network:
    """Return the TrigFlow network of a backbone under a condition; `guidance` [B] is for students.

    What depends on the condition alone is computed here, once.
    """
    transformer = backbone.transformer
    with computing(transformer):
        kv = transformer.cross_attention_kv(transformer.encode_caption(under.embeds))
        steering = backbone.steering(under)
    embedded = None if guidance is None else guidance * transformer.config.guidance_embeds_scale

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        with computing(transformer):
            more = backbone.steered(steering, x, sigma)
            out = transformer.denoise(x, transformer.modulation(sigma, embedded), kv, under.mask, **more)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    return trig_network(velocity)


def guided(backbone: Backbone, under: Condition, null: Condition, guidance: Tensor) -> Network:
    """Return the TrigFlow network of a flow model under classifier-free guidance with a scale per sample [B].

    The two velocities enter F with the same coefficients, so to guide F is to guide the velocity.
    """
    both = network_of(backbone, under.after(null))

    def network(x: Tensor, t: Tensor) -> Tensor:
        without, conditional = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return without + guidance.view(-1, 1, 1, 1) * (conditional - without)

    return network


def tapped(backbone: Backbone, under: Condition, x: Tensor, t: Tensor, taps: Sequence[int]) -> list[Tensor]:
    """Return the tokens [B, N, D] after the tapped blocks, for TrigFlow states divided by sigma_d."""
    sigma, transformer = sigma_from_angle(t), backbone.transformer
    on_path = flow_from_trig(x, sigma, 1.0)
    with computing(transformer):
        kv = transformer.cross_attention_kv(transformer.encode_caption(under.embeds))
        more = backbone.steered(backbone.steering(under), on_path, sigma)
        return transformer.features(on_path, transformer.modulation(sigma), kv, under.mask, taps, **more)


def taps_of(layers: int) -> tuple[int, ...]:
    """Return the blocks to tap: the published ones, or at like depths."""
    return PUBLISHED_TAPS.get(layers, tuple(sorted({round((layers - 1) * depth) for depth in (0.1, 0.42, 0.74, 1)})))
