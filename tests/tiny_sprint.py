"""A tiny teacher of a Sprint distillation, on random latents under random texts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana.models.linear_dit import LinearDiT
from sana.training.batches import Batch
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.loop import Trainer
from sana.training.objectives.sprint import objective
from sana.training.objectives.sprint.settings import SprintSettings
from tiny_model import tiny_transformer

CPU = torch.device("cpu")


class FakeBatches:
    """Random latents under random texts."""

    null = torch.zeros(1, 32)

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        return Batch(
            latents=torch.randn(4, 4, 4, 4, generator=generator),
            embeds=torch.randn(4, 5, 32, generator=generator),
            mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]),
        )

    def held_out(self) -> list[Batch]:
        return [self.batch(0, torch.Generator().manual_seed(9))]


class FakeOrigin:
    """Stands for a model and data on disk."""

    teacher: LinearDiT

    def __init__(self, *_: Any) -> None:
        self.batches, self.shift = FakeBatches(), 3.0
        self.content: dict[str, Any] = {}
        self.start = self

    def transformer(self, *_: Any) -> LinearDiT:
        return copy.deepcopy(self.teacher)

    def preview_batch(self) -> Batch:
        return self.batches.held_out()[0]

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


@pytest.fixture
def tiny_teacher(monkeypatch: pytest.MonkeyPatch) -> LinearDiT:
    model: LinearDiT = tiny_transformer(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    monkeypatch.setattr(FakeOrigin, "teacher", model, raising=False)
    monkeypatch.setattr(objective, "ModelOrigin", FakeOrigin)
    return model


def trained(folder: Path, settings: SprintSettings, run: RunSettings, *stops: int) -> Trainer:
    """Train to the end, stopped and begun again after each of `stops`."""
    for stop in (*stops, run.steps):
        trainer = Trainer(objective.SprintObjective(settings, run, CPU), run, OptimizerSettings(warmup=1), folder)
        steps = trainer.steps()
        while trainer.step < stop:
            next(steps)
        steps.close()  # type: ignore[attr-defined]
    return trainer
