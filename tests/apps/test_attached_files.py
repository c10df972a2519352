"""Pictures that were made from others: what `sana info` shows, and how `sana replay` finds the files again."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Sana
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sana import Parts, Request, Result, generate_images, save_png
from sana.engine.attachments import ControlRequest, FileRef, LoraRequest
from sana.engine.metadata import COMPOSITE_TYPE, SOURCE_TYPE, read_metadata
from sana.engine.parts import load

SIZE = {"width": 256, "height": 256}


@pytest.fixture(scope="module")
def nano() -> Parts:
    return load("nano")


@pytest.fixture(scope="module")
def made(nano: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edits of the built-in model, with everything they were made from beside them."""
    folder = tmp_path_factory.mktemp("made")
    generate_images(nano, Request(prompt="a red fish", seed=7, steps=2)).image.save(folder / "fish.png")
    mask = Image.new("L", (256, 256))
    ImageDraw.Draw(mask).rectangle((20, 20, 120, 200), fill=255)
    mask.save(folder / "hole.png")
    width = nano.transformer.config.num_attention_heads * nano.transformer.config.attention_head_dim
    generator = torch.Generator().manual_seed(0)
    low = {name: torch.randn(shape, generator=generator) for name, shape in (("A", (2, width)), ("B", (width, 2)))}
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    save_file({key.format(name): tensor for name, tensor in low.items()}, folder / "style.safetensors")
    edit = Request(prompt="a blue cat", seed=3, steps=3, image=folder / "fish.png", mask=folder / "hole.png")
    lora = LoraRequest(source=folder / "style.safetensors", scale=0.5)
    for name, request in (
        ("cat.png", edit.replace(feather=5)),
        ("pag.png", edit.replace(mask=None, pag_scale=2.0, loras=(lora,))),
        ("wide.png", edit.replace(mask=None, outpaint=(0, 0, 40, 10))),
    ):
        save_png(generate_images(nano, request), 0, folder / name)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "here"))


@pytest.mark.parametrize("name", ["cat.png", "pag.png", "wide.png"])
def test_an_edited_picture_is_drawn_again_to_the_last_bit(sana: Sana, here: Path, name: str) -> None:
    said = sana("replay", str(here / name))
    assert (said.code, said.out) == (0, "identical\n"), said.err


@pytest.mark.parametrize(
    ("name", "gone", "flag"),
    [("cat.png", "fish.png", "--image"), ("cat.png", "hole.png", "--mask"), ("pag.png", "style.safetensors", "--lora")],
)
def test_what_is_not_beside_it_is_asked_for(sana: Sana, here: Path, name: str, gone: str, flag: str) -> None:
    (here / "elsewhere").mkdir()
    moved = shutil.move(here / gone, here / "elsewhere" / f"other name{Path(gone).suffix}")
    said = sana("replay", str(here / name))
    assert (said.code, said.out) == (3, "")
    assert f"It was made from {gone}, and it is not beside it. Say where it is with {flag} FILE." in said.err
    said = sana("replay", str(here / name), flag, str(here / "none"))
    assert said.code == 3
    assert "there is none at" in said.err
    said = sana("replay", str(here / name), flag, str(moved))
    assert (said.code, said.out) == (0, "identical\n"), said.err


def test_another_file_of_that_name_is_refused(sana: Sana, here: Path) -> None:
    changed = Image.open(here / "fish.png").convert("RGB")
    changed.putpixel((3, 3), (1, 2, 3))
    changed.save(here / "fish.png")
    said = sana("replay", str(here / "cat.png"))
    assert said.code == 2
    assert "fish.png is not the file that was used, its SHA-256 differs" in said.err
    (here / "style.safetensors").write_bytes((here / "style.safetensors").read_bytes() + b" ")
    said = sana("replay", str(here / "pag.png"))
    assert said.code == 2
    assert "is not the file that was used" in said.err


def test_the_same_pixels_in_another_file_are_the_same_picture(sana: Sana, here: Path) -> None:
    Image.open(here / "fish.png").convert("RGB").save(here / "fish.webp", lossless=True)
    (here / "fish.png").unlink()
    said = sana("replay", str(here / "cat.png"), "--image", str(here / "fish.webp"))
    assert (said.code, said.out) == (0, "identical\n"), said.err


def test_files_that_were_not_used_are_refused(sana: Sana, here: Path) -> None:
    for words in (("--mask", "hole.png"), ("--control-image", "fish.png"), ("--lora", "a", "--lora", "b")):
        said = sana("replay", str(here / "pag.png"), *words)
        assert said.code == 2
        assert words[0] in said.err


def test_info_shows_everything_and_its_command_draws_the_same(sana: Sana, here: Path, monkeypatch: Any) -> None:
    said = sana("info", str(here / "cat.png"), str(here / "pag.png"), str(here / "wide.png"))
    assert said.code == 0
    shown = {line.split("  ")[1].strip(): line for line in said.out.splitlines() if line.startswith("  ")}
    for words in ("fish.png (SHA-256 ", "hole.png (SHA-256 ", "style.safetensors (SHA-256 ", "scale 0.5", "bottom 10"):
        assert words in said.out
    assert "transformer_blocks" in shown["pag layers"]
    document = json.loads(sana("info", "--json", str(here / "cat.png"), str(here / "pag.png")).out)
    monkeypatch.chdir(here)
    for page, name in zip(document["pictures"], ("cat.png", "pag.png"), strict=True):
        words = shlex.split(page["command"])
        assert words[:2] == ["sana", "edit"]
        assert sana(*words[1:], "-o", f"again-{name}").code == 0
        with Image.open(name) as one, Image.open(f"again-{name}") as other:
            assert one.tobytes() == other.tobytes()


def test_the_label_says_what_is_composed(here: Path) -> None:
    for name, kind in (("cat.png", COMPOSITE_TYPE), ("wide.png", COMPOSITE_TYPE), ("pag.png", SOURCE_TYPE)):
        with Image.open(here / name) as picture:
            assert f'DigitalSourceType="{kind}"' in picture.text["XML:com.adobe.xmp"]  # type: ignore[attr-defined]
        assert read_metadata(here / name).generated


def test_no_path_is_in_the_file(here: Path, made: Path) -> None:
    for name in ("cat.png", "pag.png", "wide.png"):
        content = (here / name).read_bytes()
        assert made.name.encode() not in content
        assert b"/tmp" not in content
        request = read_metadata(here / name).request()
        assert isinstance(request.image, FileRef)
        assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request


def test_controls_are_recorded_and_shown(sana: Sana, tmp_path: Path) -> None:
    ref = FileRef(name="edges.png", sha256="ab" * 32)
    request = Request(
        prompt="a", seed=1, controls=(ControlRequest(kind="canny", image=ref, scale=0.75, end=0.5),), steps=2, **SIZE
    )
    from sana.cards import CARDS

    settings = request.resolve(CARDS["sana-1.6b-1024"])
    result = Result(images=[Image.new("RGB", (256, 256))], seeds=[1], settings=settings, model={"name": "nano"})
    path = save_png(result, 0, tmp_path / "a.png")
    said = sana("info", str(path))
    assert "canny of edges.png (SHA-256 abababababab...), scale 0.75@0-0.5" in said.out
    assert "--control canny edges.png 0.75@0-0.5" in said.out
    (tmp_path / "edges.png").write_bytes(b"x")
    said = sana("replay", str(path), "--control-image", "b.png", "--control-image", "c.png")
    assert "--control-image is given 2 times, but the record has 1" in said.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": {"name": "../../etc/passwd", "sha256": "0" * 64}}, "not a path"),
        ({"image": "/etc/passwd"}, "does not say which file"),
        ({"image": {"name": "..", "sha256": "0" * 64}}, "is not beside it"),
        ({"image": {"name": "", "sha256": "0" * 64}}, "a picture that was no file"),
        ({"loras": [{"source": "org/evil", "scale": 1.0}]}, "does not say which file"),
        ({"controls": [{"kind": "canny", "image": [], "scale": 1}]}, "must be a path"),
    ],
)
def test_a_record_from_elsewhere_opens_nothing_it_names(
    sana: Sana, here: Path, change: dict[str, Any], words: str
) -> None:
    from PIL.PngImagePlugin import PngInfo

    with Image.open(here / "pag.png") as picture:
        record = json.loads(picture.text["sanakit"])  # type: ignore[attr-defined]
        record["request"] |= change
        info = PngInfo()
        info.add_itxt("sanakit", json.dumps(record))
        picture.save(here / "evil.png", pnginfo=info)
    said = sana("replay", str(here / "evil.png"))
    assert said.code in (2, 3)
    assert words in said.err
    assert sana("info", str(here / "evil.png")).code == 0
