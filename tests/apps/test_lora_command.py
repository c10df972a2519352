"""`sana lora`: told, converted, merged."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from command import Sana
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.cards import CARDS
from sana.checkpoints.lora.bases import layers_of
from sana.checkpoints.lora.files import read_lora
from sana.checkpoints.weights import on_meta
from sana.models.linear_dit import LinearDiT
from tiny_lora import ATTENTION, random_lora


def adapter_for(card: str, ends: Sequence[str] = ATTENTION, rank: int = 2) -> dict[str, Tensor]:
    with on_meta():
        model = LinearDiT(CARDS[card].transformer)
    return random_lora(model, rank=rank, ends=ends, std=0.05)


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    told = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 6})
    titles = {"modelspec.title": "Foxes", "modelspec.trigger_phrase": "sks fox", "other": "kept"}
    save_file(adapter_for("nano"), tmp_path / "fox.safetensors", {"lora_adapter_metadata": told, **titles})
    return tmp_path / "fox.safetensors"


def test_info(sana: Sana, fox: Path) -> None:
    said = sana("lora", "info", "fox.safetensors")
    assert said.code == 0
    lines = [" ".join(line.split()) for line in said.out.splitlines()]
    assert lines[0] == "fox.safetensors"
    for line in (
        "title Foxes",
        "trigger words sks fox",
        "kind LoRA, dialect peft",
        "rank 2; alpha 6",
        "layers 48 in 6 blocks, width 256",
        "fits nano, nano-sprint, nano-controlnet",
    ):
        assert line in lines, said.out
    assert "attn1.to_q x6" in said.out


@pytest.mark.parametrize("card", ["sana-0.6b-1024", "sana-1.6b-1024", "sana1.5-4.8b-1024", "sana-sprint-1.6b-1024"])
def test_info_tells_which_models_it_fits(sana: Sana, tmp_path: Path, card: str) -> None:
    tensors = adapter_for(
        card, ends=("attn1.to_q",) if "sprint" not in card else ("guidance_embedder.linear_1", "attn1.to_q")
    )
    small = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(small, tmp_path / "a.safetensors")
    document = json.loads(sana("lora", "info", "a.safetensors", "--json").out)
    width = CARDS[card].transformer.inner_dim
    assert card in document["fits"]
    assert document["base_width"] == width
    assert all(CARDS[name].transformer.inner_dim == width for name in document["fits"])
    assert document["blocks"] == CARDS[card].transformer.num_layers
    assert ("4.8b" in card) == any("4.8b" in name for name in document["fits"])


def test_info_of_something_else(sana: Sana, tmp_path: Path) -> None:
    save_file({"unet.a.lora_A.weight": torch.ones(1, 1), "unet.a.lora_B.weight": torch.ones(1, 1)}, "a.safetensors")
    said = sana("lora", "info", "a.safetensors")
    assert said.code == 0
    assert "no known model" in said.out
    assert json.loads(sana("lora", "info", "a.safetensors", "--json").out)["fits"] == []
    save_file({"weight": torch.ones(1)}, "b.safetensors")
    said = sana("lora", "info", "b.safetensors")
    assert said.code == 3
    assert "Make sure all LoRA param names contain" in said.err


@pytest.mark.parametrize("dialect", ["peft", "kohya", "comfyui"])
def test_convert_there_and_back(sana: Sana, fox: Path, dialect: str) -> None:
    assert (
        sana("lora", "convert", "fox.safetensors", "out.safetensors", "--to", dialect, "--title", "Red foxes").code == 0
    )
    assert sana("lora", "convert", "out.safetensors", "back.safetensors", "--to", "peft").code == 0
    original, back = load_file(fox), load_file("back.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in original.items())
    told = read_lora(Path("back.safetensors"), layers_of(CARDS["nano"].transformer)).metadata
    assert told["modelspec.title"] == "Red foxes"
    assert told["modelspec.trigger_phrase"] == "sks fox"
    assert told["modelspec.architecture"] == "nano/lora"
    assert told["other"] == "kept"
    document = json.loads(sana("lora", "info", "out.safetensors", "--json").out)
    assert document["dialect"] == dialect


def test_convert_into_a_folder(sana: Sana, fox: Path) -> None:
    assert sana("lora", "convert", "fox.safetensors", "out", "--to", "peft").code == 0
    assert Path("out/pytorch_lora_weights.safetensors").is_file()
    said = sana("lora", "convert", "fox.safetensors", "out", "--to", "peft")
    assert said.code == 2
    assert "exists already" in said.err
    assert sana("lora", "convert", "fox.safetensors", "out", "--to", "peft", "--force").code == 0


def test_merge_into_the_built_in_model(sana: Sana, fox: Path) -> None:
    said = sana("lora", "merge", "nano", "fox.safetensors:0.5", "merged")
    assert said.code == 0
    assert "48 of 48 layers matched, rank 2" in said.out
    options = ("--steps", "1", "--seed", "1", "--no-thumbnail")
    assert sana("a fox", "-m", "./merged", "-o", "one.png", *options).code == 0
    drawn = sana("a fox", "-m", "nano", "--lora", "fox.safetensors", "0.5", "-o", "two.png", *options)
    assert drawn.code == 0
    assert "LoRA 'fox': 48 of 48 layers matched, rank 2" in drawn.err
    assert sana("a fox", "-m", "nano", "-o", "three.png", *options).code == 0
    from PIL import Image, ImageChops

    one, two, three = (Image.open(name).convert("RGB") for name in ("one.png", "two.png", "three.png"))
    assert max(high for _, high in ImageChops.difference(one, two).getextrema()) <= 1
    assert max(high for _, high in ImageChops.difference(one, three).getextrema()) > 1


@pytest.mark.parametrize(
    ("words", "told", "code"),
    [
        (["lora"], "Say what to do", 2),
        (["lora", "inof", "x"], "Did you mean 'info'", 2),
        (["lora", "info"], "Give one adapter", 2),
        (["lora", "info", "none.safetensors"], "There is no adapter", 3),
        (["lora", "info", "fox.safetensors", "--to", "peft"], "--to means nothing to `sana lora info`", 2),
        (["lora", "convert", "fox.safetensors", "x"], "Give two files and a dialect", 2),
        (["lora", "convert", "fox.safetensors", "x", "--to", "kohia"], "kohya", 2),
        (["lora", "merge", "nano", "out"], "Give model, adapters and target", 2),
        (["lora", "merge", "nano", "fox.safetensors:much", "out"], "is no scale of an adapter", 2),
        (["lora", "merge", "nano", "fox.safetensors", "fox.safetensors"], "exists already", 2),
        (["lora", "merge", "none", "fox.safetensors", "out"], "There is no model", 3),
    ],
)
def test_faults_are_one_sentence(sana: Sana, fox: Path, words: list[str], told: str, code: int) -> None:
    said = sana(*words)
    assert said.code == code, said.err
    assert told in said.err
    assert "Traceback" not in said.err
    assert not Path("out").exists()


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from sana.apps.cli import main; main(['lora', '--help']); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert "sana lora convert" in run.stdout
