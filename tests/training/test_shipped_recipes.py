"""The recipes of the repository: each is read, and means what its objective can do."""

from pathlib import Path

import pytest

from sana.cards import CARDS
from sana.training.config import build, load_recipe
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.start import OBJECTIVES

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/**/*.toml")) + sorted((ROOT / "src" / "sana" / "assets").rglob("*.toml"))


def test_there_are_recipes_for_everything_that_can_be_trained() -> None:
    names = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES if "recipes" in path.parts}
    for size in ("sana-0.6b", "sana-1.6b"):
        assert {f"{size}/{kind}.toml" for kind in ("lora", "dreambooth", "controlnet", "finetune")} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_can_be_read_whole(path: Path) -> None:
    recipe = load_recipe(path)
    settings = build(OBJECTIVES[recipe.objective].settings, recipe.settings, recipe.objective)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    if isinstance(settings, FlowMatchingSettings) and settings.start:
        # A published model, or a folder that the recipe says how to make.
        assert settings.start in CARDS or f" {settings.start} --layers" in text
