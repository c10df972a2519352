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


RECIPE = """\
objective = "autoencoder"  # run.steps = 4

[run]
steps = 4
batch_size = 2
save_evry = 3

[optimizer]
lr = -1.0
schedule = "constant"
decay_share = 0.5

[autoencodr]
thing_weight = 2.0
"""


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        ((0, 12), "line 6: run has no setting 'save_evry'. Did you mean 'save_every'?"),
        ((0, 5, 7, 12), "line 7: optimizer.lr must be positive, but is -1.0."),
        ((0, 5, 7, 8, 9, 12), "line 8: optimizer.decay_share has no effect with schedule = 'constant'; remove it"),
        ((0, 5, 11, 14), "line 7: '{file}' has an unknown table [autoencodr]. Did you mean 'autoencoder'?"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path: Path, kept: tuple[int, ...], sentence: str) -> None:
    lines, file = RECIPE.splitlines(), tmp_path / "a.toml"
    chosen = [line for first, last in zip(kept[::2], kept[1::2], strict=True) for line in lines[first:last]]
    file.write_text("\n".join(chosen))
    with pytest.raises(InvalidInput) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}, {sentence.format(file=file)}")


def test_what_an_override_made_wrong_is_told_with_the_override(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('objective = "autoencoder"\n[run]\nsteps = 4\nbatch_size = 2\n')
    with pytest.raises(InvalidInput, match=r"^--run\.steps: run\.steps must be at least 1, but is 0"):
        load_recipe(file, {"run.steps": "0"})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "came", "betas": [0.9, 1.5, 0.9]}, "optimizer.betas must lie in"),
        ({"eps": [0.0]}, "optimizer.eps must be positive"),
        ({"schedule": "step"}, "optimizer.schedule must be constant, cosine or linear, but is 'step'"),
        ({"name": "came8bit"}, "optimizer.name must be adamw, muon, came or adamw8bit, but is 'came8bit'"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay must not be negative"),
        ({"clip": 0.0}, "optimizer.clip must be positive"),
    ],
)
def test_optimizer_tables_that_cannot_be(table: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        build(OptimizerSettings, table, "optimizer")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"export": "first"}, "run.export must be last or best"),
        ({"report": ["aim"]}, "run.report may name tensorboard and wandb, but not 'aim'"),
        ({"timeout": 0.0}, "run.timeout must be positive"),
    ],
)
def test_run_tables_that_cannot_be(table: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        build(RunSettings, {"steps": 1, "batch_size": 1, **table}, "run")
