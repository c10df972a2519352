"""Where the parts of built-in models lie: in their own folder, or in that of the model they share them with."""

import dataclasses
import json
from pathlib import Path

import pytest

from sana.cards import CARDS
from sana.checkpoints.built_in import (
    folder_of,
    installed,
    is_built_in,
    missing_parts,
    part_folder,
    shared_folders,
)
from sana.checkpoints.hub import locate
from sana.checkpoints.layout import missing_files, sole_variant
from sana.errors import ModelNotFound

SPRINT = CARDS["nano-sprint"]
INDEX = {"_class_name": "SanaSprintPipeline", "vae": ["diffusers", "AutoencoderDC"], "transformer": ["diffusers", "T"]}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation in which nano has an autoencoder, and nano-sprint a transformer; both empty files."""
    for file in (
        "nano/vae/config.json",
        "nano/vae/diffusion_pytorch_model.fp16.safetensors",
        "nano-sprint/transformer/config.json",
        "nano-sprint/transformer/diffusion_pytorch_model.fp16.safetensors",
    ):
        path = tmp_path / "assets" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "assets" / "nano-sprint" / "model_index.json").write_text(json.dumps(INDEX))
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    return tmp_path / "assets"


def test_a_shared_part_lies_with_the_base_and_every_other_in_the_folder_itself(package: Path) -> None:
    sprint, nano = package / "nano-sprint", package / "nano"
    assert {name: part_folder(sprint, name) for name in ("vae", "tokenizer", "transformer", "scheduler", "")} == {
        "vae": nano / "vae",
        "tokenizer": nano / "tokenizer",
        "transformer": sprint / "transformer",
        "scheduler": sprint / "scheduler",
        "": sprint,
    }
    assert shared_folders(sprint) == (nano / "tokenizer", nano / "text_encoder", nano / "vae")
    assert shared_folders(nano) == ()
    assert part_folder(nano, "vae") == nano / "vae"


def test_a_folder_that_only_names_the_card_shares_nothing(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "nano-sprint"
    copy.mkdir(parents=True)
    (copy / "model_index.json").write_text((package / "nano-sprint" / "model_index.json").read_text())
    assert part_folder(copy, "vae") == copy / "vae"
    assert shared_folders(copy) == ()
    assert not is_built_in(copy, SPRINT)
    assert is_built_in(package / "nano" / ".." / "nano-sprint", SPRINT)


def test_files_and_variants_are_looked_for_where_the_parts_are(package: Path) -> None:
    folder = locate("nano-sprint").folder
    assert folder == package / "nano-sprint"
    assert sole_variant(folder, ("vae", "transformer")) == "fp16"
    assert missing_files(folder, None, "fp16") == ()
    assert missing_files(folder, None, None) == (
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    )


def test_what_an_installation_lacks_is_named(package: Path) -> None:
    assert missing_parts(SPRINT) == ()
    for path in sorted((package / "nano").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert missing_parts(SPRINT) == ("vae",)
    assert missing_parts(CARDS["nano-controlnet"]) == ("model_index.json",)
    assert installed(SPRINT) == folder_of(SPRINT)
    (package / "nano").rmdir()
    with pytest.raises(ModelNotFound, match=r"'nano' is not part of this installation: install it again\."):
        locate("nano-sprint")
    with pytest.raises(ModelNotFound, match="'nano-controlnet' is not part of this installation"):
        locate("nano-controlnet")


def test_a_model_of_the_same_architecture_in_a_folder_of_its_own_is_whole(package: Path) -> None:
    from sana.engine.model_card import at_depth

    deeper = dataclasses.replace(SPRINT.transformer, num_layers=8)
    grown = at_depth(SPRINT, deeper, 8_000_000)
    assert grown is not None
    assert (grown.base, grown.shared, grown.folder, grown.is_single_file) == (None, (), None, False)
    assert grown.draws_cutouts
