"""A file of a repository, named by `hf://`, wherever the command takes a model."""

import shutil
from pathlib import Path

import pytest
from fake_hub import Hub
from huggingface_hub import constants
from PIL import Image

import sana
from sana.apps.cli import main
from sana.engine.metadata import read_metadata

REPO, FILE = "somebody/Small", "checkpoints/small.safetensors"
NAME = f"hf://{REPO}/{FILE}"
ORDER = ("a red fish", "--seed", "1", "--steps", "2", "-q")


def pixels(name: str) -> bytes:
    with Image.open(name) as picture:
        return picture.tobytes()


def test_one_file_draws_through_every_door(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The original file of the built-in model, in a repository of its parts, draws what the built-in model draws."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(Path(sana.__file__).parent / "assets" / "nano", tmp_path / "model")
    assert main(["convert", "nano", "small.safetensors", "-q"]) == 0
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.push(REPO, {**files, FILE: Path("small.safetensors").read_bytes()})
    assert main([*ORDER, "-o", "built-in.png"]) == 0
    assert main(["models", "pull", REPO, "-q"]) == 0, capfd.readouterr().err
    assert main([*ORDER, "-m", NAME, "-o", "from-hub.png"]) == 0, capfd.readouterr().err
    assert hub.gets().count(FILE) == 1
    assert pixels("built-in.png") == pixels("from-hub.png")
    assert read_metadata("from-hub.png").model["name"] == "small.safetensors"
    Path("many.txt").write_text("a red fish\na blue moon\n")
    assert main(["batch", "many.txt", "-m", NAME, "--steps", "2", "-q", "-o", "many"]) == 0, capfd.readouterr().err
    assert len(list(Path("many").glob("*.png"))) == 2
