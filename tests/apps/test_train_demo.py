"""`sana train --demo`: what it teaches can be seen, is not there without it, and is loaded by the reference."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.apps.cli import main
from sana.apps.cli.demo import ADAPTER, demo
from sana.data import cutouts

PALM = 0.46
"""Overlap from which on a thing is a palm: the trees that the model knows reach 0.38, what it learnt 0.53 and more."""
PROMISED = 180
"""Seconds of one core that the demo may take."""


def test_the_demo_brings_its_pictures_and_says_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--run.steps", "2", "--run.evaluate_every", "2", "--flow_matching.prompts", '["a"]']
    assert main(["train", "--demo", *words]) == 0
    out, err = capsys.readouterr()
    export = Path("runs/demo/palms/export")
    assert out.strip() == str(export)
    assert f"--lora {export / ADAPTER}" in err
    assert (export / ADAPTER).is_file()


def test_the_demo_takes_no_other_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--demo", "other.toml"]) == 2
    assert "`--demo` brings its own recipe" in capsys.readouterr().err


def palm_likeness(picture: Image.Image, palms: list[Image.Image]) -> float:
    """The best overlap of the thing in a picture with one of the palms, both moved to the middle of their boxes."""
    return max(_overlap(_mask(picture), _mask(palm)) for palm in palms)


def _mask(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    inked = np.abs(pixels - pixels[:4].reshape(-1, 3).mean(0)).sum(2) > 120
    rows, columns = np.where(inked.any(1))[0], np.where(inked.any(0))[0]
    if not len(rows):
        return np.zeros((64, 64), bool)
    box = inked[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.asarray(Image.fromarray(box).resize((64, 64)))


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 0.0


@pytest.mark.slow
def test_the_demo_teaches_palms_in_every_colour_and_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffusers
    from safetensors.torch import load_file

    from sana.checkpoints.hub import locate

    monkeypatch.chdir(tmp_path)
    # In a process of its own, whose time is that of the demo alone, however busy the machine is.
    before, environment = os.times(), {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "sana", "train", "--demo"], check=True, env=environment, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent <= PROMISED
    adapter = Path("runs/demo/palms/export") / ADAPTER
    pictures = Path(demo()[1]["flow_matching.data.path"])
    palms = [Image.open(file) for file in sorted(pictures.glob("*.png"))[:8]]
    found = {"with": 0, "without": 0}
    right = 0
    for colour, paint in cutouts.COLOURS.items():
        for name, words in (("with", ["--lora", str(adapter)]), ("without", [])):
            out = tmp_path / name / f"{colour}.png"
            out.parent.mkdir(exist_ok=True)
            assert main([f"a {colour} palm tree", "--seed", "5", *words, "-o", str(out)]) == 0
            picture = Image.open(out)
            found[name] += palm_likeness(picture, palms) > PALM
            if name == "with":
                pixels = np.asarray(picture.convert("RGB"), np.float32)[_thing(picture)]
                nearest = min(cutouts.COLOURS.values(), key=lambda c: float(np.abs(np.median(pixels, 0) - c).sum()))
                right += nearest == paint
    assert found["with"] >= 7, found
    assert found["without"] <= 1, found
    assert right >= 7
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(locate("nano").folder / "transformer")
    theirs.load_lora_adapter(load_file(adapter), prefix="transformer")
    assert len(theirs.peft_config) == 1
    capsys.readouterr()


def _thing(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    return np.abs(pixels - pixels[:4].reshape(-1, 3).mean(0)).sum(2) > 120
