"""`sana train --demo`: the recipe in the package, on the pictures beside it."""

import dataclasses
import importlib.resources
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sana.errors import ModelNotFound

if TYPE_CHECKING:
    from sana.training.config import Recipe

NAME = "palms"
PROMPT = "a red palm tree left of a blue house"


def demo_recipe(overrides: Mapping[str, str]) -> "Recipe":
    """Return the recipe, with the path of its pictures as this installation has it.

    Raises:
        ModelNotFound: the pictures are not part of this installation.
        InvalidInput: an override is wrong.
    """
    from sana.training.config import load_recipe

    folder = Path(str(importlib.resources.files("sana"))) / "assets" / "demo"
    if not (folder / NAME).is_dir():
        raise ModelNotFound("The pictures of the demo are not part of this installation: install it again.")
    recipe = load_recipe(folder / f"{NAME}.toml", overrides)
    data = {**recipe.settings["data"], "path": str(folder / NAME)}
    return dataclasses.replace(recipe, settings={**recipe.settings, "data": data})


def next_steps(adapter: Path) -> list[str]:
    """What to type next: the same prompt without and with what was learnt."""
    plain = f'sana "{PROMPT}" --seed 1 -o before.png'
    return [
        "Now look at what it learnt:",
        f"  {plain}",
        f'  sana "{PROMPT}" --seed 1 --lora {shlex.quote(str(adapter))} -o after.png',
    ]
