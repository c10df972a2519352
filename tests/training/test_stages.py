"""Resolution stages: each goes on from the export of the one before, at twice the size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sana.cards import CARDS
from sana.engine.generate import generate_images
from sana.engine.parts import load
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.nn.embeddings import position_table
from sana.training.config import OptimizerSettings, RunSettings, build, load_recipe
from sana.training.loop import Trainer
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.rehearsal import card_of

ROOT = Path(__file__).parents[2]
STAGES = ("scratch-512", "stage-1024", "stage-2k", "stage-4k")
CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of 512 px with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def stage(start: Path, pictures: Path, **changes: Any) -> FlowMatchingObjective:
    run = RunSettings(steps=1, batch_size=1, precision="float32", ema=0.0, evaluate_every=1000)
    settings = FlowMatchingSettings(start=str(start), data={"path": str(pictures)}, prompts=("a",), **changes)
    return FlowMatchingObjective(settings, run, CPU)


def trained(one: FlowMatchingObjective, folder: Path) -> Path:
    trainer = Trainer(one, one.run, OptimizerSettings(lr=1e-3, warmup=0), folder)
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    for _ in trainer.steps():
        pass
    trainer.export(folder / "export")
    return folder / "export"


def test_a_stage_goes_on_at_twice_the_size_with_the_weights_of_the_one_before(
    tiny_folder: Path, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stage(tiny_folder, pictures, model={"interpolation_scale": 1.0})
    assert first.origin.batches.batch(0, torch.Generator()).latents.shape[-2:] == (8, 8)
    before = trained(first, tmp_path / "first")
    learnt = load(before, device="cpu", dtype=torch.float32).transformer
    card = replace(
        CARDS["sana-1.6b-4k"],
        name="tiny-512",
        base_size=512,
        transformer=replace(learnt.config, sample_size=16, interpolation_scale=2.0),
    )
    monkeypatch.setitem(CARDS, "tiny-512", card)
    second = stage(before, pictures, model={"sample_size": 16, "interpolation_scale": 2.0}, card="tiny-512")
    transformer = second.trainable.transformer
    carried = transformer.state_dict()
    assert carried.keys() == learnt.state_dict().keys()
    assert all(torch.equal(carried[name], tensor) for name, tensor in learnt.state_dict().items())
    assert any(not torch.equal(t, carried[n]) for n, t in load(tiny_folder).transformer.state_dict().items())
    assert second.origin.batches.batch(0, torch.Generator()).latents.shape[-2:] == (16, 16)
    width = transformer.config.inner_dim
    torch.testing.assert_close(transformer._position_table((16, 16), CPU), position_table(16, 16, width, 16, 2.0))
    after = trained(second, tmp_path / "second")
    config = json.loads((after / "transformer" / "config.json").read_text())
    assert (config["sample_size"], config["interpolation_scale"]) == (16, 2.0)
    parts = load(after, device="cpu")
    assert parts.card is card
    assert parts.flow_shift == card.flow_shift == 6.0
    assert generate_images(parts, Request(prompt="a", steps=1, seed=1)).image.size == (512, 512)


def test_a_model_of_another_size_does_not_keep_the_card_of_its_start(pictures: Path, tmp_path: Path) -> None:
    export = trained(stage(Path("nano"), pictures, model={"sample_size": 16}), tmp_path / "run")
    parts = load(export, device="cpu")
    assert parts.card is None
    assert parts.effective_card.base_size == 512


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"sample_size": 64}, "data": {"path": "p", "size": 1024}}, "is a model of 2048 px, but .* is 1024"),
        ({"model": {"sample_size": 0}}, "flow_matching.model.sample_size must be a number above 0, but is 0"),
        ({"model": {"interpolation_scale": -1.0}}, "interpolation_scale must be a number above 0, but is -1.0"),
        ({"model": {"interpolation_scale": "none"}}, "interpolation_scale must be a number above 0, but is 'none'"),
        ({"model": {"sample_size": 64}, "train": "lora"}, 'sample_size is of a whole model, but train = "lora"'),
        (
            {"model": {"sample_size": 64}, "card": "sana-1.6b-4k"},
            "card is that of sana-1.6b-4k, whose sample_size is 128, but .* is 64. Make them agree",
        ),
        (
            {"model": {"interpolation_scale": 1.0}, "card": "sana-1.6b-1024"},
            "whose interpolation_scale is None, but .* is 1.0",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        FlowMatchingSettings(start="sana-1.6b-1024", **changes)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_stage_makes_of_what_the_one_before_made_what_is_published(number: int) -> None:
    before, here = (
        build(FlowMatchingSettings, load_recipe(ROOT / f"recipes/sana-1.6b/{name}.toml").settings, "flow_matching")
        for name in STAGES[number - 1 : number + 1]
    )
    start, made = card_of(here.start), CARDS[here.card]
    assert start is not None
    assert here.start == (before.card or before.start)
    assert replace(start.transformer, **here.model) == made.transformer
    assert here.shift == made.flow_shift
    assert here.data["size"] == made.base_size == 2 * start.base_size
