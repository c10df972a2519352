"""Drawing with the tiny model: one call a run, saving beside it, disks that fill up, interruptions, rescued latents."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Sana
from PIL import Image

from sana.engine import generate as engine
from sana.engine import images
from sana.engine.metadata import read_metadata
from sana.errors import NonFinite


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the requests that reach the engine."""
    requests: list[Any] = []
    original = engine.generate

    def generate(parts: Any, request: Any, **others: Any) -> Iterator[Any]:
        requests.append(request)
        return (yield from original(parts, request, **others))

    monkeypatch.setattr(engine, "generate", generate)
    return requests


@pytest.fixture
def failing_save(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the k-th picture fail to be written."""
    original = images.save_png

    def install(k: int, error: BaseException) -> None:
        count = 0

        def save(*args: Any, **others: Any) -> Any:
            nonlocal count
            count += 1
            if count == k:
                raise error
            return original(*args, **others)

        monkeypatch.setattr(images, "save_png", save)

    return install


def test_a_run_of_seeds_is_one_call(draw: Sana, calls: list[Any]) -> None:
    assert draw("a fox", "--seed", "3-5,9", "--batch-size", "2", "--steps", "1").code == 0
    assert [(request.seed, request.count, request.batch_size) for request in calls] == [(3, 3, 2), (9, 1, 2)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_disk_that_is_full_at_the_kth_picture(draw: Sana, failing_save: Any, k: int) -> None:
    failing_save(k, OSError(28, "No space left on device", "a-fox.png"))
    said = draw("a fox", "--seed", "5-7", "--steps", "1")
    assert said.code == (1 if k == 1 else 6)
    assert said.out.split() == [f"a-fox-{seed}.png" for seed in range(5, 4 + k)]
    assert sorted(os.listdir()) == said.out.split()
    assert "No space left on device" in said.err
    if k > 1:
        rest = "For the rest, repeat the command with --skip-existing."
        assert said.err.endswith(f"sana: No space left on device. {k - 1} of 3 pictures were written. {rest}\n")


def test_a_real_full_disk_leaves_no_half_file(draw: Sana) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        said = draw("a fox", "--seed", "1-2", "--steps", "1", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert said.code == 1
    assert "File too large" in said.err
    assert len(said.err.splitlines()) == 1
    assert os.listdir() == []


def test_a_folder_that_vanishes_is_one_sentence(draw: Sana, calls: list[Any], failing_save: Any) -> None:
    class Gone(OSError):
        pass

    Path("out").mkdir()
    original = images.save_png

    def save(*args: Any, **others: Any) -> Any:
        path = original(*args, **others)
        if path.name == "a-fox-5.png":
            path.unlink()
            Path("out").rmdir()
        return path

    images.save_png, before = save, images.save_png
    try:
        said = draw("a fox", "--seed", "5-6", "--steps", "1", "-o", "out/")
    finally:
        images.save_png = before
    assert said.code == 6
    assert "The folder out does not exist" in said.err
    assert "Traceback" not in said.err


def test_interrupted_in_the_loop_what_is_drawn_is_written(draw: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.generate

    def generate(parts: Any, request: Any, **others: Any) -> Iterator[Any]:
        pictures = 0
        for event in original(parts, request, **others):
            yield event
            pictures += hasattr(event, "images")
            if pictures == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", generate)
    monkeypatch.setattr("secrets.randbelow", lambda _: 5)
    said = draw("a fox", "--count", "4", "--steps", "1")
    assert said.code == 130
    assert said.out.split() == ["a-fox-5.png", "a-fox-6.png"]
    end = "2 of 4 pictures were written. For the rest, repeat the command with --seed 5 --skip-existing.\n"
    assert said.err.endswith(f"sana: Interrupted. {end}")
    monkeypatch.setattr(engine, "generate", original)
    again = draw("a fox", "--count", "4", "--steps", "1", "--seed", "5", "--skip-existing", "--json")
    document = json.loads(again.out)
    assert document["files"] == ["a-fox-7.png", "a-fox-8.png"]
    assert document["skipped"] == ["a-fox-5.png", "a-fox-6.png"]


def test_nothing_is_left_to_draw(draw: Sana, calls: list[Any]) -> None:
    assert draw("a fox", "--seed", "5", "--steps", "1").code == 0
    before = Path("a-fox-5.png").read_bytes()
    calls.clear()
    said = draw("a fox", "--seed", "5", "--steps", "1", "--skip-existing")
    assert (said.code, said.out, calls) == (0, "", [])
    assert "other settings" not in said.err
    said = draw("a fox", "--seed", "5", "--steps", "2", "--skip-existing")
    assert (said.code, said.out, calls) == (0, "", [])
    assert "warning: a-fox-5.png was drawn with other settings; it is left as it is." in said.err
    assert Path("a-fox-5.png").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"here", b"\x89PNG\r\n\x1a\n and then the power failed"])
def test_half_a_picture_is_not_taken_for_a_whole_one(content: bytes, draw: Sana, calls: list[Any]) -> None:
    Path("a-fox-5.png").write_bytes(content)
    said = draw("a fox", "--seed", "5", "--skip-existing")
    assert (said.code, calls) == (2, [])
    assert said.err.endswith("sana: a-fox-5.png is no whole picture. Delete it, or draw it again with --force.\n")
    assert Path("a-fox-5.png").read_bytes() == content


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch, tiny_parts: Any) -> Any:
    """Let the decoder run out of memory the first `times` times."""

    original = type(tiny_parts.vae).decode

    def install(times: int) -> None:
        count = 0

        def decode(self: Any, *args: Any, **others: Any) -> Any:
            nonlocal count
            count += 1
            if count <= times:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, *args, **others)

        monkeypatch.setattr(type(tiny_parts.vae), "decode", decode)

    return install


def test_latents_are_kept_until_the_picture_is_written(
    draw: Sana, out_of_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    original = images.save_png

    def save(*args: Any, **others: Any) -> Any:
        seen.append(sorted(os.listdir()))
        return original(*args, **others)

    monkeypatch.setattr(images, "save_png", save)
    out_of_memory(1)
    said = draw("a fox", "--seed", "5-6", "--batch-size", "2", "--steps", "1")
    assert said.code == 0, said.err
    assert seen == [["a-fox-5.latents.safetensors"], ["a-fox-5.latents.safetensors", "a-fox-5.png"]]
    assert sorted(os.listdir()) == ["a-fox-5.png", "a-fox-6.png"]
    assert "the finished latents are in a-fox-5.latents.safetensors until it worked" in said.err


def test_latents_outlive_a_decoder_that_never_works(draw: Sana, sana: Sana, out_of_memory: Any) -> None:
    Path("a-fox-5.latents.safetensors").write_text("of yesterday")
    out_of_memory(10_000)
    said = draw("a fox", "--seed", "5", "--steps", "1")
    assert said.code == 4
    file = "a-fox-5-2.latents.safetensors"
    assert said.err.splitlines()[-1] == (
        "sana: The memory is full: the picture cannot be decoded, not even in pieces. Lower --size."
        f" 0 of 1 pictures were written. Finished latents are in {file}; for their pictures: sana decode {file}"
    )
    assert sorted(os.listdir()) == [file, "a-fox-5.latents.safetensors"]
    out_of_memory(0)
    assert sana("decode", file, "-o", "late.png").code == 0
    assert draw("a fox", "--seed", "5", "--steps", "1", "-o", "once.png").code == 0
    with Image.open("late.png") as late, Image.open("once.png") as once:
        assert late.tobytes() == once.tobytes()


def test_latents_that_cannot_be_saved_do_not_stop_the_picture(
    draw: Sana, out_of_memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sana.engine.latents.save_latents", fail)
    out_of_memory(1)
    said = draw("a fox", "--seed", "5-6", "--batch-size", "2", "--steps", "1")
    assert said.code == 0, said.err
    assert "warning: The finished latents could not be saved ([Errno 28] No space left on device)." in said.err


def test_the_bytes_of_one_picture_go_to_stdout(
    capfdbinary: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.apps.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["a fox", "-m", str(tiny_folder), "--seed", "5", "--steps", "1", "-o", "-"]) == 0
    said = capfdbinary.readouterr()
    assert said.out.startswith(b"\x89PNG\r\n")
    assert b"seed 5" in said.err
    Path("a.png").write_bytes(said.out)
    assert read_metadata("a.png").request().seed == 5
    assert sorted(os.listdir()) == ["a.png"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--count", "2"), "--output - writes one picture, not 2. Name a folder instead."),
        (("--json",), "--output - and JSON would both go to stdout. Drop one of them."),
        (("--events",), "--output - and JSON would both go to stdout."),
    ],
)
def test_stdout_takes_one_picture_and_nothing_else(
    sana: Sana, no_loading: None, words: tuple[str, ...], sentence: str
) -> None:
    said = sana("a fox", "-o", "-", *words)
    assert said.code == 2
    assert sentence in said.err


def test_no_bytes_into_a_terminal(sana: Sana, no_loading: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "which a terminal cannot show" in sana("a fox", "-o", "-").err


def test_events_tell_steps_and_pictures(draw: Sana) -> None:
    said = draw("a fox", "--seed", "5-6", "--steps", "2", "--events", "-q")
    assert said.code == 0, said.err
    events = [json.loads(line) for line in said.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind in ("step", "image", "done")].count("step") == 4
    assert kinds[-1] == "done"
    pictures = [event for event in events if event["event"] == "image"]
    assert [(event["file"], event["seed"]) for event in pictures] == [("a-fox-5.png", 5), ("a-fox-6.png", 6)]
    assert all(event["seconds"] > 0 for event in pictures)


def test_a_non_finite_picture_writes_nothing(draw: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: object, **__: object) -> Iterator[Any]:
        raise NonFinite("The latents contain NaN.")
        yield

    monkeypatch.setattr(engine, "generate", generate)
    assert draw("a fox", "--seed", "5").err.endswith("sana: The latents contain NaN.\n")
    assert os.listdir() == []


def test_links_and_folders_in_the_way(draw: Sana, no_loading: None) -> None:
    Path("a-fox-5.png").symlink_to("nowhere.png")
    said = draw("a fox", "--seed", "5")
    assert said.code == 2
    assert "a-fox-5.png exists already" in said.err
    os.mkfifo("a-fox-6.png")
    assert "a-fox-6.png is no ordinary file" in draw("a fox", "--seed", "6", "--force").err


def test_force_replaces_a_link_and_not_what_it_points_to(draw: Sana) -> None:
    Path("precious.png").write_text("precious")
    Path("a-fox-5.png").symlink_to("precious.png")
    assert draw("a fox", "--seed", "5", "--force", "--steps", "1").code == 0
    assert Path("precious.png").read_text() == "precious"
    with Image.open("a-fox-5.png") as image:
        assert image.size == (256, 256)


def test_a_folder_that_everybody_may_write_to_is_told(draw: Sana) -> None:
    Path("open").mkdir()
    Path("open").chmod(0o777)
    said = draw("a fox", "--seed", "5", "--steps", "1", "-o", "open/")
    assert said.code == 0
    assert "warning: Every user of this computer can replace files in" in said.err
    Path("open").chmod(0o1777)
    assert "Every user" not in draw("a fox", "--seed", "6", "--steps", "1", "-o", "open/").err


def test_a_folder_that_is_a_link_and_a_model_that_everybody_may_change_are_told(
    sana: Sana, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model").chmod(0o777)
    said = sana("a fox", "-m", "model", "--seed", "5", "--steps", "1", "-o", "here/")
    assert said.code == 0, said.err
    assert f"here is a link; the pictures go to {tmp_path / 'there'}." in said.err
    assert f"warning: Every user of this computer can replace the model in {tmp_path / 'model'}." in said.err
    assert os.listdir("there") == ["a-fox-5.png"]
    (tmp_path / "lost").symlink_to("nowhere")
    assert sana("a fox", "--seed", "5", "-o", "lost/").code == 2


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "x" * 300 + "/", "y/" * 3000, "a\x00b.png"])
def test_names_that_no_file_can_have(sana: Sana, no_loading: None, name: str) -> None:
    said = sana("a fox", "-o", name)
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert "Traceback" not in said.err
    assert len(said.err) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.3])
def test_ctrl_c_at_any_moment_leaves_whole_files_only(tiny_folder: Path, tmp_path: Path, delay: float) -> None:
    words = ["a fox", "-m", str(tiny_folder), "--seed", "1-999", "--steps", "1", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
         "from sana.apps.cli import main; sys.exit(main(sys.argv[1:]))", *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    files = sorted(os.listdir(tmp_path))
    assert len(files) == len(out.splitlines()) + 1
    for file in files:
        assert not file.startswith(".")
        with Image.open(tmp_path / file) as image:
            image.load()
    rest = "For the rest, repeat the command with --skip-existing."
    assert err == f"sana: Interrupted. {len(files)} of 999 pictures were written. {rest}\n"


@pytest.mark.slow
def test_of_eight_processes_with_one_name_one_wins(tiny_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sana", "a fox", "-m", str(tiny_folder), "--seed", "5", "--steps", "1", "-q"]
    many = [subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    said = [process.communicate(timeout=300)[1] for process in many]
    assert sorted(process.returncode for process in many) == [0] + [2] * 7
    assert sum("exists already" in text for text in said) == 7
    assert os.listdir(tmp_path) == ["a-fox-5.png"]
