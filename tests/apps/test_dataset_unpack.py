"""`sana dataset unpack`: what was packed comes back, and nothing is written over."""

import json
import os
import random
from pathlib import Path

import pytest
from command import Sana
from PIL import Image

from sana.data.open import open_source


@pytest.fixture
def tars(sana: Sana) -> Path:
    """Two tars of three pictures with names, weights and scores, packed from a folder with a folder in it."""
    folder = Path("pictures")
    (folder / "cats").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "cats/a.png"):
        Image.frombytes("RGB", (6, 5), random.randbytes(90)).resize((96, 80), 0).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"what {name} shows")
    record = {"file_name": "b.jpg", "captions": [
        {"text": "one", "score": 28.5, "weight": 2.0}, {"text": "две", "name": "vlm", "score": 30.0},
    ]}  # fmt: skip
    (folder / "metadata.jsonl").write_text(json.dumps(record))
    assert sana("dataset", "pack", "pictures", "tars", "--samples", "2").code == 0
    return Path("tars")


def told(path: str) -> list[tuple[object, ...]]:
    """What is known of each sample but for its name, in the order of its bytes."""
    source = open_source(path)
    assert source.findings == ()
    samples = [(source.encoded(i), source.sample(i)) for i in range(len(source))]
    return sorted((data, one.width, one.height, one.captions) for data, one in samples)


def test_what_was_packed_comes_back(sana: Sana, tars: Path) -> None:
    said = sana("dataset", "unpack", "tars", "back")
    assert (said.code, said.err) == (0, "")
    assert said.out == "back: 3 pictures with their captions\n"
    assert sorted(os.listdir("back")) == ["a.png", "b.jpg", "cats_a.png", "metadata.jsonl"]
    assert told("back") == told("tars")
    captions = {one.name: one for one in open_source("back").sample(1).captions}
    assert (captions["prompt"].weight, captions["prompt"].score) == (2.0, 28.5)
    assert (captions["vlm"].text, captions["vlm"].score) == ("две", 30.0)
    assert [(data, *more) for data, *more, _ in told("back")] == [(data, *more) for data, *more, _ in told("pictures")]
    assert sana("dataset", "pack", "back", "again").code == 0
    assert told("again") == told("tars")


def test_keys_that_are_in_two_tars_are_both_kept(sana: Sana, tars: Path) -> None:
    Path("tars/00001.tar").write_bytes(Path("tars/00000.tar").read_bytes())
    Path("tars/wids-meta.json").unlink()
    assert sana("dataset", "unpack", "tars", "back", "--json").code == 0
    assert sorted(os.listdir("back")) == ["a.png", "a_2.png", "b.jpg", "b_2.jpg", "metadata.jsonl"]


def test_a_broken_picture_is_left_out_or_nothing_is_written(sana: Sana, tars: Path) -> None:
    data = Path("pictures/a.png").read_bytes()
    tar = Path("tars/00000.tar").read_bytes()
    Path("tars/00000.tar").write_bytes(tar.replace(data[-40:-20], bytes(20)))
    said = sana("dataset", "unpack", "tars", "back")
    assert said.code == 3
    assert "1 of 3 samples are broken (33.3%)" in said.err
    assert not Path("back").exists() or os.listdir("back") == []
    said = sana("dataset", "unpack", "tars", "back", "--tolerance", "0.5")
    assert said.code == 0
    assert "warning: left out: 00000.tar:a.png: " in said.err
    assert said.out == "back: 2 pictures with their captions\n"
    assert sorted(os.listdir("back")) == ["b.jpg", "cats_a.png", "metadata.jsonl"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("tars",), "Name the tars and a folder for the pictures"),
        (("pictures", "back"), "pictures holds no tars but pictures, which need no unpacking."),
        (("tars", "pictures"), "pictures is not empty, and nothing is written over. Give a new folder."),
        (("tars", "pictures/a.png"), "a.png is a file. Give a folder for the pictures."),
        (("tars", "a\0b"), "has no name that a folder can have"),
        (("tars", "back", "--tolerance", "2"), "must lie from 0 to 1 but is 2"),
        (("nowhere", "back"), "There is no file or folder nowhere."),
    ],
)
def test_what_is_refused(sana: Sana, tars: Path, words: tuple[str, ...], sentence: str) -> None:
    said = sana("dataset", "unpack", *words)
    assert said.code != 0
    assert sentence in said.err
    assert not Path("back").exists()
