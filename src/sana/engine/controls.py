"""Control networks as the loop sees them.

Shapes: B latents, R rows of a forward pass, C H W latents, N tokens, D width, n steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sana.engine.captions import Captions, Text
from sana.errors import InvalidInput
from sana.models.controlnet import WIRINGS
from sana.models.linear_dit import Branch

FLOW_TIMES = 1000
"""Times that SANA models of many steps are told for one unit of SANA-Sprint's time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """One control network with the picture that steers it."""

    network: Any
    """A `SanaControlNetModel`."""
    latents: Tensor
    """The encoded control picture times `scaling_factor`, [1 or B, C, H, W]; not doubled for guidance."""
    scale: float | Sequence[float] = 1.0
    """Strength of the residuals, for all latents or one per latent."""
    start: float = 0.0
    """Share of the steps after which it begins to act."""
    end: float = 1.0
    """Share of the steps after which it acts no more."""
    timesteps: Tensor | None = None
    """[n], what the network is told; None is what the transformer is told, in diffusers' wiring without the model's
    `timestep_scale`, as there. Beside SANA-Sprint a network that was made for another SANA is told that one's times."""

    def __post_init__(self) -> None:
        for name in ("encode_caption", "cross_attention_kv", "modulation", "condition", "residuals", "wiring"):
            if not hasattr(self.network, name):
                kind = type(self.network).__name__
                raise InvalidInput(f"The control network is a {kind}; use a SanaControlNetModel.")
        if self.network.wiring not in WIRINGS:
            raise InvalidInput(
                f"The control network's `wiring` is {self.network.wiring!r}; choose {' or '.join(map(repr, WIRINGS))}."
            )
        if not 0 <= self.start < self.end <= 1:
            raise InvalidInput(
                f"A control must satisfy 0 <= start < end <= 1, but starts at {self.start} and ends at {self.end}."
            )
        scales = self.scale if isinstance(self.scale, Sequence) else (self.scale,)
        if not scales or not all(math.isfinite(scale) for scale in scales):
            raise InvalidInput(f"The scale of a control is {self.scale!r}; give a finite number, or one per latent.")
        if self.latents.ndim != 4 or self.latents.shape[1] != self.network.config.in_channels:
            raise InvalidInput(
                f"The latents of a control have shape {list(self.latents.shape)}; its network reads"
                f" [1 or B, {self.network.config.in_channels}, H, W]. Encode the control picture first."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Residuals:
    """What controls add to the tokens in one step, in the two wirings of `LinearDiT.denoise`."""

    samples: Sequence[Tensor] = ()
    branch: Branch | None = None

    def kept(self) -> "Residuals":
        """Return the same, with what the branch gives computed once and used again."""
        if self.branch is None:
            return self
        branch, found = self.branch, list[Tensor]()

        def again(tokens: Tensor) -> list[Tensor]:
            found.extend(() if found else branch(tokens))
            return found

        return Residuals(samples=self.samples, branch=again)


class ControlBranch:
    """A control bound to a run, with everything that does not change between steps computed once.

    Raises:
        InvalidInput: the network does not fit the transformer, or it would act in no step.
    """

    def __init__(self, control: Control, transformer: Any, timesteps: Tensor) -> None:
        self.control, self.network = control, control.network
        self.native = self.network.wiring == "native"
        weight = next(p for p in self.network.parameters() if p.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype
        for name in ("inner_dim", "patch_size", "in_channels"):
            one, other = getattr(self.network.config, name), getattr(transformer.config, name)
            if one != other:
                raise InvalidInput(
                    f"The control network has {name} {one}, the transformer {other}. Use the one that was made for it."
                )
        self.acts = _acting(control, len(timesteps))
        told = _told(control, transformer.config, timesteps)
        if told.shape != timesteps.shape:
            raise InvalidInput(
                f"A control is told {len(told)} timesteps, but the run has {len(timesteps)}. Give one per step."
            )
        with torch.no_grad():
            self._modulation = self.network.modulation(told.to(self.device))
            latents = control.latents.to(self.device, self.dtype)
            self._condition = self.network.condition(latents, positions=not self.native)

    @torch.no_grad()
    def read(self, captions: Captions) -> None:
        """Set the captions."""
        self._text = Text.of(self.network, captions, self.device, self.dtype)

    def from_latents(self, x: Tensor, i: int, first: int) -> list[Tensor]:
        """Return the residuals of the caption rows from `first` on as diffusers has it: from the latents."""
        self._check(x)
        steered = self.network.embed(x.to(self.device, self.dtype)) + self._condition
        text = self._text.since(first)
        if text.rows > len(steered):
            steered = torch.cat([steered, steered])
        return self._scaled(self.network.residuals(steered, self.network.grid(x), self._at(i), text.kv, text.mask))

    def from_tokens(self, tokens_RND: Tensor, x: Tensor, i: int, first: int) -> list[Tensor]:
        """Return them as the original code has it: from the base's tokens after block 0."""
        self._check(x)
        tokens = tokens_RND.to(self.device, self.dtype)
        tokens = tokens.view(-1, len(x), *tokens.shape[1:])
        steered, text = (tokens + self._condition).flatten(0, 1), self._text.since(first)
        return self._scaled(self.network.residuals(steered, self.network.grid(x), self._at(i), text.kv, text.mask))

    def _at(self, i: int) -> Tensor:
        modulation: Tensor = self._modulation[i : i + 1]
        return modulation

    def _check(self, x: Tensor) -> None:
        shape, scale = self.control.latents.shape, self.control.scale
        if len(shape) != x.ndim or len(self._condition) not in (1, len(x)) or shape[2:] != x.shape[2:]:
            raise InvalidInput(
                f"The latents of a control have shape {list(shape)}, which does not fit latents of {list(x.shape)}."
                " Give one, or one per latent, encoded from a picture of the size that is drawn."
            )
        if isinstance(scale, Sequence) and len(scale) not in (1, len(x)):
            raise InvalidInput(f"A control has {len(scale)} scales for {len(x)} latents. Give one, or one per latent.")

    def _scaled(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        scale = self.control.scale
        if not isinstance(scale, Sequence):
            return list(residuals) if scale == 1 else [residual * scale for residual in residuals]
        rows = torch.tensor(scale, device=self.device).view(-1, 1, 1)
        rows = rows.repeat(len(residuals[0]) // len(rows), 1, 1)
        return [(residual * rows).to(residual.dtype) for residual in residuals]


def _told(control: Control, config: Any, timesteps: Tensor) -> Tensor:
    """Return the timesteps that a control network is told, [n]."""
    if control.timesteps is not None:
        return control.timesteps
    return timesteps * branch_scale(control.network, config)


def branch_scale(branch: Any, config: Any) -> float:
    """Return the factor from a run's timesteps to what the control network `branch` is told of them.

    A run's timesteps are 1000 sigma, and beside SANA-Sprint sigma itself; `config` is the transformer's.
    """
    # All SANA-Sprint models have norms of queries and keys, so a branch without was made for a model of many steps.
    if config.guidance_embeds and branch.config.qk_norm is None:
        return float(FLOW_TIMES)
    return float(config.timestep_scale) if branch.wiring == "native" else 1.0


def acting_steps(start: float, end: float, count: int) -> list[bool]:
    """Return for each step whether it lies whole between start and end, as diffusers' pipelines count it.

    Errors: InvalidInput if no step does.
    """
    acts = [start <= i / count and (i + 1) / count <= end for i in range(count)]
    if not any(acts):
        raise InvalidInput(
            f"None of the {count} steps lies between the shares {start} and {end} of the run, so the"
            " control would do nothing. Widen `start` and `end`, or take more steps."
        )
    return acts


def _acting(control: Control, count: int) -> list[bool]:
    scales = control.scale if isinstance(control.scale, Sequence) else [control.scale]
    return [here and any(scales) for here in acting_steps(control.start, control.end, count)]


def add_up(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Add the residuals of several controls block by block; networks may have different numbers of blocks."""
    blocks = [[tensor for tensor in block if tensor is not None] for block in zip_longest(*groups)]
    return [sum(rest, start) for start, *rest in blocks]
