"""Features in shards: the same bits as without, by any number of processes, after any stop, and damage is told."""

import dataclasses
import hashlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana.checkpoints.hub import locate
from sana.data import cutouts
from sana.errors import CheckpointError, InvalidInput, NonFinite
from sana.training import dataset_features
from sana.training.config import OptimizerSettings, Recipe, RunSettings
from sana.training.dataset_batches import DatasetBatches
from sana.training.dataset_features import FACTS, DatasetFeatures, Encoders, Pictures
from sana.training.drawn_features import scene_of
from sana.training.loop import Trainer
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.origins import ModelOrigin
from sana.training.precompute import features_of
from sana.training.starting import StartModel

CPU = torch.device("cpu")
RUN = {"steps": 3, "batch_size": 2, "precision": "float32", "ema": 0.0, "evaluate_every": 1000, "device": "cpu"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_features, "SHARD", 2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.fromarray(cutouts.render(scene_of(3, number))).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing number {number}", encoding="utf-8")
    return folder


def recipe(pictures: Path, features: Path | str = "", **run: Any) -> Recipe:
    data = {"path": str(pictures), "features": str(features)}
    settings = {"start": "nano", "train": "lora", "data": data, "prompts": []}
    return Recipe(
        objective="flow_matching", run=RunSettings(**{**RUN, **run}), optimizer=OptimizerSettings(), settings=settings
    )


def computed(pictures: Path, folder: Path) -> DatasetFeatures:
    (features,) = features_of(recipe(pictures, folder), "my.toml")
    list(features.compute())
    return features


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of an uninterrupted computation. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_features, "SHARD", 2)
        computed(pictures, folder)
    return folder


def losses(one: Recipe, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    objective = FlowMatchingObjective(FlowMatchingSettings(**one.settings), one.run, CPU)
    trainer = Trainer(objective, one.run, OptimizerSettings(lr=1e-2, warmup=1), folder)
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    found = [step.loss for step in trainer.steps()]
    return found, {name: p.detach().clone() for name, p in objective.module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_with_features_equals_training_without_to_the_bit(
    pictures: Path, whole: Path, tmp_path: Path, precision: str
) -> None:
    before = digests(whole)
    plain, weights = losses(recipe(pictures, precision=precision), tmp_path / "plain")
    read, same = losses(recipe(pictures, whole, precision=precision), tmp_path / "read")
    assert read == plain
    assert len(set(plain)) > 1
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert digests(whole) == before, "the training computed features of its own"


def test_shares_of_several_processes_make_what_one_makes(pictures: Path, whole: Path, tmp_path: Path) -> None:
    counts = []
    for number in (2, 1, 3):
        (features,) = features_of(recipe(pictures, tmp_path), "my.toml")
        counts.append(len(list(features.compute((number, 3)))))
        is_done = all(file.exists() for _, file in features.shards())
        assert all((features.place(kind) / FACTS).exists() for kind in ("latents", "texts")) == is_done
    assert digests(tmp_path) == digests(whole)
    assert sum(counts) == len(digests(whole))
    assert min(counts) > 0


def test_processes_that_train_together_begin_with_different_shards(
    pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    batches = ModelOrigin(
        FlowMatchingSettings(**recipe(pictures, tmp_path).settings), RunSettings(**RUN), CPU, prepare=False
    ).batches
    assert isinstance(batches, DatasetBatches)
    with caplog.at_level(logging.INFO, "sana.training.dataset_batches"):
        batches.ready()
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"features {i} of {n}: {name}" for i, n, name in (
        (1, 3, "00001.safetensors"), (2, 3, "00000.safetensors"), (3, 3, "00002.safetensors"),
        (1, 6, "00000.safetensors"), (3, 6, "00002.safetensors"), (5, 6, "00001.safetensors"),
    )]  # fmt: skip
    assert digests(tmp_path) == digests(whole)


def test_a_computation_that_is_killed_goes_on_and_makes_the_same(pictures: Path, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text(
        'objective = "flow_matching"\n[run]\nsteps = 3\nbatch_size = 2\nprecision = "float32"\ndevice = "cpu"\n'
        f'[flow_matching]\nstart = "nano"\ntrain = "lora"\n[flow_matching.data]\npath = "{pictures}"\n'
        f'features = "{tmp_path / "store"}"\n'
    )
    script = (
        "import sys, sana.training.dataset_features as d; d.SHARD = 2; from sana.apps.cli import main;"
        " sys.exit(main(['dataset', 'features', sys.argv[1], '--json']))"
    )
    command = [sys.executable, "-c", script, str(file)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while not digests(tmp_path) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    begun = digests(tmp_path / "store")
    assert begun
    assert len(begun) < len(digests(whole)), "it was finished before it was killed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "store") == digests(whole)


def test_what_a_killed_process_left_is_swept_and_what_another_writes_is_not(pictures: Path, tmp_path: Path) -> None:
    (features,) = features_of(recipe(pictures, tmp_path), "my.toml")
    place = features.place("latents")
    place.mkdir(parents=True)
    old, new = (place / f".00000.safetensors.saving-{number}-ab" for number in (1, 2))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    list(features.compute())
    assert (old.exists(), new.exists()) == (False, True)


def damaged(kind: str, file: Path) -> None:
    data = bytearray(file.read_bytes())
    if kind == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data[-5] ^= 4
        file.write_bytes(data)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "lacking":
        tensors = load_file(file)
        tensors.pop("0", None)
        save_file(tensors, file)
    else:
        file.unlink()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("cut", "is damaged"),
        ("flipped", "is damaged"),
        ("empty", "is damaged"),
        ("lacking", "is not whole: it lacks 0. Remove it and compute it again."),
        ("missing", "is missing; compute the features again."),
    ],
)
def test_a_damaged_or_missing_shard_is_told_in_one_sentence(
    pictures: Path, tmp_path: Path, kind: str, sentence: str
) -> None:
    features = computed(pictures, tmp_path)
    file = features.place("latents") / "00000.safetensors"
    damaged(kind, file)
    for _ in range(2):  # the second time nothing of the bad file may have been kept
        with pytest.raises(CheckpointError) as caught:
            features.picture("latents", 0)
        assert sentence in str(caught.value)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    if kind == "flipped":
        with pytest.raises(CheckpointError, match="Remove it and run"):
            features.picture("latents", 1)


def test_a_removed_shard_comes_back_with_the_same_bits(pictures: Path, whole: Path, tmp_path: Path) -> None:
    features = computed(pictures, tmp_path)
    (features.place("texts") / "00001.safetensors").unlink()
    (again,) = features_of(recipe(pictures, tmp_path), "my.toml")
    made = [file.name for file, _, _ in again.compute()]
    assert made == ["00001.safetensors"]
    assert digests(tmp_path) == digests(whole)


class Counting:
    """Stands for the encoders: a picture becomes its first pixel, a text its length."""

    def __init__(self, folder: Path | None = None) -> None:
        self.asked: list[str] = []
        self.start: Any = type(
            "Start", (), {"folder": folder, "text_dtype": torch.float32, "release": lambda _: None}
        )()

    def picture(self, picture: Image.Image) -> Tensor:
        self.asked.append("picture")
        return torch.tensor(picture.getpixel((0, 0))).float().view(3, 1, 1)

    def text(self, text: str) -> Tensor:
        self.asked.append(text)
        return torch.full((1, 1), float(len(text)))


def store(encoders: Any, folder: Path | None, count: int = 7, identity: str = "one") -> DatasetFeatures:
    kinds = {"latents": Pictures(count=count, read=lambda i: Image.new("RGB", (4, 4), (i, 0, 0)), identity=identity)}
    return DatasetFeatures(encoders, kinds, [f"text {i:0{i + 1}d}" for i in range(count)], folder)


@pytest.fixture
def nano() -> Path:
    return locate("nano").folder


def test_after_a_shard_was_read_once_single_features_are_read_and_memory_stays_bounded(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = store(Counting(nano), tmp_path)
    list(features.compute())
    features._memory._limit = 20  # bytes: one latent of 12 and not a second one
    whole: list[Path] = []
    read = dataset_features.read_tensors
    monkeypatch.setattr(dataset_features, "read_tensors", lambda file: whole.append(file) or read(file))
    for index in (0, 5, 1, 4, 0, 6, 3, 2, 1):
        assert features.picture("latents", index)[0] == index
        assert features._memory._bytes <= 20
    assert len(whole) == len(set(whole)) == 4


def test_without_a_folder_a_feature_is_computed_once_and_with_one_never_again(nano: Path, tmp_path: Path) -> None:
    encoders = Counting()
    features = store(encoders, None)
    for _ in range(2):
        assert features.picture("latents", 3)[0] == 3
        assert features.text("text 0") == 6
    assert encoders.asked == ["picture", "text 0"]
    list(store(Counting(nano), tmp_path).compute())
    later = Counting(nano)
    features = store(later, tmp_path)
    assert list(features.compute()) == []
    assert (features.picture("latents", 3)[0], features.text("text 0")) == (3, 6)
    assert later.asked == []
    with pytest.raises(CheckpointError, match='lack the text "other"'):
        features.text("other")


def test_what_decides_the_features_decides_their_folder(nano: Path, tmp_path: Path) -> None:
    def places(**changes: Any) -> tuple[Path, Path]:
        folder = changes.pop("folder", nano)
        features = store(Counting(folder), tmp_path, **changes)
        return features.place("latents"), features.place("texts")

    latents, texts = places()
    assert places() == (latents, texts)
    assert places(identity="two")[0] != latents
    assert places(identity="two")[1] == texts
    assert places(count=6)[1] != texts
    other = Counting(nano)
    other.start.text_dtype = torch.bfloat16
    assert store(other, tmp_path).place("texts") != texts
    copied = tmp_path / "model"
    for name in ("vae", "text_encoder", "tokenizer"):
        (copied / name).mkdir(parents=True)
        for file in (nano / name).iterdir():
            (copied / name / file.name).write_bytes(file.read_bytes())
    assert places(folder=copied) == (latents, texts)
    (weights,) = (copied / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    names = sorted(tensors)
    save_file(tensors, weights)  # as other programs write it, without a digest
    without = places(folder=copied)[0]
    tensors[names[len(names) // 2]] += 1
    save_file(tensors, weights)
    assert places(folder=copied)[0] not in (latents, without)
    assert places(folder=copied)[1] == texts


def test_encoders_do_not_follow_the_precision_of_the_step(pictures: Path) -> None:
    encoders = Encoders(StartModel("nano", CPU))
    picture = Image.open(pictures / "0.png").convert("RGB")
    plain = encoders.picture(picture), encoders.text("thing number 0")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoders.picture(picture), encoders.text("thing number 0")
    assert all(torch.equal(one, other) for one, other in zip(plain, mixed, strict=True))
    assert plain[0].dtype == torch.float32


def test_a_picture_that_gives_nan_is_named_and_leaves_no_file(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (features,) = features_of(recipe(pictures, tmp_path), "my.toml")
    vae = features.encoders.start.autoencoder
    calls = itertools.count()
    encode = vae.encode
    broken = torch.full((1, 1, 1, 1), torch.nan)
    monkeypatch.setattr(vae, "encode", lambda x: (broken,) if next(calls) == 3 else encode(x))
    with pytest.raises(NonFinite, match=r"latents of picture 3: The autoencoder made NaN or infinity of a picture"):
        list(features.compute())
    assert [file.name for file in sorted(tmp_path.rglob("*.safetensors"))] == ["00000.safetensors"]


def test_small_pictures_that_are_taken_in_later_get_features_too(tmp_path: Path) -> None:
    for number, side in enumerate((256, 256, 100)):
        pixels = np.full((side, side, 3), 40 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a thing", encoding="utf-8")
    for small, count in (("skip", 2), ("upscale", 3)):
        one = recipe(tmp_path, tmp_path / "store")
        changed = {**one.settings, "data": {**one.settings["data"], "small": small}}
        (features,) = features_of(dataclasses.replace(one, settings=changed), "my.toml")
        list(features.compute())
        assert [len(features.picture("latents", i)) for i in range(count)] == [
            features.picture("latents", 0).shape[0]
        ] * count


def test_new_captions_cost_no_new_latents_and_new_pixels_do(pictures: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pictures, tmp_path / "data"))

    def places() -> tuple[Path, Path]:
        (features,) = features_of(recipe(data, tmp_path / "store"), "my.toml")
        return features.place("latents"), features.place("texts")

    before = places()
    (data / "1.txt").write_text("something else")
    after = places()
    assert after[0] == before[0]
    assert after[1] != before[1]
    Image.fromarray(cutouts.render(scene_of(3, 9))).save(data / "1.png")
    assert places()[0] != before[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "autoencoder"}, "my.toml trains autoencoder, which reads no features of pictures."),
        ({"settings": {"start": "nano", "features": "x"}}, r"my.toml has no \[flow_matching.data\]"),
        ({"settings": {"start": "nano", "data": {"path": "x"}}}, "my.toml keeps features in memory; name a folder"),
    ],
)
def test_recipes_without_features_to_compute_are_refused(changes: dict[str, Any], sentence: str) -> None:
    told = {"objective": "flow_matching", "run": RunSettings(**RUN), "optimizer": OptimizerSettings(), **changes}
    with pytest.raises(InvalidInput, match=sentence):
        features_of(Recipe(**told), "my.toml")


def test_the_log_tells_of_features_that_a_training_computes(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = recipe(pictures, tmp_path)
    with caplog.at_level(logging.INFO, "sana.training.dataset_batches"):
        FlowMatchingObjective(FlowMatchingSettings(**one.settings), one.run, CPU)
    assert "features 6 of 6: 00002.safetensors" in caplog.text
