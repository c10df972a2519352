"""`sana replay`: the same pixels again, or what differs."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Said, Sana
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from foreign_pictures import ASCII, PICTURES, comment, exif, international, png, write
from sana import read_metadata
from sana.apps.cli import main
from sana.apps.cli.machine import Machine
from sana.apps.cli.verbs.replay import compare

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of the built-in model, two at once; the last one shares its batch with a filler."""
    folder = tmp_path_factory.mktemp("drawn")
    words = ["a red fox", "--seed", "7", "--count", "3", "--batch-size", "2", "--steps", "2", "-o", "fox.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CONFIG_HOME", str(folder / "no-settings"))
        assert main(words) == 0
    return folder


@pytest.fixture
def fox(drawn: Path, tmp_path: Path) -> Path:
    """A copy of one picture in the folder of the test."""
    return Path(shutil.copy(drawn / "fox-8.png", tmp_path / "fox.png"))


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Machine, "load", refuse)
    monkeypatch.setattr("sana.engine.parts.load", refuse)


def edited(
    path: Path, change: Change = lambda record: None, pixels: Callable[[Image.Image], Any] | None = None
) -> None:
    """Write the picture again with a changed record, or changed pixels."""
    with Image.open(path) as image:
        image.load()
        record = json.loads(image.text["sanakit"])
        change(record)
        info = PngInfo()
        info.add_itxt("sanakit", json.dumps(record))
        (pixels(image) if pixels is not None else image).save(path, pnginfo=info)


def with_model(**facts: object) -> Change:
    return lambda record: record["model"].update(facts)


@pytest.mark.parametrize("name", ["fox-7.png", "fox-8.png", "fox-9.png"])
def test_every_picture_of_a_batch_is_drawn_again_to_the_last_bit(sana: Sana, drawn: Path, name: str) -> None:
    said = sana("replay", str(drawn / name))
    assert (said.code, said.out) == (0, "identical\n")
    assert "All is as it was then" in said.err
    assert list(Path.cwd().iterdir()) == []


def test_another_process_draws_the_same(fox: Path) -> None:
    words = [sys.executable, "-m", "sana.apps.cli", "replay", str(fox)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "identical\n"), done.stderr


def test_changed_pixels_are_counted(sana: Sana, fox: Path) -> None:
    def touched(image: Image.Image) -> Image.Image:
        red, green, blue = image.getpixel((3, 4))  # type: ignore[misc]
        image.putpixel((3, 4), (red, green, (blue + 100) % 200))
        image.putpixel((5, 4), (red ^ 1, green, blue))
        return image

    edited(fox, pixels=touched)
    said = sana("replay", "fox.png")
    assert said.code == 1
    assert said.out.startswith("fox.png differs in 2 of 65536 pixels")
    assert "the file was edited" in said.out
    assert "Nothing was written" in said.err
    assert os.listdir() == ["fox.png"]


def test_what_is_not_as_it_was_is_told_first_and_named_at_the_end(
    sana: Sana, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.apps.cli.output.SHORTEST_SILENCE", 0.0)
    said = sana("replay", "fox.png", "--dtype", "bfloat16")
    assert said.code == 1
    table, progress = said.err.split("50 %")[0], said.err.index("50 %")
    assert re.search(r"not as it was +then +now\n", table)
    assert re.search(r"transformer dtype +float32 +bfloat16", table)
    assert said.err.index("transformer dtype") < progress
    assert "Not as it was: transformer dtype float32 (now bfloat16)" in said.out
    assert int(re.search(r"differs in (\d+) of 65536", said.out)[1]) > 1000  # type: ignore[index]


def test_another_version_may_draw_the_same(sana: Sana, fox: Path) -> None:
    edited(fox, with_model(torch="1.0.0", weights="0" * 64, sanakit="0.0.9"))
    said = sana("replay", "fox.png")
    assert (said.code, said.out) == (0, "identical\n")
    assert re.search(r"torch +1\.0\.0 +\d", said.err)
    assert re.search(r"weights +0{57}\.\.\.", said.err)


def test_what_the_run_warned_of_then_is_told(sana: Sana, fox: Path) -> None:
    edited(fox, lambda record: record.update(warnings=["Memory ran out; decoded in tiles.", 3]))
    assert "Then it said: Memory ran out; decoded in tiles." in sana("replay", "fox.png").err


def test_the_new_picture_is_written_where_wished(sana: Sana, fox: Path) -> None:
    said = sana("replay", "fox.png", "-o", "again.png")
    assert (said.code, said.out) == (0, "again.png\nidentical\n")
    assert sana("replay", "again.png").out == "identical\n"
    taken = sana("replay", "fox.png", "-o", "again.png")
    assert taken.code == 2
    assert "exists already" in taken.err
    assert sana("replay", "fox.png", "-o", "again.png", "--force").code == 0
    assert "stdout" in sana("replay", "fox.png", "-o", "-").err
    assert read_metadata("again.png").request() == read_metadata("fox.png").request()


@pytest.mark.usefixtures("loads_nothing")
def test_a_picture_made_transparent_is_not_identical(sana: Sana, fox: Path) -> None:
    with Image.open(fox) as picture:
        text = PngInfo()
        for name, value in picture.text.items():  # type: ignore[attr-defined]
            text.add_itxt(name, value)
        clear = picture.convert("RGBA")
    clear.putalpha(clear.getchannel("A").point(lambda _: 100))
    clear.save("clear.png", pnginfo=text)
    said = sana("replay", "clear.png")
    assert said.code == 1
    assert "transparency" in said.out


def test_a_cut_picture_is_told_without_drawing(sana: Sana, fox: Path) -> None:
    edited(fox, pixels=lambda image: image.crop((0, 0, 100, 50)))
    said = sana("replay", "fox.png")
    assert said.code == 1
    assert said.out == "fox.png has 100x50 pixels and its record draws 256x256: it was cut or resized since.\n"
    assert json.loads(sana("replay", "fox.png", "--json").out)["identical"] is False


def test_a_cut_picture_is_drawn_again_if_it_shall_be_written(sana: Sana, fox: Path) -> None:
    edited(fox, pixels=lambda image: image.resize((64, 64)))
    said = sana("replay", "fox.png", "-o", "whole.png")
    assert said.code == 1
    assert said.out.startswith("whole.png\nfox.png has 64x64 pixels")
    assert sana("replay", "whole.png").out == "identical\n"


def test_a_copy_with_loss_differs_a_little(sana: Sana, fox: Path) -> None:
    record = json.dumps({"sanakit": read_metadata(fox).record})
    with Image.open(fox) as image:
        image.save("fox.jpg", quality=95, exif=b"Exif\x00\x00" + exif(comment(ASCII, record, "utf-8")))
    document = json.loads(sana("replay", "fox.jpg", "--json").out)
    assert document["identical"] is False
    assert 0 < document["pixels"]["mean"] < 5
    assert document["differences"] == []


def test_the_json_document_and_the_events(sana: Sana, fox: Path) -> None:
    document = json.loads(sana("replay", "fox.png", "-o", "again.png", "--json").out)
    assert document["identical"] is True
    assert document["pixels"] == {"pixels": 0, "total": 65536, "most": 0, "mean": 0.0}
    assert (document["files"], document["settings"]["seed"], document["model"]["name"]) == (["again.png"], 8, "nano")
    assert document["timings"]["total"] > 0
    events = [json.loads(line) for line in sana("replay", "fox.png", "--events").out.splitlines()]
    names = [event["event"] for event in events]
    assert (names.count("step"), names[-1], events[-1]["identical"]) == (2, "done", True)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("case", PICTURES)
def test_pictures_of_others_are_refused_with_the_nearest_command(sana: Sana, tmp_path: Path, case: str) -> None:
    _, name, data = PICTURES[case]
    write(tmp_path, name, data)
    said = sana("replay", name)
    assert (said.code, said.out) == (2, "")
    assert "was made by" in said.err
    assert "The nearest command: sana" in said.err


@pytest.mark.usefixtures("loads_nothing")
def test_pictures_that_cannot_be_drawn_again(sana: Sana, fox: Path, tmp_path: Path) -> None:
    def refused(data: bytes | None, *parts: str, code: int = 2) -> None:
        if data is not None:
            write(tmp_path, "x.png", data)
        said = sana("replay", "x.png")
        assert (said.code, said.out) == (code, "")
        for part in parts:
            assert part in said.err

    def record(**changes: object) -> bytes:
        return png(international("sanakit", json.dumps({**RECORD, **changes})))

    refused(png(), "does not say how it was made")
    refused(
        png(international("parameters", "a cat\nSteps: 2, Version: sanakit 0.1.0")), "lost its record", "sana 'a cat'"
    )
    refused(record(version=2), "version 2", "Update sanakit")
    refused(record(seed=None), "no seed")
    refused(record(request=3), "no request")
    refused(record(request={"prompt": "a", "x\x1b[2J" * 500: 1}), "is not a field")
    refused(record(request={"prompt": "a", "sampler": ["x"]}), "sampler")
    refused(png(international("sanakit", "{")), "damaged")
    refused(fox.read_bytes()[:-2000] + b"\x00" * 2000, "pixels of x.png cannot be read")
    refused(png(international("sanakit", json.dumps(RECORD)), width=60_000, height=60_000), "cannot be read")
    assert sana("replay", "nowhere.png").code == 3
    assert sana("replay").code == sana("replay", "a.png", "b.png").code == 2
    assert sana("replay", "x" * 5000).code == 3


RECORD: dict[str, Any] = {"version": 1, "request": {"prompt": "a fox"}, "seed": 7, "model": {"name": "nano"}}


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize(
    "source", ["someone/model", "mine", "//host/share", "\\\\host\\share", "~nobody-here/x", "x" * 5000]
)
def test_a_picture_cannot_choose_what_is_fetched(sana: Sana, fox: Path, source: str) -> None:
    edited(fox, with_model(name="mine", source=source))
    said = sana("replay", "fox.png")
    assert said.code == 2
    assert "--model" in said.err
    assert len(said.err) < 300


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model under the home folder of this test."""
    home = tmp_path / "home-of-anna"
    shutil.copytree(tiny_folder, home / "models" / "tiny")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    return home / "models" / "tiny"


def test_a_model_from_a_folder_is_found_again_and_names_no_user(sana: Sana, tiny: Path) -> None:
    drawn = sana(
        "a red fox", "-m", str(tiny), "--seed", "3", "--steps", "2", "--size", "64", "--no-binning", "-o", "a.png"
    )
    assert drawn.code == 0, drawn.err
    record = read_metadata("a.png").record
    assert record is not None
    assert record["model"]["source"] == "~/models/tiny"
    assert b"home-of-anna" not in Path("a.png").read_bytes()
    assert sana("replay", "a.png").out == "identical\n"
    moved = tiny.with_name("elsewhere")
    tiny.rename(moved)
    gone = sana("replay", "a.png")
    assert gone.code == 2
    assert "'~/models/tiny', which is not here" in gone.err
    there = sana("replay", "a.png", "--model", str(moved))
    assert (there.code, there.out) == (0, "identical\n")
    assert re.search(r"name +tiny +elsewhere", there.err)


def test_dtypes_device_and_threads_are_those_of_the_record(
    sana: Sana, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Machine] = []

    def load(machine: Machine, *_: object, **__: object) -> None:
        seen.append(machine)
        raise AssertionError("enough")

    monkeypatch.setattr(Machine, "load", load)
    mixed = {"transformer_dtype": "bfloat16", "text_encoder_dtype": "float32", "vae_dtype": "float32"}
    edited(fox, with_model(**mixed, threads="3", compiled="yes"))
    sana("replay", "fox.png")
    sana("replay", "fox.png", "--dtype", "float32", "--threads", "2", "--device", "cuda:1")
    edited(fox, with_model(device="NVIDIA H200", vae_dtype="int3", threads="0"))
    sana("replay", "fox.png")
    first, second, third = seen
    parts = {"default": "auto", "transformer": "bfloat16", "text_encoder": "float32", "vae": "float32"}
    assert (first.model, first.device, first.threads, first.dtype, first.compile) == ("nano", "cpu", 3, parts, True)
    assert (second.dtype, second.threads, second.device) == ("float32", 2, "cuda:1")
    assert (third.dtype, third.threads, third.device) == ("auto", None, "auto")


def test_a_model_from_the_hub_is_loaded_in_the_recorded_commit(
    sana: Sana, fox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def load(model: str, **settings: Any) -> None:
        seen.append({"model": model, **settings})
        raise AssertionError("enough")

    monkeypatch.setattr("sana.engine.parts.load", load)
    monkeypatch.setattr("sana.apps.cli.verbs.replay.introduce", lambda *_: None)
    edited(fox, with_model(name="sana-0.6b-512", commit="abc", device="cpu"))
    sana("replay", "fox.png")
    assert (seen[0]["model"], seen[0]["revision"], seen[0]["device"]) == ("sana-0.6b-512", "abc", "cpu")
    assert seen[0]["dtype"]["vae"] == "float32"
    sana("replay", "fox.png", "--model", "sana-0.6b-1024")
    assert "revision" not in seen[1]


def test_pictures_of_all_modes_are_compared_as_colours() -> None:
    one, other = Image.new("RGB", (2, 2), (1, 2, 3)), Image.new("RGBA", (2, 2), (1, 2, 13, 0))
    gap = compare(one, other)
    assert (gap.pixels, gap.total, gap.most) == (4, 4, 10)
    assert gap.mean == pytest.approx(10 / 3)
    assert compare(one, one).pixels == 0


def test_a_quantised_picture_is_drawn_again_quantised(sana: Sana, tmp_path: Path) -> None:
    made = tmp_path / "small.png"
    assert sana("a red fish", "--seed", "1", "--steps", "2", "--quantize", "int8", "-o", str(made)).code == 0
    assert "int8" in sana("info", str(made)).out
    assert "identical" in sana("replay", str(made)).out


def test_replay_help(sana: Sana) -> None:
    said: Said = sana("replay", "--help")
    assert said.code == 0
    for flag in ("--output", "--force", "--device", "--threads", "--model"):
        assert flag in said.out
