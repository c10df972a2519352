"""`sana decode`: from the file that a run without memory left behind to the very pictures it was to draw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Sana
from PIL import Image

from sana import Parts, Request, generate_images, load, read_metadata
from sana.engine.generate import generate
from sana.engine.latents import Finished, save_latents

NANO = Request(prompt="a red fish", seed=7, count=2, batch_size=2, steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def nano() -> Parts:
    return load("nano")


@pytest.fixture
def saved(nano: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The latents of two pictures, kept when the decoder found no memory."""
    kept: list[Finished] = []
    with monkeypatch.context() as patch:

        def full(z: torch.Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(nano.vae, "_decode", full)
        with pytest.raises(RuntimeError):
            list(generate(nano, NANO, rescue=kept.append))
    assert len(kept) == 1
    return save_latents(tmp_path / "fish.latents.safetensors", kept[0])


def test_it_writes_the_pictures_of_the_undisturbed_run(sana: Sana, saved: Path, nano: Parts) -> None:
    said = sana("decode", str(saved))
    assert said.code == 0, said.err
    assert said.out.split() == ["a-red-fish-7.png", "a-red-fish-8.png"]
    expected = generate_images(nano, NANO)
    for name, picture, seed in zip(said.out.split(), expected.images, expected.seeds, strict=True):
        assert np.abs(np.asarray(Image.open(name)).astype(int) - np.asarray(picture).astype(int)).max() <= 1
        request = read_metadata(name).request()
        assert (request.prompt, request.seed, request.steps) == ("a red fish", seed, 1)


def test_only_the_autoencoder_is_loaded(sana: Sana, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sana.engine.parts as module

    seen: list[Parts] = []

    def spy(*words: object, **options: object) -> Parts:
        seen.append(load(*words, **options))  # type: ignore[arg-type]
        return seen[0]

    monkeypatch.setattr(module, "load", spy)
    assert sana("decode", str(saved), "-o", "out/").code == 0
    assert seen[0].transformer is seen[0].text_encoder is seen[0].tokenizer is None
    assert sorted(path.name for path in Path("out").iterdir()) == ["a-red-fish-7.png", "a-red-fish-8.png"]


def test_the_document_and_the_levels_of_metadata(sana: Sana, saved: Path) -> None:
    said = sana("decode", str(saved), "--json", "--metadata", "none", "-o", "x.png")
    document = json.loads(said.out)
    assert document["files"] == ["x-7.png", "x-8.png"]
    assert document["seeds"] == [7, 8]
    assert document["settings"]["prompt"] == "a red fish"
    assert read_metadata("x-7.png").record is None


def test_taken_names_are_refused_before_the_model_is_loaded(
    sana: Sana, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sana("decode", str(saved), "-q").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("sana.apps.cli.machine.Machine.load", lambda *_, **__: pytest.fail("loaded"))
        said = sana("decode", str(saved))
        assert said.code == 2
        assert "exists already" in said.err
    assert sana("decode", str(saved), "--force").code == 0


def test_the_model_comes_from_the_file_only_if_it_is_known_here(sana: Sana, saved: Path, nano: Parts) -> None:
    from sana.engine.latents import load_latents

    finished = load_latents(saved)

    def named(model: dict[str, object]) -> str:
        changed = Finished(latents=finished.latents, settings=finished.settings, seeds=finished.seeds, model=model)
        return str(save_latents(saved, changed, force=True))

    said = sana("decode", named({"name": "stranger/model"}))
    assert (said.code, "--model" in said.err) == (2, True)
    assert sana("decode", named({"name": 3}), "-m", "nano").code == 0
    assert sana("decode", named({"name": "nano", "source": "nowhere/there"}), "--force").code == 0


def test_latents_of_another_autoencoder_are_refused(sana: Sana, saved: Path) -> None:
    from sana.engine.latents import load_latents

    finished = load_latents(saved)
    other = Finished(
        latents=finished.latents[:, :2], settings=finished.settings, seeds=finished.seeds, model=finished.model
    )
    save_latents(saved, other, force=True)
    said = sana("decode", str(saved))
    assert said.code == 2
    assert "2 channels" in said.err


def test_what_is_no_file_of_latents_is_one_sentence(sana: Sana, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    for words, code in ((["x.safetensors"], 3), (["nothing"], 3), ([], 2), (["a", "b"], 2), (["."], 3)):
        said = sana("decode", *words)
        assert said.code == code, said.err
        assert len(said.err.strip().splitlines()) == 1
        assert "Unexpected" not in said.err


def test_memory_that_does_not_do_for_the_files_is_told(
    sana: Sana, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sana.engine.images.write_png", full)
    said = sana("decode", str(saved))
    assert said.code == 4
    assert len([line for line in said.err.splitlines() if line.startswith("sana: ")]) == 1
    assert not list(Path().glob("*.png"))
    assert not list(Path().glob(".*"))
