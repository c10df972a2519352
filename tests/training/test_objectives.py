"""The three objectives, small: their numbers, their data, and what they export."""

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana.checkpoints import storage
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.folder import load_parts
from sana.data import cutouts
from sana.data.cutout_captions import caption
from sana.data.cutout_shapes import KINDS
from sana.errors import CheckpointError
from sana.text.gemma import PromptEncoder
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from sana.training import drawn_features
from sana.training.autoencoder_pictures import cell_labels, to_tensor
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.drawn_batches import HELD_OUT, DrawnBatches
from sana.training.drawn_features import FeatureStore, fingerprint, load_text, scene_of
from sana.training.loop import Trainer
from sana.training.objectives.autoencoder import AutoencoderObjective, AutoencoderSettings
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.objectives.language_model import LanguageModelObjective, LanguageModelSettings, scene_labels
from sana.training.tokenizer import train_tokenizer

CPU = torch.device("cpu")
WIDTHS = [8, 8, 16, 32, 32, 32]
AUTOENCODER = {
    "latent_channels": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": WIDTHS,
    "decoder_block_out_channels": WIDTHS,
    "encoder_layers_per_block": [0, 1, 1, 1, 1, 1],
    "decoder_layers_per_block": [0, 1, 1, 1, 1, 1],
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
}
TRANSFORMER = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "sample_size": 8,
    "interpolation_scale": 1.0,
}
LANGUAGE = LanguageModelSettings(
    vocabulary_size=640,
    tokenizer_captions=300,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=64,
)


def run(**changes: object) -> RunSettings:
    base: dict[str, object] = {"steps": 3, "batch_size": 2, "precision": "float32", "ema": 0.5, "evaluate_every": 100}
    return RunSettings(**{**base, **changes})  # type: ignore[arg-type]


def train(objective: object, settings: RunSettings, folder: Path, lr: float = 2e-3) -> Trainer:
    trainer = Trainer(objective, settings, OptimizerSettings(name="muon", lr=lr, warmup=1), folder)  # type: ignore[arg-type]
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    for _ in trainer.steps():
        pass
    return trainer


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An autoencoder and a text encoder of three steps each."""
    folder = tmp_path_factory.mktemp("stages")
    autoencoder = AutoencoderObjective(AutoencoderSettings(model=AUTOENCODER), run(), CPU)
    train(autoencoder, run(), folder / "a").export(folder / "a" / "export")
    language = LanguageModelObjective(LANGUAGE, run(batch_size=4), CPU)
    train(language, run(batch_size=4), folder / "b").export(folder / "b" / "export")
    return folder / "a" / "export", folder / "b" / "export"


def test_cell_labels_name_the_thing_under_each_cell() -> None:
    thing = cutouts.Thing(kind="cat", colour="blue", x=112.0, y=48.0, radius=40.0)
    labels = cell_labels(cutouts.Scene(groups=(), things=(thing,), relation=None, background="sky"))
    assert labels[:, 1, 3].tolist() == [1 + list(KINDS).index("cat"), 1 + list(cutouts.COLOURS).index("blue")]
    assert labels[:, 7, 7].tolist() == [0, 0]
    assert int((labels[0] > 0).sum()) == 5


def test_the_same_draw_gives_the_same_loss_and_another_draw_another() -> None:
    objective = AutoencoderObjective(AutoencoderSettings(model=AUTOENCODER), run(), CPU)
    first, again, other = (float(objective.loss(draw)[0].detach()) for draw in (5, 5, 6))
    assert first == again != other


def test_decoder_refinement_leaves_every_latent_as_it_is(encoders: tuple[Path, Path], tmp_path: Path) -> None:
    settings = AutoencoderSettings(start=str(encoders[0]), phase="decoder")
    train(AutoencoderObjective(settings, run(), CPU), run(), tmp_path).export(tmp_path / "export")
    before, after = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (encoders[0], tmp_path / "export")
    )
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(before["decoder.conv_in.weight"], after["decoder.conv_in.weight"])
    assert fingerprint(encoders[0], "encoder.") == fingerprint(tmp_path / "export", "encoder.")


def test_the_exported_autoencoder_is_loaded_by_the_reference_with_unit_latents(encoders: tuple[Path, Path]) -> None:
    import diffusers

    ours = AutoencoderDC.from_pretrained(encoders[0], torch_dtype=torch.float32)
    theirs = diffusers.AutoencoderDC.from_pretrained(encoders[0], torch_dtype=torch.float32)
    pictures = to_tensor(cutouts.render(scene_of(0, 0))[None])
    with torch.no_grad():
        latents = ours.encode(pictures)[0]
        torch.testing.assert_close(latents, theirs.encode(pictures).latent, rtol=1e-4, atol=1e-4)
    assert 0.3 < float((latents * ours.config.scaling_factor).square().mean()) < 3


def test_the_tokenizer_depends_on_its_arguments_only_and_knows_every_text() -> None:
    one, two = (train_tokenizer(640, 0, 200) for _ in range(2))
    assert one.to_str() == two.to_str()
    text = "a red 🐟 über 一座房子\u0000 <bos>"
    assert one.decode(one.encode(text).ids) == text.replace("<bos>", "")
    words = one.encode("a small blue heart above three green trees").tokens
    assert all("▁" not in token[1:] for token in words)


def test_questions_follow_what_the_caption_says_and_the_places() -> None:
    rng = random.Random(0)
    groups = (cutouts.Group(kind="fish", colour="red"), cutouts.Group(kind="boat", colour="blue"))
    scene = cutouts.arrange(groups, "below", rng)
    for _ in range(20):
        said = caption(scene, rng, language="en", colours=True, relation=True, plain=True)
        assert scene_labels(scene, said)[:8] == [2, 5, 1, 0, 1, 1, 1, 0]  # the boat is above, so it comes first
        assert scene_labels(scene, said)[12] == 2
        unsaid = caption(scene, rng, language="en", colours=False, relation=False, plain=True)
        assert scene_labels(scene, unsaid)[:8] == [1, 0, 1, 0, 2, 0, 1, 0]


def test_the_shared_instruction_gives_what_reading_it_whole_gives() -> None:
    objective = LanguageModelObjective(LANGUAGE, run(), CPU)
    rng = random.Random(1)
    pairs = [(scene, caption(scene, rng)) for scene in (cutouts.sample_scene(rng) for _ in range(3))]
    texts = objective._texts(pairs, with_instruction=True)
    shared = objective._hidden(texts, with_instruction=True)
    for row in range(3):
        size = int(texts.mask[row].sum())
        whole = torch.cat([objective._prefix, texts.ids[row : row + 1, :size]], dim=1)
        hidden = objective.module.model(input_ids=whole, use_cache=False)[0][0, -size:]
        torch.testing.assert_close(shared[row, :size], hidden, rtol=1e-4, atol=1e-4)


def test_features_are_what_the_encoders_give_and_are_made_once(
    encoders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_features, "SHARD", 64)
    store = FeatureStore(tmp_path, *encoders, scenes=100, captions=2, seed=0)
    with pytest.raises(CheckpointError, match="4 feature shards are missing"):
        store.read()
    assert len(list(store.compute())) == 4
    assert not list(store.compute())
    found = store.read()
    assert found.latents.shape == (128, 8, 8, 8)
    autoencoder = AutoencoderDC.from_pretrained(encoders[0], torch_dtype=torch.float32)
    with torch.no_grad():
        latent = (
            autoencoder.encode(to_tensor(cutouts.render(scene_of(0, 70))[None]))[0] * autoencoder.config.scaling_factor
        )
    torch.testing.assert_close(found.latents[70:71].float(), latent, rtol=0.05, atol=0.05)
    text = caption(scene_of(0, 70), random.Random("0/caption/70/1")).text
    encoded = PromptEncoder(*load_text(encoders[1])).encode([text], COMPLEX_HUMAN_INSTRUCTION).embeds[0]
    start, length = int(found.starts[70, 1]), int(found.lengths[70, 1])
    torch.testing.assert_close(found.text[start : start + length].float(), encoded, rtol=2e-3, atol=2e-3)


def test_features_appear_whole_and_what_killed_processes_left_goes(
    encoders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_features, "SHARD", 32)
    store = FeatureStore(tmp_path, *encoders, scenes=64, captions=1, seed=0)
    list(store.compute("text"))
    for folder in (store.latents_folder, store.text_folder):  # also beside shards that are there by now
        folder.mkdir(exist_ok=True)
        for name in ("00000.partial-123", ".00000.safetensors.saving-123-abc"):
            (folder / name).write_bytes(b"half")
            os.utime(folder / name, (0, 0))
        (folder / "00001.partial-456").write_bytes(b"another process is at it")
    synced: list[Path] = []
    real = storage.sync
    monkeypatch.setattr(storage, "sync", lambda path: (synced.append(path), real(path)))
    assert len(list(store.compute())) == 2
    for folder in (store.latents_folder, store.text_folder):
        names = ["00000.safetensors", "00001.partial-456", "00001.safetensors"]
        assert sorted(file.name for file in folder.iterdir()) == names
    assert synced.count(store.latents_folder) == 2, "the name of each shard is on the disk"
    assert len(synced) == 4
    before = store.read()
    for file in tmp_path.rglob("*.safetensors"):  # as earlier versions wrote them, without a digest
        save_file(load_file(file), file)
    after = FeatureStore(tmp_path, *encoders, scenes=64, captions=1, seed=0)
    assert not list(after.compute())
    found = after.read()
    assert torch.equal(found.latents, before.latents)
    assert torch.equal(found.text, before.text)


def test_flow_matching_learns_and_its_export_is_a_pipeline_for_the_reference(
    encoders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    monkeypatch.setattr(drawn_features, "SHARD", 160)
    settings = FlowMatchingSettings(
        model=TRANSFORMER,
        autoencoder=str(encoders[0]),
        text=str(encoders[1]),
        features=str(tmp_path / "features"),
        scenes=320,
        captions=1,
        label_block=1,
        shift=2.0,
    )
    objective = FlowMatchingObjective(settings, run(batch_size=16), CPU)
    batches = objective.origin.batches
    assert isinstance(batches, DrawnBatches)
    x0 = batches.features.latents[: batches._training].float()
    first = float(objective.loss(0)[1]["velocity"])
    assert first == pytest.approx(1 + float(x0.square().mean()), rel=0.15)  # the zeroed output predicts nothing
    order = torch.cat([batches._scenes(draw) for draw in range(batches._training // 16)])
    assert sorted(order.tolist()) == list(range(320 - HELD_OUT))
    trainer = train(objective, run(steps=30, batch_size=16), tmp_path / "run", lr=1e-2)
    assert float(objective.loss(0)[1]["velocity"]) < 0.9 * first
    with torch.no_grad():
        assert set(objective.evaluate()) == {"matched", "gap"}
        assert objective.preview().size == (1024, 512)
    trainer.export(tmp_path / "export")
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "export" / "transformer")
    assert theirs.config.sample_size == 8
    parts = load_parts(tmp_path / "export", torch_dtype=torch.float32)
    assert parts["scheduler"].config.flow_shift == 2.0
    trained = trainer.average.values["transformer.proj_out.weight"]
    torch.testing.assert_close(parts["transformer"].proj_out.weight, trained, rtol=1e-3, atol=1e-3)
