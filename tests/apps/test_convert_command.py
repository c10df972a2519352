"""`sana convert`: the built-in model into original files and back, what it says, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import Sana

import sana as package

NANO = Path(package.__file__).parent / "assets" / "nano"
FILE = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.skipif(not NANO.is_dir(), reason="the built-in model is not in this checkout")


def test_the_built_in_model_there_and_back(sana: Sana) -> None:
    said = sana("convert", "nano", "dit.safetensors")
    assert said.code == 0
    assert "6 blocks of width 256, 256 px, normed queries and keys" in said.out
    assert sana("convert", "nano", "vae.safetensors", "--part", "vae").code == 0
    said = sana("convert", "dit.safetensors", "whole", "--card", "nano", "--base", "nano")
    assert said.code == 0
    assert "pipeline" in said.out
    assert "pos_embed" in said.out
    assert Path("whole/transformer", FILE).read_bytes() == (NANO / "transformer" / FILE).read_bytes()
    said = sana("convert", "vae.safetensors", "vae", "--config", str(NANO / "vae"))
    assert "autoencoder f32c32, scaling 1.00543" in said.out
    assert Path("vae", FILE).read_bytes() == (NANO / "vae" / FILE).read_bytes()
    drawn = sana("a red fish", "-m", "whole", "--steps", "1", "--seed", "3")
    again = sana("a red fish", "-m", "nano", "--steps", "1", "--seed", "3", "-o", "nano.png")
    assert (drawn.code, again.code) == (0, 0)


def test_the_document_says_all(sana: Sana) -> None:
    said = sana("convert", "nano", "dit.safetensors", "--json")
    document: dict[str, Any] = json.loads(said.out)
    assert (document["form"], document["target"]) == ("original", "dit.safetensors")
    assert document["configs"]["transformer"]["num_layers"] == 6
    said = sana("convert", "dit.safetensors", "folder", "--json")
    document = json.loads(said.out)
    assert document["assumed"][0] == "16 heads of the attention to the caption"
    assert document["left_out"] == ["pos_embed", "y_embedder.y_embedding"]


def test_what_cannot_be_is_refused_in_one_sentence(sana: Sana) -> None:
    Path("taken.safetensors").write_bytes(b"mine")
    refused = {
        ("convert",): (2, "Give what to convert and where to"),
        ("convert", "nano"): (2, "Give what to convert and where to"),
        ("convert", "nano", "x.pth"): (2, "would be a pickle"),
        ("convert", "nano", "taken.safetensors"): (2, "--force"),
        ("convert", "nowhere.pth", "out"): (3, "There is no"),
        ("convert", "taken.safetensors", "out"): (3, "damaged or cut short"),
        ("convert", "nano", "out", "--card", "sana-1.6b-102"): (2, "Did you mean 'sana-1.6b-1024'?"),
        ("convert", "nano", "out", "--dtype", "fp8"): (2, "fp32, fp16"),
        ("convert", "hf://nobody", "out"): (2, "no reference to a file on the hub"),
    }
    for words, (code, text) in refused.items():
        said = sana(*words)
        assert said.code == code, (words, said.err)
        assert text in said.err, words
        assert len(said.err.splitlines()) == 1, words
    assert Path("taken.safetensors").read_bytes() == b"mine"
    assert sana("convert", "nano", "taken.safetensors", "--force").code == 0
