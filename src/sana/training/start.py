"""From a recipe to a trainer."""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana.errors import InvalidInput, did_you_mean
from sana.training.config import Recipe, RunSettings, build
from sana.training.loop import Trainer
from sana.training.objectives.autoencoder import AutoencoderObjective, AutoencoderSettings
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.objectives.language_model import LanguageModelObjective, LanguageModelSettings
from sana.training.objectives.sprint.objective import SprintObjective
from sana.training.objectives.sprint.settings import SprintSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """An objective and the dataclass of its table in a recipe."""

    settings: type[Any]
    objective: type[Any]
    folders: tuple[str, ...] = ()
    """Settings that name folders."""


def device_of(run: RunSettings) -> torch.device:
    """The device that the settings name; auto takes the accelerator that is there, else the CPU."""
    if run.device != "auto":
        try:
            return torch.device(run.device)
        except RuntimeError as error:
            raise InvalidInput(f"run.device must be auto, cpu, cuda or mps, but is '{run.device}'.") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def start(recipe: Recipe, folder: Path) -> Trainer:
    """Build the objective of a recipe and its trainer, which takes up the run in `folder` if there is one."""
    kind = OBJECTIVES.get(recipe.objective)
    if kind is None:
        raise InvalidInput(
            f"There is no objective '{recipe.objective}'.{did_you_mean(recipe.objective, OBJECTIVES)} "
            f"There are: {', '.join(OBJECTIVES)}."
        )
    device = device_of(recipe.run)
    if device.type == "cpu":
        torch.set_num_threads(recipe.run.threads)
    settings = build(kind.settings, recipe.settings, recipe.objective)
    # Folders in a recipe are relative to the run's own, so that the stages find each other wherever the runs lie.
    named = {name: getattr(settings, name) for name in kind.folders}
    settings = dataclasses.replace(
        settings, **{name: os.path.normpath(folder / value) for name, value in named.items() if value}
    )
    objective = kind.objective(settings, recipe.run, device)
    return Trainer(objective, recipe.run, recipe.optimizer, folder, recipe.discriminator_optimizer)


OBJECTIVES: dict[str, Kind] = {
    "autoencoder": Kind(AutoencoderSettings, AutoencoderObjective, ("start",)),
    "language_model": Kind(LanguageModelSettings, LanguageModelObjective),
    "flow_matching": Kind(FlowMatchingSettings, FlowMatchingObjective, ("autoencoder", "text", "features")),
    "sprint": Kind(SprintSettings, SprintObjective, ("features",)),
}
