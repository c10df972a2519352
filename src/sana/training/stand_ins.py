"""Models that earlier recipes are still to train, for as long as one only asks what training them further will need."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sana.config import AutoencoderConfig
from sana.errors import InvalidInput
from sana.training.config import Recipe


def with_stand_in(recipe: Recipe, folder: Path, exports: Mapping[Path, Recipe], place: Path) -> Recipe:
    """Return an autoencoder's recipe that starts from drawn weights in `place` if its start is not trained yet.

    `folder` is that of its run; `exports` are the recipes by the folder that they will export to.
    Errors: InvalidInput when none of them will make the start.
    """
    start = str(recipe.settings.get("start", ""))
    if recipe.objective != "autoencoder" or not start:
        return recipe
    path = Path(os.path.normpath(folder / start))
    while not path.is_dir():
        maker = exports.get(path)
        if maker is None:
            raise InvalidInput(
                f"autoencoder.start is not there yet: {path}. Name the recipe that trains it before this one, or"
                " train it first."
            )
        if not maker.settings.get("start"):
            return replace(recipe, settings={**recipe.settings, "start": str(_drawn(maker, place))})
        path = Path(os.path.normpath(path.parent / str(maker.settings["start"])))
    return replace(recipe, settings={**recipe.settings, "start": str(path.resolve())})


def _drawn(maker: Recipe, place: Path) -> Path:
    from sana.checkpoints.autoencoder import AutoencoderDC

    AutoencoderDC.from_config(AutoencoderConfig.from_dict(maker.settings.get("model", {}))).save_pretrained(place)
    return place.resolve()
