"""A model named by one file of the original layout: its folder gives the rest, and memory options hold for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana import Request, generate_images
from sana.checkpoints.convert import Conversion, convert
from sana.checkpoints.folder import save_parts
from sana.engine.parts import load
from sana.errors import CheckpointError
from sana.memory.quantize import noted
from tiny_model import lively, make_tiny_parts, tiny_transformer

REQUEST = Request(prompt="a red fox", seed=3, steps=2, width=64, height=64, binning=False)
# The original layout fixes the widths of heads.
SIZES = {"attention_head_dim": 32, "num_attention_heads": 1, "num_cross_attention_heads": 1,
         "cross_attention_head_dim": 32, "cross_attention_dim": 32}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a pipeline, and beside its parts the original file of another transformer of the same kind."""
    path = tmp_path_factory.mktemp("files") / "model"
    save_parts(path, make_tiny_parts(**SIZES).components)
    other = lively(tiny_transformer(**SIZES), 7)
    with torch.no_grad():
        other.proj_out.weight.mul_(-1)
    other.save_pretrained(path / "other")
    convert(Conversion(source=path / "other", target=path / "checkpoints" / "other.safetensors"))
    return path


def test_the_file_takes_the_place_of_the_folder_s_transformer(folder: Path) -> None:
    file = folder / "checkpoints" / "other.safetensors"
    parts = load(file, device="cpu", dtype="float32")
    assert parts.name == "other.safetensors"
    wanted = load(folder, device="cpu", dtype="float32")
    before = generate_images(wanted, REQUEST)
    wanted.transformer = type(wanted.transformer).from_pretrained(folder / "other")
    made = generate_images(parts, REQUEST)
    assert np.array_equal(np.array(made.images[0]), np.array(generate_images(wanted, REQUEST).images[0]))
    assert not np.array_equal(np.array(made.images[0]), np.array(before.images[0]))


def test_quantised_and_with_parts_that_come_and_go(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "checkpoints" / "other.safetensors"
    plain = load(file, device="cpu", dtype="float32", quantization_config="int8")
    assert noted(plain.transformer) is not None
    assert noted(plain.text_encoder) is not None
    spared = load(file, device="cpu", dtype="float32", quantization_config="int8", memory="lowest")
    assert "transformer cannot be read again from safetensors files" in caplog.text
    assert not any(weight.is_meta for weight in spared.transformer.parameters())
    assert all(weight.is_meta for weight in spared.vae.parameters())
    one, other = (np.array(generate_images(parts, REQUEST).images[0]) for parts in (plain, spared))
    assert np.array_equal(one, other)


def test_files_that_hold_no_transformer_or_lie_alone(folder: Path, tmp_path: Path) -> None:
    convert(Conversion(source=folder / "vae", target=tmp_path / "vae.safetensors"))
    with pytest.raises(CheckpointError, match="holds no transformer"):
        load(tmp_path / "vae.safetensors", device="cpu")
    lonely = tmp_path / "other.safetensors"
    lonely.write_bytes((folder / "checkpoints" / "other.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="its text encoder is unknown"):
        load(lonely, device="cpu")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError):
        load(tmp_path / "x.safetensors", device="cpu")
