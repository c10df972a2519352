"""`sana models grow` and `sana models prune`: a model of another depth that loads and draws."""

import json
from pathlib import Path

import pytest
from command import Sana
from PIL import Image

FISH = ("a red fish", "--seed", "3", "--steps", "2")


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


@pytest.fixture
def deep(sana: Sana, tmp_path: Path) -> Path:
    said = sana("models", "grow", "nano", "deep", "--layers", "8", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out) == {
        "name": "nano",
        "target": "deep",
        "layers_before": 6,
        "layers": 8,
        "params": 8_119_840,
        "strategy": "constant",
        "warnings": [],
    }
    return tmp_path / "deep"


def test_a_grown_model_draws_the_same_picture_and_its_empty_blocks_are_pruned_again(sana: Sana, deep: Path) -> None:
    assert sana(*FISH, "-o", "before.png").code == 0
    said = sana(*FISH, "-m", "deep", "-o", "after.png")
    assert said.code == 0
    assert "deep has the architecture and the limits of nano (8.1 M parameters, 256 px)" in said.err
    assert pixels(Path("before.png")) == pixels(Path("after.png"))
    Path("prompts.txt").write_text("a red fish\nthree blue hearts\n")
    said = sana(
        "models", "prune", "deep", "thin", "--layers", "6", "--prompts", "prompts.txt", "--steps", "2", "--json"
    )
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["kept"], told["prompts"], told["layers_before"], told["layers"]) == ([0, 1, 2, 3, 4, 5], 2, 8, 6)
    assert told["importance"][6:] == [0.0, 0.0]
    assert sana(*FISH, "-m", "thin", "-o", "again.png").code == 0
    assert pixels(Path("before.png")) == pixels(Path("again.png"))


def test_the_built_in_model_brings_its_own_prompts(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.apps.cli.depth_tasks.PROMPTS", 6)
    said = sana("models", "prune", "nano", "thin", "--layers", "5", "--steps", "1")
    assert said.code == 0, said.err
    text = " ".join(said.out.split())
    assert "blocks 6 to 5, 5.3 M parameters" in text
    assert "ranked over 6 prompts" in text
    assert sana(*FISH, "-m", "thin", "--pag", "2", "-o", "pag.png").code == 0  # the block that PAG perturbs is there


def test_what_changes_the_pictures_says_so(sana: Sana) -> None:
    said = sana("models", "grow", "nano", "a", "--layers", "12", "--strategy", "block_expand")
    assert "as nano does" in " ".join(said.out.split())
    said = sana("models", "grow", "nano", "b", "--layers", "12", "--strategy", "block_expand", "--no-gate")
    assert "otherwise than nano, so train it first" in " ".join(said.out.split())
    said = sana("models", "grow", "nano", "c", "--layers", "12", "--keep", "4")
    assert "otherwise than nano" in " ".join(said.out.split())


def test_one_file_and_a_lone_transformer_grow_too(sana: Sana, tmp_path: Path) -> None:
    from sana import SanaTransformer2DModel

    assert sana("models", "grow", "nano", "deep.safetensors", "--layers", "7").code == 0
    grown = SanaTransformer2DModel.from_single_file("deep.safetensors", sample_size=8, interpolation_scale=1.0)
    assert grown.config.num_layers == 7
    assert sana("models", "grow", "deep.safetensors", "folder", "--layers", "9").code == 0
    assert json.loads(Path("folder/config.json").read_text())["num_layers"] == 9


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("grow", "nano"), 2, "Give a model, a target and a depth: sana models grow NAME OUT --layers N"),
        (("grow", "nano", "out"), 2, "Give a model, a target and a depth"),
        (("grow", "nano", "out", "--layers", "6"), 2, "has 6 blocks already"),
        (("grow", "nano", "out", "--layers", "9", "--prompts", "a.txt"), 2, "--prompts belongs to `sana models prune`"),
        (("prune", "nano", "out", "--layers", "3", "--keep", "3"), 2, "--keep belongs to `sana models grow`"),
        (("prune", "nano", "out", "--layers", "3", "--strategy", "cyclic"), 2, "--strategy belongs to"),
        (("info", "nano", "--layers", "3"), 2, "--layers belongs to `sana models grow`"),
        (("prune", "nano", "out", "--layers", "6"), 2, "give a depth from 1 to 5"),
        (("grow", "nanno", "out", "--layers", "9"), 3, "There is no model 'nanno'. Did you mean 'nano'?"),
    ],
)
def test_what_makes_no_sense_is_refused(sana: Sana, words: tuple[str, ...], code: int, text: str) -> None:
    said = sana("models", *words)
    assert said.code == code
    assert text in " ".join(said.err.split())
    assert not Path("out").exists()


def test_another_model_needs_prompts_of_its_own(sana: Sana, tiny_folder: Path) -> None:
    said = sana("models", "prune", str(tiny_folder), "out", "--layers", "1")
    assert said.code == 2
    assert "Name a file with a prompt in each line, about 100: --prompts FILE" in said.err


def test_a_model_with_a_control_branch_and_an_existing_target_are_refused(sana: Sana, tiny_folder: Path) -> None:
    import shutil

    shutil.copytree(tiny_folder, "controlled")
    Path("controlled/controlnet").mkdir()
    said = sana("models", "grow", "controlled", "out", "--layers", "3", "--add-qk-norm")
    assert said.code == 2
    assert "control branch that was made for its blocks" in said.err
    said = sana("models", "grow", str(tiny_folder), "out", "--layers", "3")
    assert "does not normalise queries and keys" in said.err
    assert sana("models", "grow", str(tiny_folder), "out", "--layers", "3", "--add-qk-norm").code == 0
    said = sana("models", "grow", str(tiny_folder), "out", "--layers", "4", "--add-qk-norm")
    assert "exists already" in said.err
    assert sana("models", "grow", str(tiny_folder), "out", "--layers", "4", "--add-qk-norm", "--force").code == 0


def test_a_quantised_model_is_refused(sana: Sana) -> None:
    from sana import SanaTransformer2DModel

    nano = SanaTransformer2DModel.from_pretrained("nano", subfolder="transformer", quantization_config="int8")
    nano.save_pretrained("small")
    said = sana("models", "grow", "./small", "out", "--layers", "9")
    assert said.code == 2
    assert "The model is quantised, so that its depth cannot change" in said.err
