"""`--memory`, `--max-vram` and `--quantize`: the same picture, what is said, what is refused, and the dry run."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import Sana
from PIL import Image

from sana.apps.cli.machine import Machine
from sana.apps.cli.sizing import Sizing
from sana.apps.cli.values import bytes_of, read_bytes
from sana.cards import CARDS
from sana.engine.estimate import Rates
from sana.engine.placement import pick_device
from sana.engine.request import Request
from sana.errors import InvalidInput

HALF = dict.fromkeys(("text_encoder", "transformer", "vae"), "bfloat16")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Rates(flops=dict.fromkeys(("float32", "bfloat16", "float16"), 1e12), traffic=1e10, ops=1e5)
    monkeypatch.setattr("sana.engine.estimate.measure", lambda *_: known)


def pixels(path: str) -> bytes:
    return Image.open(path).tobytes()


def test_the_picture_is_the_same_and_auto_says_what_it_does(sana: Sana) -> None:
    flags = {"plain": (), "low": ("--memory", "low"), "lowest": ("--memory", "lowest"), "vram": ("--max-vram", "0.4GB")}
    said = {name: sana("a fish", "--steps", "2", "--seed", "3", "-o", f"{name}.png", *flags[name]) for name in flags}
    assert [one.code for one in said.values()] == [0] * 4, [one.err for one in said.values()]
    assert len({pixels(f"{name}.png") for name in flags}) == 1
    assert "does not fit into --max-vram 0.4GB at once, so it is loaded block by block" in said["vram"].err
    assert "does not fit" not in said["plain"].err + said["low"].err
    quantized = sana("a fish", "--steps", "2", "--seed", "3", "-o", "int8.png", "--quantize", "int8")
    assert quantized.code == 0
    assert pixels("int8.png") != pixels("plain.png")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--memory", "low", "--max-vram", "8GB"), "--max-vram has no effect with --memory low"),
        (("--memory", "lowest", "--compile"), "--compile needs the whole model in memory"),
        (("--max-vram", "8"), "--max-vram takes a size such as 8GB"),
        (("--max-vram", "0GB"), "--max-vram takes a size such as 8GB"),
        (("--memory", "least"), "--memory"),
        (("--quantize", "int3"), "--quantize"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    sana: Sana, no_loading: None, words: tuple[str, ...], sentence: str
) -> None:
    said = sana("a fish", *words)
    assert said.code == 2
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1


def test_sizes() -> None:
    assert [bytes_of(text) for text in ("8GB", "1.5 gb", "900MB", "2G", "3m")] == [8e9, 1.5e9, 9e8, 2e9, 3e6]
    assert read_bytes(" 8GB ") == "8GB"
    for bad in ("", "GB", "-1GB", "8TB", "1e3GB"):
        with pytest.raises(InvalidInput, match="such as 8GB"):
            bytes_of(bad)


def document(sana: Sana, *words: str) -> Any:
    said = sana("a fox", "--seed", "3", "--dry-run", "--json", *words)
    assert said.code == 0, said.err
    return json.loads(said.out)["estimate"]


def test_a_dry_run_names_the_nearest_setting_that_fits(sana: Sana, no_loading: None, rates: None) -> None:
    large = ("-m", "sana-1.6b-1024", "--dtype", "bfloat16")
    fits = document(sana, *large, "--max-vram", "64GB")
    assert (fits["fits"], fits["memory_mode"], fits["nearest_that_fits"]) == (True, None, None)
    low = document(sana, *large, "--max-vram", "7GB")
    assert (low["fits"], low["memory_mode"]) == (True, "low")
    assert low["memory_bytes"] < 7e9 < fits["memory_bytes"]
    spoken = sana("a fox", "--seed", "3", "--dry-run", *large, "--max-vram", "7GB").out
    assert "with --memory low; --max-vram 7GB" in spoken
    eight = ("--batch-size", "8", "--count", "8", "--pag", "2")
    assert document(sana, *large, "--max-vram", "11GB")["memory_mode"] is None
    planned = document(sana, *large, *eight, "--max-vram", "11GB")
    assert (planned["fits"], planned["memory_mode"]) == (True, "low"), "auto plans for these pictures, not for one"
    mixed = sana(
        "--dry-run", "--json", "--sweep", "pag=0,2", "a fox", "--seed", "3", *large, *eight[:4], "--max-vram", "11GB"
    )
    assert json.loads(mixed.out)["estimate"]["memory_mode"] == "low", "and for the largest of several"
    too_much = document(sana, *large, *eight, "--max-vram", "2GB")
    assert (too_much["fits"], too_much["memory_mode"]) == (False, "lowest")
    assert too_much["nearest_that_fits"]["flags"] == "--batch-size 1"
    assert too_much["nearest_that_fits"]["memory_bytes"] < 2e9
    page = sana("a fox", "--seed", "3-10", "--dry-run", *large, *eight[:2], "--pag", "2", "--max-vram", "2GB").out
    assert "fits" in page
    assert "not like this; with --batch-size 1" in page
    hopeless = sana("a fox", "--seed", "3", "--dry-run", *large, "--max-vram", "100MB").out
    assert "not on this machine, with no setting" in hopeless
    smaller = document(sana, *large, "--max-vram", "64GB", "--quantize", "int8")
    assert smaller["memory_bytes"] < fits["memory_bytes"] - 3e9


def test_the_order_of_proposals() -> None:
    card = CARDS["sana-1.6b-1024"]
    request = Request(prompt="x", seed=1, width=2048, height=2048, batch_size=2).resolve(card)
    machine = Machine(model=card.name, memory="low")
    sizing = Sizing.of(machine, card, [request], HALF, None, pick_device("cpu"))
    flags = [flags for flags, _ in sizing._others()]
    assert flags[:3] == ["--memory lowest", "--batch-size 1", "--batch-size 1 --memory lowest"]
    assert flags[3:5] == ["--quantize int8", "--quantize int8 --memory lowest"]
    assert flags[5:] == ["--size 1024x1024 --memory lowest", "--size 512x512 --memory lowest"]
    sizes = [other.bytes for _, other in sizing._others()]
    assert sizes[0] < sizing.bytes
    assert sizes[-1] == min(sizes)


def test_a_folder_is_streamed_from_the_command(sana: Sana, tiny_folder: Path) -> None:
    words = ("a fish", "-m", str(tiny_folder), "--seed", "3", "--steps", "2", "--size", "256")
    for name in ("auto", "lowest"):
        said = sana(*words, "-o", f"{name}.png", "--memory", name)
        assert said.code == 0, said.err
    assert pixels("auto.png") == pixels("lowest.png")


def test_a_control_network_beside_the_model_is_in_the_plan(sana: Sana, tmp_path: Path, rates: None) -> None:
    Image.new("RGB", (64, 64)).save("edges.png")
    plain = document(sana, "-m", "sana-0.6b-1024", "--dtype", "bfloat16", "--max-vram", "64GB")
    words = ("-m", "sana-0.6b-1024", "--dtype", "bfloat16", "--control", "map", "edges.png")
    named = document(sana, *words, "--controlnet", "sana-0.6b-1024-controlnet", "--max-vram", "64GB")
    assert named["memory_bytes"] - plain["memory_bytes"] == pytest.approx(2 * 168_765_696, rel=0.1)
    assert named["download_bytes"] - plain["download_bytes"] > 3e8
    assert {"control", "encode"} <= set(named["seconds"])
    limit = f"{(plain['memory_bytes'] + named['memory_bytes']) / 2e6:.0f}MB"
    assert (
        document(sana, *words, "--controlnet", "sana-0.6b-1024-controlnet", "--max-vram", limit)["memory_mode"] == "low"
    )
    wrong = sana("a fox", "--dry-run", *words, "--controlnet", "sana-0.6b-1024")
    assert wrong.code == 2
    assert "sana-0.6b-1024 has no control network. Those that have:" in wrong.err


def test_loading_plans_for_the_pictures_and_the_network(sana: Sana, tiny_folder: Path, tmp_path: Path) -> None:
    from sana import SanaControlNetModel, SanaTransformer2DModel
    from sana.engine.parts import load
    from sana.engine.sparing import needs

    transformer = SanaTransformer2DModel.from_pretrained(tiny_folder, subfolder="transformer")
    SanaControlNetModel.from_transformer(transformer, num_layers=1).save_pretrained(tmp_path / "branch")
    Image.new("RGB", (64, 64)).save("edges.png")
    needed = needs(load(tiny_folder, device="cpu"), pick_device("cpu"))
    limit = f"{needed[None] / 1e9 + 0.001:.6f}GB"
    words = ("a fish", "-m", str(tiny_folder), "--seed", "3", "--steps", "1", "--max-vram", limit, "--device", "cpu")
    said = sana(*words, "-o", "one.png")
    assert said.code == 0, said.err
    assert "does not fit" not in said.err
    for name, more in {
        "large": ("--size", "512", "--no-binning"),
        "many": ("--count", "4", "--batch-size", "4"),
    }.items():
        said = sana(*words, *more, "-o", f"{name}.png")
        assert said.code == 0, said.err
        assert "does not fit into --max-vram" in said.err, name
    both = ("--control", "map", "edges.png", "--controlnet", str(tmp_path / "branch"))
    assert sana(*words, *both, "-o", "two.png").code == 0


def test_a_file_without_a_control_network_is_refused_before_anything_is_loaded(sana: Sana, tiny_folder: Path) -> None:
    Image.new("RGB", (64, 64)).save("edges.png")
    assert sana("convert", str(tiny_folder), "o.safetensors").code == 0
    words = ("a fish", "-m", str(tiny_folder), "--control", "map", "edges.png", "--controlnet", "o.safetensors")
    for more in ((), ("--dry-run",)):
        said = sana(*words, *more)
        assert said.code == 2
        assert "o.safetensors holds no control network. Name a file or a model that has one." in said.err
