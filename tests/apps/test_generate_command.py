"""`sana generate` with the tiny model: files, seeds, streams, JSON, and everything that can go wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Sana
from PIL import Image

import sana as sana_package
from sana import read_metadata
from sana.apps.cli.machine import Machine
from sana.apps.cli.order import parse
from sana.apps.cli.output import Terminal
from sana.apps.cli.verbs.generate import _introduce
from sana.cards import CARDS
from sana.engine import generate as engine
from sana.engine.request import Result
from sana.errors import InvalidInput, NonFinite


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the drawing of the picture with a certain seed end with an error."""
    original = engine.generate

    def install(seed: int, error: BaseException) -> None:
        def generate(parts: Any, request: Any, **others: Any) -> Iterator[Any]:
            whole, pictures = original(parts, request, **others), 0
            while True:
                if request.seed + pictures == seed:
                    raise error
                try:
                    event = next(whole)
                except StopIteration as end:
                    return end.value
                pictures += isinstance(event, Result)
                yield event

        monkeypatch.setattr(engine, "generate", generate)

    return install


def pixels(path: str | Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_picture_its_path_and_its_settings(draw: Sana) -> None:
    said = draw("a Red fox", "--seed", "7", "--guidance", "3")
    assert said.code == 0
    assert said.out == "a-red-fox-7.png\n"
    assert "seed 7 · 256x256 · 2 steps · cpu · " in said.err
    assert "%" not in said.err, "half a second needs no lines of progress"
    request = read_metadata("a-red-fox-7.png").request()
    assert (request.prompt, request.seed, request.steps, request.guidance) == ("a Red fox", 7, 2, 3.0)
    with Image.open("a-red-fox-7.png") as image:
        assert image.size == (256, 256)


def test_a_picture_is_the_same_alone_and_among_others(draw: Sana) -> None:
    said = draw("a fox", "--seed", "5", "--count", "2", "-o", "many/")
    assert said.out.split() == ["many/a-fox-5.png", "many/a-fox-6.png"]
    assert draw("a fox", "--seed", "6", "-o", "one.png").out == "one.png\n"
    assert pixels("one.png") == pixels("many/a-fox-6.png") != pixels("many/a-fox-5.png")
    draw("a fox", "--seed", "6,5", "--batch-size", "2", "-o", "list/")
    draw("a fox", "--seed", "5-6", "--batch-size", "2", "-o", "pair/")
    assert pixels("list/a-fox-6.png") == pixels("pair/a-fox-6.png")


def test_a_drawn_seed_is_told_and_stored(draw: Sana) -> None:
    path = draw("a fox", "-q").out.strip()
    seed = read_metadata(path).request().seed
    assert path == f"a-fox-{seed}.png"


def test_json_is_one_document(draw: Sana) -> None:
    said = draw("a fox", "--seed", "3-4", "--json", "-q")
    document = json.loads(said.out)
    assert said.err == ""
    assert document["files"] == ["a-fox-3.png", "a-fox-4.png"]
    assert document["seeds"] == [3, 4]
    assert document["settings"]["prompt"] == "a fox"
    assert (document["settings"]["steps"], document["settings"]["count"]) == (2, 2)
    assert {"load", "text", "denoise", "decode", "total"} <= set(document["timings"])
    assert document["warnings"] == []
    assert document["model"]["device"] == "cpu"


@pytest.mark.parametrize(("level", "labelled", "recorded"), [("full", 1, 1), ("label", 1, 0), ("none", 0, 0)])
def test_metadata_levels(draw: Sana, level: str, labelled: int, recorded: int) -> None:
    draw("a fox", "--metadata", level, "-o", "a.png", "--steps", "1")
    found = read_metadata("a.png")
    assert (found.generated, found.record is not None, bool(found.parameters)) == (labelled, recorded, recorded)


def test_what_is_there_is_not_overwritten_and_nothing_is_loaded_for_that(sana: Sana, no_loading: None) -> None:
    Path("a-fox-3.png").write_text("precious")
    said = sana("a fox", "--seed", "1-4")
    assert said.code == 2
    assert "a-fox-3.png exists already. Add --force" in said.err
    assert Path("a-fox-3.png").read_text() == "precious"
    assert sorted(Path().iterdir()) == [Path("a-fox-3.png")]


def test_force_overwrites(draw: Sana) -> None:
    Path("a-fox-3.png").write_text("precious")
    assert draw("a fox", "--seed", "3", "--force", "--steps", "1").code == 0
    assert len(pixels("a-fox-3.png")) == 3 * 256 * 256


def test_a_random_seed_avoids_names_that_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draws = iter([5, 5, 8])
    monkeypatch.setattr("secrets.randbelow", lambda _: next(draws))
    monkeypatch.chdir(tmp_path)
    Path("a-fox-6.png").touch()
    assert parse(["a fox", "--count", "2"]).seeds == [8, 9]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "What should the picture show?"),
        (("",), 2, "The prompt is empty."),
        (("a", "red", "fox"), 2, 'Put it in quotes: sana "a red fox"'),
        (("a\udcff",), 2, "not valid UTF-8"),
        (("a\x00",), 2, "sana: The prompt contains a NUL character."),
        (("x", "--steps", "0"), 2, "--steps must be a whole number from 1 to 1000 but is 0."),
        (("x", "--size", "512"), 2, "nano draws 256 x 256 only, not 512 x 512"),
        (("x", "--size", "0x0"), 2, "--size takes a size such as"),
        (("x", "--size", "256", "-W", "256", "-H", "256"), 2, "Give the one or the others"),
        (("x", "-W", "256"), 2, "--width and --height go together"),
        (("x", "--sampler", "dpm"), 2, "--sampler must be one of flow-dpm, flow-euler, scm"),
        (("x", "--sampler", "scm"), 2, "nano does not work with --sampler 'scm'. Use 'flow-dpm'."),
        (("x", "-m", "sana-1.6b"), 3, "Did you mean 'sana-1.6b-1024'?"),
        (("x", "--seed", "1-2", "--count", "2"), 2, "Drop --count"),
        (("x", "--count", "0"), 2, "--count must be"),
        (("x", "--threads", "0"), 2, "--threads must be"),
        (("x", "-n", "blur", "--cfg", "1"), 2, "--negative-prompt has no effect with --guidance 1"),
        (("x", "--guidance-interval", "0.1", "0.9", "--cfg", "1"), 2, "--guidance-interval has no effect"),
        (
            ("x", "--guidance-interval", ".1", ".9", "-m", "sana-sprint-0.6b-1024"),
            2,
            "where --guidance-interval has no",
        ),
        (("x", "-n", "y", "-m", "sana-sprint-0.6b-1024"), 2, "has no negative prompt"),
        (("x", "--eta", "0.5"), 2, "There is no --eta"),
        (("x", "-o", "a.gif"), 2, "Pictures are written as PNG"),
    ],
)
def test_bad_input_is_one_sentence_and_its_exit_code(
    sana: Sana, no_loading: None, words: tuple[str, ...], code: int, sentence: str
) -> None:
    said = sana("generate", *words)
    assert said.code == code
    assert sentence in said.err
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "`" not in said.err


@pytest.mark.parametrize(("model", "sentence"), [("./nowhere", "There is no model folder"), (".", "model_index.json")])
def test_missing_folders_are_exit_3(sana: Sana, model: str, sentence: str) -> None:
    said = sana("x", "-m", model)
    assert said.code == 3
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1


def test_options_without_their_packages_are_refused(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = sana("x", "--clean-caption")
    assert said.code == 2
    assert "needs the packages beautifulsoup4 and ftfy" in said.err


def test_a_broken_folder_is_exit_3(draw: Sana, tiny_folder: Path, sana: Sana, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = sana("a fox", "-m", str(broken))
    assert said.code == 3
    assert "diffusion_pytorch_model.safetensors" in said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.glob("*.png"))


def test_an_error_after_the_first_picture_is_a_partial_batch(draw: Sana, break_at: Any) -> None:
    break_at(6, NonFinite("The latents contain NaN."))
    said = draw("a fox", "--seed", "5-7", "--json")
    assert said.code == 6
    assert "The latents contain NaN. 1 of 3 pictures were written." in said.err
    document = json.loads(said.out)
    assert document["files"] == ["a-fox-5.png"]
    assert document["error"]["exit_code"] == 6
    assert Path("a-fox-5.png").exists()


def test_a_full_disk_after_the_first_picture_is_a_partial_batch_too(draw: Sana, break_at: Any) -> None:
    break_at(6, OSError(28, "No space left on device"))
    said = draw("a fox", "--seed", "5-7")
    assert said.code == 6
    assert "sana: No space left on device. 1 of 3 pictures were written." in said.err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (OSError(28, "No space left on device", "a.png"), 1, "sana: No space left on device: a.png.\n"),
        (NonFinite("The latents contain NaN."), 1, "sana: The latents contain NaN.\n"),
        (MemoryError(), 4, "The memory is full. Lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "The memory is full. Lower --batch-size"),
        (KeyboardInterrupt(), 130, "Interrupted. 0 of 1 pictures were written."),
        (RuntimeError("odd\nvery odd"), 1, "Unexpected error (RuntimeError: odd). Run the command with -v"),
        (InvalidInput("`steps` is bad."), 2, "--steps is bad."),
    ],
)
def test_errors_of_the_drawing(draw: Sana, break_at: Any, error: BaseException, code: int, sentence: str) -> None:
    break_at(5, error)
    said = draw("a fox", "--seed", "5")
    assert said.code == code
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not list(Path().glob("*"))


def test_verbose_shows_the_traceback(draw: Sana, break_at: Any) -> None:
    break_at(5, RuntimeError("odd"))
    assert "Traceback" in draw("a fox", "--seed", "5", "-v").err


@pytest.mark.slow
def test_ctrl_c_ends_the_command_with_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sana", "a fox", "-m", str(tiny_folder), "--seed", "1-999", "--steps", "1", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sana_package.__file__).parents[1])}
    pipe = subprocess.PIPE

    def listen() -> None:
        # A suite that a shell started in the background ignores SIGINT, and its children would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        words, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=environment, preexec_fn=listen
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "a-fox-1.png\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith("sana: Interrupted. ")
    assert err.endswith(" of 999 pictures were written. For the rest, repeat the command with --skip-existing.\n")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_first_command_of_all_draws_with_the_built_in_model(sana: Sana) -> None:
    said = sana("a red fish above a yellow boat", "--seed", "7", "--steps", "2")
    assert said.code == 0
    assert said.out == "a-red-fish-above-a-yellow-boat-7.png\n"
    assert said.err.startswith("nano is the built-in model")
    assert len(pixels("a-red-fish-above-a-yellow-boat-7.png")) == 3 * 256 * 256


def test_the_toy_is_called_a_toy(capsys: pytest.CaptureFixture[str]) -> None:
    _introduce(CARDS["nano"], parse(["a fox"]), Terminal())
    assert "a toy that shows that everything works, not SANA's quality" in capsys.readouterr().err
    _introduce(CARDS["nano"], parse(["a fox"]), Terminal(quiet=True))
    assert capsys.readouterr().err == ""


def test_models_from_the_hub_are_introduced_with_their_terms(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    _introduce(CARDS["sana-1.6b-512"], parse(["一只猫", "-m", "sana-1.6b-512"]), terminal)
    said = capsys.readouterr().err
    assert "huggingface.co/Efficient-Large-Model/Sana_1600M_512px_diffusers" in said
    assert "NVIDIA licence (NSCL v2-custom) and Gemma terms of use" in " ".join(said.split())
    assert "not trained on Chinese" in terminal.warnings[0]


def test_a_small_model_draws_on_one_thread(tiny_parts: Any) -> None:
    before = torch.get_num_threads()
    with Machine().in_use(tiny_parts):
        assert torch.get_num_threads() == 1
    with Machine(threads=3).in_use(tiny_parts):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_the_flags_are_the_fields_of_the_request(sana: Sana) -> None:
    import dataclasses

    from sana import Request

    said = sana("edit", "--help")
    text = " ".join(said.out.split())
    assert said.code == 0
    called = {"controls": "control", "loras": "lora", "pag_scale": "pag"}
    for one in dataclasses.fields(Request):
        assert one.name == "prompt" or f"--{called.get(one.name, one.name).replace('_', '-')}" in text
    assert "Number of denoising steps; more steps take longer" in text


def only_variants(tiny_folder: Path, target: Path, *kept: str) -> Path:
    """Copy the tiny model without its plain weights, and with these variants only."""
    import shutil

    shutil.copytree(tiny_folder, target)
    for file in target.rglob("*.safetensors*"):
        if not any(f".{name}" in file.name for name in kept):
            file.unlink()
    return target


def test_a_folder_with_one_variant_only_is_loaded_with_it(sana: Sana, tiny_folder: Path, tmp_path: Path) -> None:
    folder = only_variants(tiny_folder, tmp_path / "half", "bf16")
    said = sana("a fox", "-m", str(folder), "--seed", "5", "--steps", "1", "-o", "a.png")
    assert said.code == 0, said.err
    assert f"warning: {folder} has no plain weights; its variant bf16 is loaded." in said.err
    assert "· 1 step · cpu" in said.err


def test_sharded_weights_of_one_variant_are_found(tiny_parts: Any, sana: Sana, tmp_path: Path) -> None:
    from sana import SanaPipeline

    SanaPipeline(**tiny_parts.components).save_pretrained(tmp_path / "cut", variant="bf16", max_shard_size=40_000)
    assert list((tmp_path / "cut" / "transformer").glob("diffusion_pytorch_model.bf16-00001-of-*.safetensors"))
    assert sana("a fox", "-m", "cut", "--steps", "1").code == 0


def test_several_variants_without_plain_weights_are_named(sana: Sana, tiny_folder: Path, tmp_path: Path) -> None:
    folder = only_variants(tiny_folder, tmp_path / "half", "bf16", "fp16")
    said = sana("a fox", "-m", str(folder))
    assert said.code == 3
    assert "no plain weights but the variants bf16, fp16" in said.err


@pytest.mark.parametrize("guidance", ["0", "0.5"])
def test_guidance_that_changes_nothing_is_refused(sana: Sana, no_loading: None, guidance: str) -> None:
    said = sana("x", "--cfg", guidance, "--size", "256")
    assert said.code == 2
    assert "--guidance below 1 draws the same picture as 1" in said.err


def test_a_negative_seed_is_told_what_minus_one_means(sana: Sana, no_loading: None) -> None:
    said = sana("x", "--size", "256", "--seed=-5")
    assert said.code == 2
    assert "or -1, which draws a random seed as 'random' does" in said.err


def test_a_folder_with_the_card_of_nano_is_not_the_built_in_model(sana: Sana, tmp_path: Path) -> None:
    import shutil

    import sana as package

    asset = Path(package.__file__).parent / "assets" / "nano"
    shutil.copytree(asset, tmp_path / "mine")
    said = sana("a fox", "-m", "mine", "--seed", "5", "--steps", "1", "-o", "a.png")
    assert said.code == 0, said.err
    assert "built-in" not in said.err
    assert "mine has the architecture and the limits of nano" in said.err
    assert "a toy that shows" in said.err
    record = read_metadata("a.png").record
    assert record is not None
    assert (record["model"]["name"], record["model"]["source"]) == ("mine", str(tmp_path / "mine"))
    assert f"--model {tmp_path / 'mine'} " in sana("info", "a.png").out
    assert "draws 256 x 256 only" in sana("a fox", "-m", "mine", "--size", "512").err


def test_the_folder_of_the_package_is_the_built_in_model_however_it_is_named(sana: Sana) -> None:
    import sana as package

    said = sana("a fox", "-m", str(Path(package.__file__).parent / "assets" / "nano"), "--steps", "1", "-o", "a.png")
    assert "nano is the built-in model" in said.err
    record = read_metadata("a.png").record
    assert record is not None
    assert (record["model"]["name"], record["model"].get("source")) == ("nano", None)
    assert "--model" not in sana("info", "a.png").out
