"""The built-in model: its size, its layout, and that its pictures show what the prompt says."""

import itertools
import json
import logging
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from sana import SanaPipeline
from sana.cards import CARDS
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.engine.generate import generate_images
from sana.engine.parts import Parts, load
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.evaluation import runner
from sana.evaluation.detector import detect

FOLDER = Path(str(files("sana") / "assets" / "nano"))
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def nano() -> Parts:
    return load("nano")


def test_it_is_small_and_in_half_precision() -> None:
    sizes = {file: os.path.getsize(file) for file in FOLDER.rglob("*") if file.is_file()}
    assert sum(sizes.values()) < 45 * MEGABYTE
    weights = SanaTransformer2DModel.from_pretrained(FOLDER / "transformer", torch_dtype="auto")
    assert {p.dtype for p in weights.parameters()} == {torch.float16}


def test_it_is_read_in_float32_on_a_cpu_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sana"):
        for loaded in (load("nano", device="cpu"), SanaPipeline.from_pretrained("nano")):
            assert {part.dtype for part in (loaded.text_encoder, loaded.vae, loaded.transformer)} == {torch.float32}
    assert caplog.records == []


def test_the_card_describes_the_files() -> None:
    card = CARDS["nano"]
    transformer = SanaTransformer2DModel.from_pretrained(FOLDER / "transformer")
    autoencoder = AutoencoderDC.from_pretrained(FOLDER / "vae")
    assert transformer.config.to_dict() == card.transformer.to_dict()
    assert autoencoder.config.to_dict() == card.autoencoder.to_dict()
    assert transformer.num_parameters() == card.params


def test_the_reference_loads_every_part_and_draws_the_same_latents() -> None:
    import diffusers

    import sana

    options = {"height": 256, "width": 256, "use_resolution_binning": False, "num_inference_steps": 4}
    latents = []
    for kind in (sana.SanaPipeline, diffusers.SanaPipeline):
        pipe = kind.from_pretrained(FOLDER, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        prompts = ["a red fish above a yellow boat", "🟠🌙 ⬆️ 🟤🏠"]
        generator = torch.Generator().manual_seed(0)
        latents.append(pipe(prompts, generator=generator, output_type="latent", **options).images)
    difference = (latents[0] - latents[1]).square().mean().sqrt() / latents[1].square().mean().sqrt()
    assert float(difference) < 1e-5


def test_most_of_its_pictures_show_what_the_prompt_says(nano: Parts) -> None:
    orders = {
        "a red fish above a yellow boat": [("fish", "red"), ("boat", "yellow")],
        "一只紫色的猫": [("cat", "purple")],
        "🟢🌲": [("tree", "green")],
        "three blue hearts": [("heart", "blue")] * 3,
    }
    right = {}
    for prompt, expected in orders.items():
        images = generate_images(nano, Request(prompt=prompt, seed=11, count=4)).images
        read = [sorted((one.kind, one.colour) for one in detect(np.asarray(image))) for image in images]
        right[prompt] = sum(found == sorted(expected) for found in read)
    assert sum(right.values()) >= 12, right
    assert min(right.values()) >= 2, right


def test_sizes_it_was_not_trained_for_are_refused(nano: Parts) -> None:
    with pytest.raises(InvalidInput, match="256"):
        generate_images(nano, Request(prompt="a red fish", width=512, height=512, seed=0))


def test_the_pipeline_bins_to_256_and_resizes_to_what_is_asked() -> None:
    pipe = SanaPipeline.from_pretrained("nano")
    pipe.set_progress_bar_config(disable=True)
    shapes = []

    def look(pipe: object, i: int, t: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shapes.append(tuple(tensors["latents"].shape))
        return tensors

    image = pipe("a red fish", num_inference_steps=2, callback_on_step_end=look).images[0]
    assert image.size == (1024, 1024)
    assert set(shapes) == {(1, 32, 8, 8)}


@pytest.mark.slow
def test_its_tokenizer_is_what_the_recipe_trains() -> None:
    from sana.training.tokenizer import train_tokenizer

    shipped = Tokenizer.from_file(str(FOLDER / "tokenizer" / "tokenizer.json"))
    trained = train_tokenizer(1024, 0)
    assert trained.get_vocab() == shipped.get_vocab()
    text = "a red 🐟 above a 黄色 boat, ñandú"
    assert trained.encode(text).ids == shipped.encode(text).ids


def test_the_readmes_table_is_the_report_that_was_measured() -> None:
    root = Path(__file__).parents[2]
    scores = json.loads((root / "recipes" / "nano" / "reports" / "geneval.json").read_text(encoding="utf-8"))["scores"]
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("| task") and "ground truth" in line)
    rows = {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines[heading + 2 :]):
        task, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[task] = cells
    assert len(scores) == 7
    for task, score in scores.items():
        share = score["score"]["share"]
        assert rows[task][0].startswith(f"{share:.2f} ± "), task
        assert share >= (0.80 if task == "overall" else 0.60)


@pytest.mark.slow
def test_the_shipped_weights_still_reach_the_gates(nano: Parts) -> None:
    report = runner.run("geneval", nano, runner.Settings(prompts=12, images=2, batch_size=16)).to_dict()["scores"]
    shares = {task: score["score"]["share"] for task, score in report.items()}
    assert shares.pop("overall") >= 0.80
    assert min(shares.values()) >= 0.50, shares  # 24 pictures each
    restored = runner.run("autoencoder", nano, runner.Settings(scenes=64)).to_dict()
    assert restored["psnr"] >= 33
    assert restored["read_right"]["share"] >= 0.95
