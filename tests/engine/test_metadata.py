import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana import Request, read_metadata, save_png
from sana.engine.images import write_atomically
from sana.engine.metadata import LEVELS, SOURCE_TYPE, parameters_of
from sana.engine.request import ResolvedRequest, Result
from sana.errors import InvalidInput

PROMPT = 'a cat 🐼 with a sign: "你好", please'


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {"prompt": PROMPT, "width": 4, "height": 3, "steps": 2, "guidance": 4.5, "seed": 7}
    settings = ResolvedRequest(**{**values, "sampler": "flow-dpm", "count": 2, **changes})
    pictures = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    return Result(images=pictures, seeds=[7, 8], settings=settings, model={"name": "toy, small", "sanakit": "9.9"})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = save_png(result(), 1, tmp_path / "b.png")
    found = read_metadata(path)
    assert found.generated
    assert found.record is not None
    assert found.record["model"]["name"] == "toy, small"
    assert found.record["seed"] == 8
    assert found.request() == Request.from_dict({**result().settings.to_dict(), "seed": 8, "count": 1})
    assert found.parameters == parameters_of(result(), 1)
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


def test_the_text_line_has_the_common_form() -> None:
    lines = parameters_of(result(negative_prompt="blur"), 0).split("\n")
    assert lines[0] == PROMPT
    assert lines[1] == "Negative prompt: blur"
    assert lines[2] == (
        'Steps: 2, Sampler: flow-dpm, CFG scale: 4.5, Seed: 7, Size: 4x3, Model: "toy, small", Version: sanakit 9.9'
    )
    assert "Negative" not in parameters_of(result(), 0)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_keep_the_prompt_private(tmp_path: Path, level: Any) -> None:
    path = save_png(result(), 0, tmp_path / "a.png", metadata=level)
    found = read_metadata(path)
    assert found.generated is (level != "none")
    assert (found.record is not None) is (found.parameters is not None) is (level == "full")
    assert (PROMPT.encode() in path.read_bytes()) is (level == "full")


def test_unknown_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="full, label, none"):
        save_png(result(), 0, tmp_path / "a.png", metadata="all")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_label_is_the_published_term() -> None:
    assert SOURCE_TYPE.endswith("/digitalsourcetype/trainedAlgorithmicMedia")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = save_png(result(), 0, tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="exists already"):
        save_png(result(), 1, path)
    assert path.read_bytes() == before
    save_png(result(), 1, path, force=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a.png"

    def write(file: Any) -> None:
        target.write_bytes(b"other")
        file.write(b"mine")

    with pytest.raises(InvalidInput, match="exists already"):
        write_atomically(target, write)
    assert target.read_bytes() == b"other"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_hard_links_nothing_is_overwritten_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "a.bin"

    def write(file: Any) -> None:
        file.write(b"one")

    write_atomically(target, write)
    assert target.read_bytes() == b"one"

    def late(file: Any) -> None:
        (tmp_path / "b.bin").write_bytes(b"other")
        file.write(b"mine")

    with pytest.raises(InvalidInput, match="exists already"):
        write_atomically(tmp_path / "b.bin", late)
    assert (tmp_path / "b.bin").read_bytes() == b"other"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "words"), [("a.jpg", "does not end in .png"), ("no/a.png", "does not exist")])
def test_bad_targets_are_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        save_png(result(), 0, tmp_path / name)


def test_foreign_pictures_give_what_they_have(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a dog\nSteps: 3")
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    found = read_metadata(tmp_path / "a.png")
    assert (found.record, found.parameters, found.generated) == (None, "a dog\nSteps: 3", False)
    with pytest.raises(InvalidInput, match="no sanakit record"):
        found.request()
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    assert read_metadata(tmp_path / "a.jpg").parameters is None


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="There is no file"):
        read_metadata(tmp_path / "none.png")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_metadata(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("record", "words"),
    [("{", "damaged"), ("[1]", "no JSON object"), ('{"version": 2}', "version 2"), ('{"version": 1}', "no request")],
)
def test_damaged_records_are_named(tmp_path: Path, record: str, words: str) -> None:
    info = PngInfo()
    info.add_itxt("sanakit", record)
    Image.new("L", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InvalidInput, match=words):
        read_metadata(tmp_path / "a.png").request()


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    path = save_png(result(), 0, tmp_path / "a.png")
    with Image.open(path) as image:
        record = json.loads(image.text["sanakit"])
    assert record["version"] == 1
    assert record["request"]["prompt"] == PROMPT
    assert str(tmp_path) not in json.dumps(record)


def test_the_facts_about_the_model_are_texts(tmp_path: Path) -> None:
    assert read_metadata(save_png(result(), 0, tmp_path / "a.png")).model == {"name": "toy, small", "sanakit": "9.9"}
    Image.new("L", (2, 2)).save(tmp_path / "b.png")
    assert read_metadata(tmp_path / "b.png").model == {}


def test_what_no_encoder_takes_is_replaced(tmp_path: Path) -> None:
    """A folder of undecodable bytes names its model so."""
    odd = dataclasses.replace(result(), model={"name": "caf\udce9", "source": "/caf\udce9"}, warnings=["w \ud800"])
    found = read_metadata(save_png(odd, 0, tmp_path / "a.png"))
    assert found.model == {"name": "caf\ufffd", "source": "/caf\ufffd"}
    assert found.record is not None
    assert found.record["warnings"] == ["w \ufffd"]
    assert found.parameters is not None
    assert "Model: caf\ufffd" in found.parameters


def test_others_read_the_text_line(tmp_path: Path) -> None:
    """The rule of the widespread readers: the last line, at least three pairs, values as they stand or as JSON."""
    with Image.open(save_png(result(negative_prompt="blur"), 0, tmp_path / "a.png")) as image:
        *words, last = image.text["parameters"].split("\n")
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert (words, len(pairs)) == ([PROMPT, "Negative prompt: blur"], 7)
    assert (pairs["Steps"], pairs["Seed"], pairs["Size"], json.loads(pairs["Model"])) == ("2", "7", "4x3", "toy, small")


def test_without_our_record_the_text_line_is_understood(tmp_path: Path) -> None:
    with Image.open(save_png(result(negative_prompt="blur"), 0, tmp_path / "a.png")) as image:
        info = PngInfo()
        info.add_text("parameters", image.text["parameters"])
        image.save(tmp_path / "b.png", pnginfo=info)
    found = read_metadata(tmp_path / "b.png")
    assert found.record is None
    assert found.settings is not None
    assert found.settings.program == "sanakit 9.9"
    assert (found.settings.prompt, found.settings.negative_prompt) == (PROMPT, "blur")
    assert (found.settings.steps, found.settings.guidance, found.settings.model) == (2, 4.5, "toy, small")
