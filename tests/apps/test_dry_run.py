"""`--dry-run`: settings, files and costs, with nothing drawn, written or fetched."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command import Sana

from sana.engine.estimate import Rates


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """State the speed of the machine instead of measuring it."""
    known = Rates(flops=dict.fromkeys(("float32", "bfloat16", "float16"), 1e12), traffic=1e10, ops=1e5)
    monkeypatch.setattr("sana.engine.estimate.measure", lambda *_: known)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no model be here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def document(sana: Sana, *words: str) -> Any:
    said = sana(*words, "--dry-run", "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_the_page(sana: Sana, no_loading: None) -> None:
    said = sana("a fox", "--seed", "3-4", "--steps", "8", "--dry-run")
    assert said.code == 0, said.err
    rows = {line.split("  ")[0]: line.split("  ", 1)[-1].strip() for line in said.out.splitlines()}
    assert rows["model"].startswith("nano, float32, on ")
    assert (rows["prompt"], rows["size"], rows["steps"], rows["seeds"]) == ("a fox", "256x256", "8", "3-4")
    assert rows["files"] == "a-fox-3.png, a-fox-4.png"
    assert rows["time"].startswith("about 0.")
    assert "a picture; and 2" in rows["time"]
    assert rows["memory"].startswith("about 53")
    assert rows["download"] == "nothing"
    assert said.out.endswith("Nothing was drawn, downloaded or written.\n")
    assert os.listdir() == []


def test_the_document_of_a_model_that_is_not_here(sana: Sana, no_loading: None) -> None:
    words = (
        "a fox",
        "-m",
        "sana-1.6b-1024",
        "--size",
        "1000x500",
        "--dtype",
        "bfloat16",
        "-o",
        "new/",
        "--max-vram",
        "64GB",
    )
    told = document(sana, *words, "--seed", "3-6", "--batch-size", "2")
    assert told["settings"]["steps"] == 20
    assert told["drawn"] == {"width": 1408, "height": 704}
    assert told["files"] == [f"new/a-fox-{seed}.png" for seed in (3, 4, 5, 6)]
    cost = told["estimate"]
    assert 8e9 < cost["download_bytes"] < 11e9
    assert 9e9 < cost["memory_bytes"] < 13e9
    once = document(sana, *words, "--seed", "3-4", "--batch-size", "2")["estimate"]["seconds"]
    assert cost["seconds"]["denoise"] == pytest.approx(2 * once["denoise"], abs=0.01)
    assert cost["seconds"]["text"] == once["text"]
    assert cost["free_disk_bytes"] > 0
    assert os.listdir() == []


def test_a_sweep_and_a_file_of_prompts(sana: Sana, no_loading: None) -> None:
    Path("p.txt").write_text("a fox\na cat\n")
    told = document(sana, "--prompt-file", "p.txt", "--sweep", "steps=4,8", "--seed", "3")
    assert [(job["settings"]["prompt"], job["settings"]["steps"]) for job in told["jobs"]] == [
        ("a fox", 4), ("a fox", 8), ("a cat", 4), ("a cat", 8)
    ]  # fmt: skip
    said = sana("--prompt-file", "p.txt", "--sweep", "steps=4,8", "--seed", "3-9", "--dry-run").out
    assert "2 prompts, the first: a fox" in said
    assert "4, 8" in said
    assert "29: a-fox-steps-4-3.png, a-fox-steps-4-4.png, a-fox-steps-4-5.png, … p-sweep-3.png" in said


def test_a_folder_is_read_for_its_shapes(sana: Sana, tiny_folder: Path, no_loading: None) -> None:
    told = document(sana, "a fox", "-m", str(tiny_folder), "--seed", "3")
    assert told["model"] == tiny_folder.name
    assert 4.5e8 < told["estimate"]["memory_bytes"] < 6e8
    assert told["estimate"]["download_bytes"] == 0


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("-m", "somebody/model"), 2, "Nothing is known of somebody/model before it is downloaded. Drop --dry-run."),
        (("-m", "."), 3, "config.json is missing or no JSON"),
        (("--steps", "0"), 2, "--steps must be a whole number"),
        (("--size", "512"), 2, "nano draws 256 x 256 only"),
        (("--device", "cuda:99"), 2, "cannot be used"),
    ],
)
def test_what_cannot_be_estimated(
    sana: Sana, no_loading: None, words: tuple[str, ...], code: int, sentence: str
) -> None:
    said = sana("a fox", "--dry-run", *words)
    assert said.code == code
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1


def test_a_taken_name_is_refused_and_no_folder_is_made(sana: Sana, no_loading: None) -> None:
    Path("a-fox-3.png").touch()
    assert "exists already" in sana("a fox", "--seed", "3", "--dry-run").err
    assert sana("a fox", "--seed", "3", "--dry-run", "-o", "new/").code == 0
    assert not Path("new").exists()
