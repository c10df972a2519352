"""What shows how far a distillation is, and what it leaves behind.

Shapes: B batch, C latent channels, h w latent size.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana.checkpoints.folder import COMPONENTS, save_parts
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.engine.model_card import CARD_KEY
from sana.engine.parts import load
from sana.flow.path import draw_noise, velocity_from_trig
from sana.flow.samplers import Solver, flow_euler, scm
from sana.flow.schedulers import SCMScheduler
from sana.flow.schedules import Grid, scm_angles, scm_grid, trig_grid
from sana.models.linear_dit import LinearDiT
from sana.training.batches import Batch
from sana.training.exports import stored_dtypes
from sana.training.objectives.base import Check, unasked
from sana.training.objectives.sprint.networks import Backbone, Condition, guided, network_of
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.objectives.sprint.trigflow import Network
from sana.training.origins import ModelOrigin
from sana.training.previews import sheet

WATCHED = 32
"""Held-out texts that are looked at."""
TEACHER_STEPS = 20


class Watch:
    """Pictures and figures of a student beside its teacher."""

    def __init__(self, origin: ModelOrigin, teacher: Backbone, student: Backbone, guidance: Sequence[float]) -> None:
        """Nothing is computed yet; of the scales that are taught the middle one is looked at."""
        self.origin, self.teacher, self.student = origin, teacher, student
        self.guidance = sorted(guidance)[len(guidance) // 2]
        self._shown: Batch | None = None
        self._known: list[tuple[Condition, Tensor]] | None = None

    @torch.no_grad()
    def evaluate(self, null: Callable[[Condition], Condition], check: Check = unasked) -> dict[str, float]:
        """Root mean square from the student's one step to the teacher's end of the same noise."""
        if self._known is None:
            angles = scm_angles(TEACHER_STEPS, intermediate_timesteps=None)
            known = []
            for number, (under, like) in enumerate(self._held_out()):
                scale = torch.full((len(under.mask),), self.guidance, device=under.mask.device)
                teacher = guided(self.teacher, under, null(under), scale)
                known.append((under, _drawn(teacher, trig_grid(angles), like, check, flow_euler, seed=number)))
            self._known = known
        if not self._known:
            return {}
        total = sum(len(taught) for _, taught in self._known)
        squares = []
        for number, (under, taught) in enumerate(self._known):
            once = _drawn(self._network(under), scm_grid(1), taught, check, seed=number)
            squares.append((once - taught).square().mean() * (len(taught) / total))
        return {"distance": float(torch.stack(squares).sum().sqrt())}

    def _held_out(self) -> Iterator[tuple[Condition, Tensor]]:
        """The first `WATCHED` samples that are kept apart, in batches of one size each."""
        left = WATCHED
        for batch in self.origin.batches.held_out():
            control = None if batch.control is None else batch.control[:left]
            yield Condition(batch.embeds[:left], batch.mask[:left], control), batch.latents[:left]
            left -= len(batch.latents)
            if left <= 0:
                return

    @torch.no_grad()
    def preview(self, check: Check = unasked) -> Image.Image | None:
        """The preview prompts in one step, and below each row in two."""
        if self._shown is None:
            self._shown = self.origin.preview_batch()
        if self._shown is None:
            return None
        network = self._network(Condition(self._shown.embeds, self._shown.mask, self._shown.control))
        drawn = [_drawn(network, scm_grid(steps), self._shown.latents, check) for steps in (1, 2)]
        check()
        return sheet([self.origin.decode(latents) for latents in drawn])

    def _network(self, under: Condition) -> Network:
        scale = torch.full((len(under.mask),), self.guidance, device=under.mask.device)
        return network_of(self.student, under, scale)


def _drawn(network: Network, grid: Grid, like: Tensor, check: Check, solver: Solver = scm, *, seed: int = 0) -> Tensor:
    """Latents [B, C, h, w] drawn along a grid of TrigFlow levels from fixed noise."""
    generator = torch.Generator().manual_seed(seed)
    levels = grid.sigmas.to(like.device)

    def velocity(x: Tensor, i: int) -> Tensor:
        check()
        sigma = levels[i]
        angle = torch.atan2(sigma, 1 - sigma).expand(len(x))
        radius = (sigma**2 + (1 - sigma) ** 2).sqrt()
        return velocity_from_trig(x, network(x / radius, angle), sigma)

    def noise(_: int) -> Tensor:
        return draw_noise(like.shape, generator).to(like.device)

    walk: Iterator[Any] = solver(velocity, noise(0), grid, noise)
    return [step.x0 for step in walk][-1]  # type: ignore[no-any-return]


def write(student: LinearDiT, settings: SprintSettings, folder: Path) -> None:
    """Write the student in place of its teacher's transformer, every part in the dtype that the teacher's has."""
    kinds = stored_dtypes(settings.teacher)
    loaded = load(settings.teacher, device="cpu", dtype=kinds or "auto")
    stored = kinds.get("transformer", next(loaded.transformer.parameters()).dtype)
    finished = SanaTransformer2DModel.from_config(student.config)
    finished.load_state_dict(student.state_dict())
    parts: dict[str, Any] = {part: getattr(loaded, part) for part in COMPONENTS}
    parts |= {"transformer": finished.to(stored), "scheduler": SCMScheduler()}
    notes = {CARD_KEY: settings.card} if settings.card else None
    save_parts(folder, parts, class_name="SanaSprintPipeline", notes=notes)
