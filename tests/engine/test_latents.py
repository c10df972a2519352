"""Finished latents as a file: the way there and back, and what a hostile file may not do."""

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from sana.cards import CARDS
from sana.engine.canvas import Canvas, Kept
from sana.engine.latents import MAX_BYTES, RECORD_KEY, Finished, load_latents, save_latents
from sana.engine.request import Request
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError

SETTINGS = Request(prompt="a fox 狐狸", negative_prompt="snow", seed=4, count=3, width=64, height=96).resolve(
    CARDS["sana-1.6b-1024"]
)
MODEL = {"name": "tiny", "vae_dtype": "float32"}


def finished(rows: int = 2) -> Finished:
    generator = torch.Generator().manual_seed(0)
    return Finished(
        latents=torch.randn(rows, 4, 3, 2, generator=generator),
        settings=SETTINGS,
        seeds=range(4, 4 + rows),
        model=MODEL,
    )


def record(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "request": SETTINGS.to_dict(), "seeds": [4, 5], "model": MODEL, **changes}


def forged(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    """Write a file of the right form with wrong content."""
    content = {"latents": finished().latents} if tensors is None else tensors
    path.write_bytes(save(content, metadata={RECORD_KEY: json.dumps(record(**changes))}))
    return path


def test_there_and_back(tmp_path: Path) -> None:
    path = save_latents(tmp_path / "a.latents.safetensors", finished())
    again = load_latents(path)
    assert torch.equal(again.latents, finished().latents)
    assert (again.settings, list(again.seeds), again.model) == (SETTINGS, [4, 5], MODEL)
    assert os.listdir(tmp_path) == [path.name]


def edited(**changes: Any) -> Finished:
    """Latents of 96 x 64 pixels whose result has 50 x 70, with a part of a user's picture."""
    rng = np.random.default_rng(0)
    settings = SETTINGS.replace(width=50, height=70, binning=True)
    kept = Kept(
        picture=Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8)),
        share=(rng.random((70, 50)) * (rng.random((70, 50)) > 0.5)).astype(np.float32),
    )
    canvas = Canvas(height=70, width=50, drawn=(96, 64), resized=False)
    values = {"latents": finished().latents, "settings": settings, "seeds": [4, 5], "model": MODEL}
    return Finished(**{**values, "canvas": canvas, "kept": kept, **changes})


def test_what_an_edit_keeps_goes_into_the_file(tmp_path: Path) -> None:
    before = edited()
    again = load_latents(save_latents(tmp_path / "a.safetensors", before))
    assert again.canvas == before.canvas
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    one, other = ([np.asarray(picture) for picture in f.pictures(images)] for f in (before, again))
    assert np.array_equal(one, other)
    assert before.kept is not None
    outside = before.kept.share == 0
    assert np.array_equal(one[0][outside], np.asarray(before.kept.picture)[outside])
    with pytest.raises(CheckpointError, match="not of the size"):
        again.pictures(images[..., :32])
    assert len(finished().pictures(images)) == 2


@pytest.mark.parametrize(
    "canvas",
    [None, [], {}, {"drawn": [96, 64]}, {"drawn": [96], "resized": True}, {"drawn": [0, 9], "resized": True},
     {"drawn": [True, 64], "resized": True}, {"drawn": [96, 64], "resized": 1}, {"drawn": [9, 9], "resized": False}],
)  # fmt: skip
def test_an_impossible_canvas_is_refused(canvas: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its canvas"):
        load_latents(forged(tmp_path / "a.safetensors", canvas=canvas))


@pytest.mark.parametrize(
    "bad",
    [
        {"share": torch.zeros(70, 50)},
        {"picture": torch.zeros(70, 50, 3, dtype=torch.uint8)},
        {"picture": torch.zeros(1, 1, 3, dtype=torch.uint8), "share": torch.zeros(1, 1)},
        {
            "picture": torch.zeros(SETTINGS.height, SETTINGS.width, 3),
            "share": torch.zeros(SETTINGS.height, SETTINGS.width),
        },
        {
            "picture": torch.zeros(SETTINGS.height, SETTINGS.width, 3, dtype=torch.uint8),
            "share": torch.full((SETTINGS.height, SETTINGS.width), float("nan")),
        },
    ],
)
def test_a_picture_that_does_not_fit_is_refused(bad: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="decoded"):
        load_latents(forged(tmp_path / "a.safetensors", {"latents": finished().latents, **bad}))


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    half = Finished(latents=finished().latents.bfloat16(), settings=SETTINGS, seeds=[4, 6], model=MODEL)
    again = load_latents(save_latents(tmp_path / "a.safetensors", half))
    assert torch.equal(again.latents, half.latents.float())


def test_names_are_checked_and_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.safetensors"):
        save_latents(tmp_path / "a.png", finished())
    with pytest.raises(InvalidInput, match="folder"):
        save_latents(tmp_path / "none" / "a.safetensors", finished())
    path = save_latents(tmp_path / "a.safetensors", finished())
    with pytest.raises(InvalidInput, match="exists"):
        save_latents(path, finished())
    save_latents(path, finished(1), force=True)
    assert len(load_latents(path).latents) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_latents(tmp_path / "a.safetensors", finished())
    assert os.listdir(tmp_path) == []


def test_a_file_cut_anywhere_is_one_sentence(tmp_path: Path) -> None:
    data = save_latents(tmp_path / "a.safetensors", finished()).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError) as caught:
            load_latents(cut)
        said = str(caught.value).replace(str(tmp_path), "")
        assert "\n" not in said
        assert len(said) < 300


def test_a_flipped_bit_is_refused_or_changes_only_a_value(tmp_path: Path) -> None:
    data = save_latents(tmp_path / "a.safetensors", finished()).read_bytes()
    path = tmp_path / "flipped.safetensors"
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        path.write_bytes(bad)
        with contextlib.suppress(SanaError):
            again = load_latents(path)
            assert again.latents.shape == (2, 4, 3, 2)
            assert bool(torch.isfinite(again.latents).all())


WRONG: dict[str, dict[str, Any]] = {
    "no seeds": {"seeds": []},
    "too many seeds": {"seeds": [4, 5, 6]},
    "a seed twice": {"seeds": [4, 4]},
    "a seed of another run": {"seeds": [4, 99]},
    "a seed that is no number": {"seeds": [4, True]},
    "seeds that are a mapping": {"seeds": {"4": 5}},
    "no request": {"request": None},
    "an impossible request": {"request": {**SETTINGS.to_dict(), "steps": -1}},
    "an unknown field": {"request": {**SETTINGS.to_dict(), "x" * 10_000: 1}},
    "a field too few": {"request": {"prompt": "a"}},
    "a prompt of a megabyte": {"request": {**SETTINGS.to_dict(), "prompt": "a" * 10**6}},
    "a record too long": {"model": {"name": "a" * 3 * 2**20}},
    "no model": {"model": []},
    "a model too long": {"model": {"name": "a" * 10_000}},
    "too many facts": {"model": {str(i): 1 for i in range(100)}},
    "a version of the future": {"version": 2},
    "a version that is true": {"version": True},
    "more than asked for": {"extra": 1},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_wrong_records_are_one_sentence(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_latents(forged(tmp_path / "a.safetensors", **changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 500


TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "another name": {"weights": torch.zeros(2, 4, 3, 2)},
    "one more": {"latents": torch.zeros(2, 4, 3, 2), "weights": torch.zeros(1)},
    "none": {},
    "integers": {"latents": torch.zeros(2, 4, 3, 2, dtype=torch.int64)},
    "float64": {"latents": torch.zeros(2, 4, 3, 2, dtype=torch.float64)},
    "three dimensions": {"latents": torch.zeros(2, 4, 3)},
    "many dimensions": {"latents": torch.zeros([1] * 30)},
    "nothing in it": {"latents": torch.zeros(2, 4, 0, 2)},
    "one row": {"latents": torch.zeros(1, 4, 3, 2)},
    "too wide": {"latents": torch.zeros(2, 1, 1, 600)},
    "too many channels": {"latents": torch.zeros(2, 2000, 1, 1)},
    "NaN": {"latents": torch.full((2, 4, 3, 2), float("nan"))},
    "infinity": {"latents": torch.full((2, 4, 3, 2), float("inf"))},
}


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_wrong_tensors_are_one_sentence(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_latents(forged(tmp_path / "a.safetensors", tensors))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[1", "[" * 100_000, "3"])
def test_records_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"latents": finished().latents}, metadata={RECORD_KEY: text}))
    with pytest.raises(CheckpointError, match="record cannot be read"):
        load_latents(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        load_latents(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no file of latents"):
        load_latents(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(save({"latents": finished().latents}))
    with pytest.raises(CheckpointError, match="something else"):
        load_latents(tmp_path / "model.safetensors")
    for content in (b"", b"\x80\x04}q\x00.", b"PK\x03\x04" + bytes(50), struct.pack("<Q", 2**62) + b"{}"):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be decoded"):
            load_latents(path)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole, which takes no room on the disk
    with pytest.raises(CheckpointError, match="too large"):
        load_latents(path)
