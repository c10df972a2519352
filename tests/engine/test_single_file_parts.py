"""An original file is a model wherever one is named: its folder, or the published model, supplies the other parts."""

from pathlib import Path

import pytest
import torch

import sana
from sana.checkpoints.convert import Conversion, convert
from sana.checkpoints.folder import save_parts
from sana.engine.parts import load
from sana.errors import CheckpointError, InvalidInput
from tiny_model import make_tiny_parts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The transformer of a tiny model as an original file in the model's folder, in other weights than there."""
    parts = make_tiny_parts()
    save_parts(tmp_path / "model", parts.components)
    with torch.no_grad():
        parts.transformer.proj_out.bias.add_(0.5)
    parts.transformer.save_pretrained(tmp_path / "changed")
    (tmp_path / "model" / "checkpoints").mkdir()
    path = tmp_path / "model" / "checkpoints" / "mine.safetensors"
    convert(Conversion(source=tmp_path / "changed", target=path))
    return path


def test_a_file_is_loaded_with_the_parts_around_it(file: Path) -> None:
    loaded, folder = load(file, device="cpu"), load(file.parents[1], device="cpu")
    assert torch.equal(loaded.transformer.proj_out.bias, folder.transformer.proj_out.bias + 0.5)
    assert torch.equal(loaded.transformer.proj_out.weight, folder.transformer.proj_out.weight)
    assert loaded.name == "mine.safetensors"
    ours, theirs = loaded.vae.state_dict(), folder.vae.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    request = sana.Request(prompt="a fox", width=64, height=64, steps=1, seed=1, binning=False)
    one, other = sana.generate_images(loaded, request), sana.generate_images(folder, request)
    assert one.images[0].tobytes() != other.images[0].tobytes()


def test_a_file_of_unknown_kind_says_what_it_lacks(file: Path, tmp_path: Path) -> None:
    alone = file.rename(tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="no published model has"):
        load(alone, device="cpu")
    with pytest.raises(InvalidInput, match="no reference to a file"):
        load("hf://somebody", device="cpu")
