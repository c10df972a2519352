"""The recipes of the repository: each is read, and means what its objective can do."""

import math
from pathlib import Path

import pytest

from sana.cards import CARDS
from sana.training.config import build, load_recipe
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.start import OBJECTIVES, start

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
        # A published model, what another recipe makes, or a folder that the recipe says how to make.
        made = [f"runs/{path.parent.name}/{path.stem}/export" for path in RECIPES]
        assert settings.start in CARDS or settings.start in made or f" {settings.start} --layers" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dreambooth", "controlnet", "finetune"])
def test_the_recipes_of_published_sizes_run_on_the_built_in_model(kind: str, tmp_path: Path) -> None:
    overrides = {
        "run.steps": "2",
        "run.batch_size": "2",
        "run.accumulate": "1",
        "run.evaluate_every": "2",
        "flow_matching.start": "nano",
        "flow_matching.data.size": "256",
        "flow_matching.data.path": str(ROOT / "examples" / "data" / "pictures"),
        "flow_matching.data.features": str(tmp_path / "features"),
    }
    if kind in ("controlnet", "finetune"):
        overrides["flow_matching.data.held_out"] = "2"
    if kind == "controlnet":
        overrides["flow_matching.control.blocks"] = "2"
    if kind == "dreambooth":
        prior = {"folder": str(tmp_path / "class"), "count": "2", "steps": "2"}
        overrides |= {f"flow_matching.prior.{key}": value for key, value in prior.items()}
    trainer = start(load_recipe(ROOT / "recipes" / "sana-1.6b" / f"{kind}.toml", overrides), tmp_path / "run")
    for step in trainer.steps():
        assert math.isfinite(step.loss)
    trainer.export(tmp_path / "export")
    assert any((tmp_path / "export").rglob("*.safetensors"))
