"""What a dry run tries a recipe with, so that nothing is drawn, computed ahead or written where the training would.

Models that other recipes are still to train are replaced by untrained ones of their shapes; of the drawn world there is
a small part; and of a data set no more is encoded than the batches that are tried.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sana.config import AutoencoderConfig
from sana.errors import InvalidInput
from sana.training.config import Recipe, RunSettings
from sana.training.contents import MODELS
from sana.training.drawn_batches import HELD_OUT
from sana.training.estimate import WALKS
from sana.training.objectives.base import Objective
from sana.training.objectives.flow_settings import DataSettings, FlowMatchingSettings, PriorSettings
from sana.training.origins import ModelOrigin
from sana.training.priors import missing_numbers

_log = logging.getLogger(__name__)


class Trial(ModelOrigin):
    """A model and its data of which no more is encoded than some batches."""

    def __init__(self, settings: FlowMatchingSettings, run: RunSettings, device: torch.device) -> None:
        """Open both; where the training would have features in files, the encoders are gone afterwards.

        Errors: as of `ModelOrigin`.
        """
        features = settings.data.get("features", "")
        super().__init__(
            replace(settings, data={k: v for k, v in settings.data.items() if k != "features"}), run, device
        )
        if features:
            for draw in range(WALKS):
                self.batches.batch(draw, torch.Generator())
            self.start.release()

    def _class_data(self, prior: PriorSettings, data: DataSettings, side: int) -> DataSettings:
        """Take the pictures to be learnt for those of the class, which are as large."""
        missing = len(missing_numbers(self.start, prior, side))
        if missing:
            _log.info("the training will draw %d pictures of '%s' into %s first", missing, prior.prompt, prior.folder)
        return replace(data, caption=prior.prompt)


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """Makes recipes that can be tried before those that they build on are trained."""

    exports: Mapping[Path, Recipe]
    """Recipes by the folder that they will export to."""
    place: Path
    """Folder for what is made for trials, which others may find there again."""
    build: Callable[[Recipe, Path], Objective]
    """Builds the objective of a recipe whose run lies in a folder."""

    def tried(self, recipe: Recipe, folder: Path, relative: tuple[str, ...]) -> Recipe:
        """Return the recipe whose run lies in `folder`, on what is there or stands in for it.

        `relative` are the settings whose paths count from that folder.
        Errors: InvalidInput when nothing is there and no recipe makes it.
        """
        settings = dict(recipe.settings)
        for name in MODELS:
            if settings.get(name):
                settings[name] = self._there(
                    recipe.objective, name, settings[name], folder if name in relative else None
                )
        control = settings.get("control", {})
        if control.get("start"):
            begun = self._there(recipe.objective, "control.start", control["start"], None)
            settings["control"] = {**control, "start": begun}
        if settings.get("features"):
            batch = HELD_OUT + recipe.run.batch_size
            settings |= {"features": str((self.place / "features").resolve())}
            settings |= {"scenes": min(int(settings.get("scenes", batch)), batch), "captions": 1}
        return replace(recipe, settings=settings)

    def _there(self, objective: str, name: str, value: str, folder: Path | None) -> str:
        """Return a model that a setting names, whose path may count from a folder, or what stands in for it."""
        path = Path(os.path.abspath(value if folder is None else folder / value))
        if path.exists():
            return value if folder is None else str(path.resolve())
        known = next((export for export in self.exports if Path(os.path.abspath(export)) == path), None)
        if known is not None:
            return str(self._made(known))
        if folder is None:  # may be the name of a model
            return value
        raise InvalidInput(
            f"{objective}.{name} is not there yet: {os.path.relpath(path)}. Name the recipe that trains it before this"
            " one, or train it first."
        )

    def _made(self, path: Path) -> Path:
        """Return a model of the shapes that a recipe will export to `path`, untrained unless it begins from one."""
        maker, made = self.exports[path], self.place.resolve() / hashlib.sha256(str(path).encode()).hexdigest()[:16]
        if made.exists():
            return made
        if maker.objective != "autoencoder":
            self.build(maker, path.parent).export(made)
        elif start := maker.settings.get("start"):  # a phase changes no shape
            return Path(self._there(maker.objective, "start", start, path.parent))
        else:
            _draw_autoencoder(maker.settings.get("model", {}), made)
        return made


def _draw_autoencoder(model: Mapping[str, Any], place: Path) -> None:
    from sana.checkpoints.autoencoder import AutoencoderDC

    AutoencoderDC.from_config(AutoencoderConfig.from_dict(model)).save_pretrained(place)
