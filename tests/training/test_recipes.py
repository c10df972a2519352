"""Recipes: what is read, what is refused, and how overrides are laid over a file."""

from pathlib import Path

import pytest

from sana.errors import InvalidInput, ModelNotFound
from sana.training.config import OptimizerSettings, RunSettings, build, load_recipe
from sana.training.objectives.autoencoder import AutoencoderSettings
from sana.training.start import OBJECTIVES

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_parses_into_its_objectives_settings(path: Path) -> None:
    recipe = load_recipe(path)
    settings = build(OBJECTIVES[recipe.objective].settings, recipe.settings, recipe.objective)
    assert recipe.run.steps > 0
    assert type(settings) is OBJECTIVES[recipe.objective].settings


def test_overrides_win_over_the_file_and_keep_their_type(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('objective = "autoencoder"\n[run]\nsteps = 5\nbatch_size = 2\n[autoencoder]\nlatent_noise = 0.3\n')
    recipe = load_recipe(
        file, {"run.steps": "7", "optimizer.lr": "1e-4", "run.device": "cpu", "autoencoder.thing_weight": "1"}
    )
    assert (recipe.run.steps, recipe.run.batch_size, recipe.run.device) == (7, 2, "cpu")
    assert recipe.optimizer.lr == pytest.approx(1e-4)
    settings = build(AutoencoderSettings, recipe.settings, "autoencoder")
    assert (settings.latent_noise, settings.thing_weight) == (0.3, 1.0)


def test_a_second_player_has_settings_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    text = 'objective = "autoencoder"\n[run]\nsteps = 5\nbatch_size = 2\n'
    file.write_text(text)
    assert load_recipe(file).discriminator_optimizer is None
    file.write_text(f"{text}[discriminator_optimizer]\nlr = 0.5\n")
    assert load_recipe(file).discriminator_optimizer == OptimizerSettings(lr=0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nsteps = 1\nbatch_size = 1\n", "objective"),
        ('objective = "autoencoder"\n[run]\nstps = 1\nbatch_size = 1\n', "steps"),
        ('objective = "autoencoder"\n[run]\nsteps = 1\n', "batch_size"),
        ('objective = "autoencoder"\n[run]\nsteps = 0\nbatch_size = 1\n', "at least 1"),
        ('objective = "autoencoder"\n[rum]\nsteps = 1\n', "rum"),
        ('objective = "autoencoder"\n[run]\nsteps = 1\nbatch_size = 1\nema = "high"\n', "ema"),
        ('objective = "autoencoder"\n[run]\nsteps = "many"\nbatch_size = 1\n', "steps"),
        ('objective = "autoencoder"\n[run]\nsteps = true\nbatch_size = 1\n', "steps"),
        ('objective = "autoencoder"\n[run]\nsteps = 1\nbatch_size = 1\n[optimizer]\nbetas = 1\n', "betas"),
        ("objective = \n", "TOML"),
    ],
)
def test_a_wrong_recipe_is_one_clear_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load_recipe(file)


def test_a_missing_recipe_and_a_dotless_override_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        load_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(InvalidInput, match="no dot"):
        load_recipe(RECIPES[0], {"steps": "3"})


@pytest.mark.parametrize(("field", "value"), [("ema", 1.0), ("threads", 0), ("precision", "fp8")])
def test_run_settings_refuse_what_cannot_be(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=field):
        build(RunSettings, {"steps": 1, "batch_size": 1, field: value}, "run")


@pytest.mark.parametrize(("field", "value"), [("name", "sgd"), ("lr", 0.0), ("decay_share", 1.5)])
def test_optimizer_settings_refuse_what_cannot_be(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=field):
        build(OptimizerSettings, {field: value}, "optimizer")
