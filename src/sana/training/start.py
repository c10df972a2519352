"""From a recipe to a trainer."""

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana.checkpoints.hub import locate
from sana.errors import InvalidInput, ModelNotFound, did_you_mean
from sana.training.config import Recipe, RunSettings, build
from sana.training.contents import weights_of
from sana.training.estimate import Estimate, estimate
from sana.training.flops import product_rate
from sana.training.folders import Lock
from sana.training.loop import Trainer
from sana.training.objectives.autoencoder import AutoencoderObjective, AutoencoderSettings
from sana.training.objectives.base import Objective
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.objectives.language_model import LanguageModelObjective, LanguageModelSettings
from sana.training.objectives.sprint.objective import SprintObjective
from sana.training.objectives.sprint.settings import SprintSettings
from sana.training.origins import ModelOrigin
from sana.training.players import use_checkpointing
from sana.training.processes import device_of, rank_of, wants_bf16, world_of
from sana.training.rehearsal import card_of, rehearse
from sana.training.trial import StandIns, Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """An objective and the dataclass of its table in a recipe."""

    settings: type[Any]
    objective: type[Any]
    folders: tuple[str, ...] = ()
    """Settings that name folders."""
    check: Callable[[Any, RunSettings], None] = lambda settings, run: None
    """Refuses a run that does not go with the settings."""
    has_two_players: Callable[[Any], bool] = lambda settings: False
    opens_models: bool = False
    """Whether it begins from whole models, with their encoders."""


def settings_of(recipe: Recipe) -> Any:
    """The objective's own table of a recipe, as its dataclass.

    Errors: InvalidInput for an objective or a setting that there is not, and for tables that contradict each other.
    """
    kind = OBJECTIVES.get(recipe.objective)
    if kind is None:
        raise InvalidInput(
            f"There is no objective '{recipe.objective}'.{did_you_mean(recipe.objective, OBJECTIVES)} "
            f"There are: {', '.join(OBJECTIVES)}."
        )
    settings = build(kind.settings, recipe.settings, recipe.objective)
    kind.check(settings, recipe.run)
    if recipe.discriminator_optimizer is not None and not kind.has_two_players(settings):
        raise InvalidInput(f"[discriminator_optimizer] has no effect on this '{recipe.objective}': it has one player.")
    return settings


def objective_of(recipe: Recipe, folder: Path, **opened: type[ModelOrigin]) -> Callable[[], Objective]:
    """What builds the objective of a recipe whose run lies in `folder`; `opened` may replace what opens models."""
    settings, kind = settings_of(recipe), OBJECTIVES[recipe.objective]
    device = device_of(recipe.run)
    if device.type == "cpu":
        torch.set_num_threads(recipe.run.threads)
    # Folders in a recipe are relative to the run's own, so that the stages find each other wherever the runs lie.
    named = {name: getattr(settings, name) for name in kind.folders}
    settings = dataclasses.replace(
        settings, **{name: os.path.normpath(folder / value) for name, value in named.items() if value}
    )

    def make() -> Objective:
        made: Objective = kind.objective(settings, recipe.run, device, **(opened if kind.opens_models else {}))
        return made

    return make


def start(recipe: Recipe, folder: Path) -> Trainer:
    """Build the objective of a recipe and its trainer, which takes up the run in `folder` if there is one."""
    make = objective_of(recipe, folder)
    if rank_of() == 0:
        Lock.check(folder)  # a model may take minutes to load
    return Trainer(
        make(),
        recipe.run,
        recipe.optimizer,
        folder,
        recipe.discriminator_optimizer,
        settings=recipe.settings,
        rebuild=make,
        models=weights_of(recipe, folder),
    )


def estimated(
    recipe: Recipe, folder: Path, exports: Mapping[Path, Recipe] | None = None, place: Path | None = None
) -> Estimate:
    """What a recipe will need, from micro-batches that train nothing.

    The objective is built; but for a published model that is not here, or that no accelerator is here for, it is
    rehearsed without its weights and data, and the rate of this computer is measured alone. `exports` are recipes by
    the folder that they will export to: what one of them is still to train is replaced, see `trial`. What is made for
    that goes into `place`, where the next estimate finds it, or is gone at the end.
    """
    settings = settings_of(recipe)
    name = str(getattr(settings, "start", "") or getattr(settings, "teacher", ""))
    card = card_of(name)
    if card is not None and card.hub_id and not (torch.accelerator.is_available() and _is_here(name)):
        device_of(dataclasses.replace(recipe.run, device="cpu"))  # joins the other processes, if there are any
        return timed(rehearse(recipe, OBJECTIVES[recipe.objective].objective, settings, card, world_of()), recipe.run)
    with contextlib.nullcontext(place) if place is not None else tempfile.TemporaryDirectory() as made:

        def build(recipe: Recipe, folder: Path) -> Objective:
            tried = stand_ins.tried(recipe, folder, OBJECTIVES[recipe.objective].folders)
            return objective_of(tried, folder, opened=Trial)()

        stand_ins = StandIns(exports=exports or {}, place=Path(made), build=build)
        objective = build(recipe, folder)
    if recipe.run.checkpointing:
        use_checkpointing(objective)
    return estimate(objective, recipe.run, recipe.optimizer, recipe.discriminator_optimizer)


def timed(needs: Estimate, run: RunSettings) -> Estimate:
    """Add how long the steps will take on the device of the run, or on a CPU where this computer lacks it."""
    there = torch.accelerator.current_accelerator(check_available=True)
    device = there if there is not None and run.device in ("auto", there.type) else torch.device("cpu")
    dtype = torch.bfloat16 if wants_bf16(run, device) else torch.float32
    needs = dataclasses.replace(needs, rate=product_rate(device, dtype, run.threads))
    return dataclasses.replace(needs, seconds=run.steps * (needs.step_seconds or 0.0))


def _is_here(name: str) -> bool:
    try:
        locate(name, parts=("transformer",), local_files_only=True, single=True)
    except ModelNotFound:
        return False
    return True


OBJECTIVES: dict[str, Kind] = {
    "autoencoder": Kind(
        AutoencoderSettings,
        AutoencoderObjective,
        ("start",),
        check=AutoencoderSettings.check,
        has_two_players=lambda settings: settings.phase == "refine",
    ),
    "language_model": Kind(LanguageModelSettings, LanguageModelObjective, check=LanguageModelSettings.check),
    "flow_matching": Kind(
        FlowMatchingSettings,
        FlowMatchingObjective,
        ("autoencoder", "text", "features"),
        check=FlowMatchingSettings.check,
        opens_models=True,
    ),
    "sprint": Kind(
        SprintSettings,
        SprintObjective,
        ("features",),
        check=SprintSettings.check,
        has_two_players=lambda settings: settings.has_two_players,
        opens_models=True,
    ),
}
