"""The recipes of the repository: each is read, and means what its objective can do."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

from sana import SanaSprintPipeline
from sana.apps.cli.recipes import split_overrides
from sana.cards import CARDS
from sana.errors import InvalidInput
from sana.training.config import build, load_recipe
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.start import OBJECTIVES, start
from sana.training.trainables import ControlSettings

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/**/*.toml")) + sorted((ROOT / "src" / "sana" / "assets").rglob("*.toml"))
KINDS = (
    *("lora", "dreambooth", "controlnet", "finetune", "scratch-512", "webdataset-512"),
    *("sprint-teacher", "sprint", "sprint-lora", "sprint-controlnet"),
)
"""What there is a recipe for, in both sizes."""


def test_there_are_recipes_for_everything_that_can_be_trained() -> None:
    names = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES if "recipes" in path.parts}
    for size in ("sana-0.6b", "sana-1.6b"):
        assert {f"{size}/{kind}.toml" for kind in KINDS} <= names
    assert {f"sana-1.6b/stage-{size}.toml" for size in ("1024", "2k", "4k")} <= names


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


def documented() -> list[str]:
    """The guide's own commands, and what headers and tables lay over a recipe in words."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    commands = re.findall(r"^sana train (recipes/\S+\.toml.*)$", page, re.MULTILINE)
    commands += re.findall(r"`(recipes/\S+\.toml --[^`]+)`", page)
    for size in ("0.6b", "1.6b"):
        header = (ROOT / f"recipes/sana-{size}/sprint-controlnet.toml").read_text(encoding="utf-8").split("\n\n")[0]
        words = " ".join(re.findall(r"--flow_matching\S+ [\w.-]+\w", " ".join(header.replace("#", "").split())))
        commands.append(f"recipes/sana-{size}/controlnet.toml {words}")
        (words,) = re.findall(r"any Sprint recipe with `(.+?)`", page)
        commands.append(f"recipes/sana-{size}/sprint.toml {words}")
    return commands


@pytest.mark.parametrize("command", documented())
def test_what_the_guide_lays_over_a_recipe_can_be_read(command: str) -> None:
    name, *words = shlex.split(command)
    rest, overrides = split_overrides(words)
    assert not rest
    recipe = load_recipe(ROOT / name, overrides)
    settings = build(OBJECTIVES[recipe.objective].settings, recipe.settings, recipe.objective)
    control = getattr(settings, "control", None)
    if control:
        build(ControlSettings, control, f"{recipe.objective}.control")
    assert not overrides or recipe != load_recipe(ROOT / name)


def test_the_guide_has_commands_over_recipes() -> None:
    assert len(documented()) >= 12


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


@pytest.mark.slow
def test_sprint_of_published_sizes_goes_from_the_built_in_model_over_its_teacher_to_a_student(tmp_path: Path) -> None:
    data = {"size": "256", "path": str(ROOT / "examples" / "data" / "pictures"), "held_out": "2", "least_best": "0.0"}
    common = {"run.steps": "2", "run.batch_size": "2", "run.accumulate": "2", "run.evaluate_every": "2"}
    for name, table, begun in (
        (
            "sprint-teacher",
            "flow_matching",
            {"flow_matching.start": "nano", "flow_matching.model": "{timestep_scale = 0.001}"},
        ),
        ("sprint", "sprint", {"sprint.teacher": str(tmp_path / "sprint-teacher" / "export")}),
    ):
        own = {f"{table}.data.{key}": value for key, value in data.items()}
        own |= {f"{table}.data.features": str(tmp_path / "features"), **common, **begun}
        recipe = load_recipe(ROOT / "recipes" / "sana-1.6b" / f"{name}.toml", own)
        trainer = start(recipe, tmp_path / name)
        assert all(math.isfinite(step.loss) for step in trainer.steps())
        trainer.export(tmp_path / name / "export")
    index = json.loads((tmp_path / "sprint" / "export" / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    student = SanaSprintPipeline.from_pretrained(tmp_path / "sprint" / "export")
    adapter = tmp_path / "adapter" / "export"
    lora = {
        "start": str(tmp_path / "sprint-teacher" / "export"),
        **{f"data.{key}": value for key, value in data.items()},
    }
    lora |= {"data.features": str(tmp_path / "features")}
    recipe = ROOT / "recipes" / "sana-1.6b" / "sprint-lora.toml"
    trainer = start(load_recipe(recipe, common | {f"flow_matching.{k}": v for k, v in lora.items()}), adapter.parent)
    assert all(math.isfinite(step.loss) for step in trainer.steps())
    trainer.export(adapter)
    student.load_lora_weights(adapter)
    assert student.get_list_adapters()["transformer"]
    lora["start"] = str(tmp_path / "sprint" / "export")
    with pytest.raises(
        InvalidInput, match=r"is distilled to one to four steps, and flow matching would undo that\. Start"
    ):
        start(load_recipe(recipe, common | {f"flow_matching.{k}": v for k, v in lora.items()}), tmp_path / "undone")
