"""The phases of training an autoencoder: what each changes, what it leaves alone, and what it refuses."""

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from test_objectives import AUTOENCODER, CPU, run

from look_checks import Checks
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.errors import BadData, InvalidInput
from sana.models.dc_ae import DCAutoencoder
from sana.models.dc_ae_blocks import DownBlock, UpBlock
from sana.training.autoencoder_pictures import DatasetPictures, DrawnPictures, cell_labels
from sana.training.config import OptimizerSettings
from sana.training.loop import Trainer
from sana.training.objectives.autoencoder import TRAINED, AutoencoderObjective, AutoencoderSettings
from sana.training.objectives.base import LookLeft
from sana.training.reconstruction import psnr, squared_error

NANO = Path(__file__).parents[2] / "src" / "sana" / "assets" / "nano" / "vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def train(settings: AutoencoderSettings, folder: Path, steps: int = 4, lr: float = 1e-3, **changes: Any) -> Trainer:
    made = run(steps=steps, **changes)
    trainer = Trainer(AutoencoderObjective(settings, made, CPU), made, OptimizerSettings(lr=lr, warmup=0), folder)
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    for _ in trainer.steps():
        pass
    return trainer


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of random weights."""
    folder = tmp_path_factory.mktemp("start") / "vae"
    torch.manual_seed(0)
    AutoencoderDC.from_config(AUTOENCODER, scaling_factor=0.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of several shapes, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(11):
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((200 + 10 * i, 160), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a picture")
    return folder


@pytest.mark.parametrize("phase", ["latent", "refine", "decoder"])
def test_each_phase_changes_its_own_layers_and_no_others(started: Path, tmp_path: Path, phase: str) -> None:
    settings = AutoencoderSettings(start=str(started), phase=phase, size=64)
    trainer = train(settings, tmp_path / "run")
    with torch.no_grad():
        trainer.objective.export(tmp_path / "export")
    before, after = load_file(started / WEIGHTS), trainer.objective.module.autoencoder.state_dict()  # type: ignore[union-attr]
    changed = {f"autoencoder.{name}" for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(TRAINED[phase]) for name in changed)
    expected = {name for name, _ in trainer.objective.parameters_of(trainer.objective.turns[0])}
    assert changed == expected


def test_refinement_leaves_latents_and_their_scale_and_latent_adaptation_changes_them(
    started: Path, tmp_path: Path
) -> None:
    drawn = DrawnPictures(0, 64).held_out(0, 4)
    with torch.no_grad():
        before = AutoencoderDC.from_pretrained(started).encode(drawn)[0]
    for phase in ("refine", "latent"):
        settings = AutoencoderSettings(start=str(started), phase=phase, size=64)
        objective = train(settings, tmp_path / phase, steps=2).objective
        with torch.no_grad():
            same = torch.equal(objective.module.autoencoder.encode(drawn)[0], before)  # type: ignore[union-attr, operator]
            assert same is (phase == "refine")
            objective.export(tmp_path / phase / "export")
            scale = AutoencoderDC.load_config(tmp_path / phase / "export")["scaling_factor"]
            assert (scale == 0.5) is (phase == "refine")


def test_the_players_of_the_refinement_alternate_and_both_learn(started: Path, tmp_path: Path) -> None:
    settings = AutoencoderSettings(start=str(started), phase="refine", size=64, latent_noise=0.0)
    made = run(steps=2)
    objective = AutoencoderObjective(settings, made, CPU)
    assert objective.turns == ("generator", "discriminator")
    trainer = Trainer(objective, made, OptimizerSettings(lr=1e-3, warmup=0), tmp_path)
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    states = [copy.deepcopy(objective.module.state_dict())]
    parts = []
    for report in trainer.steps():
        states.append(copy.deepcopy(objective.module.state_dict()))
        parts.append(set(report.parts))

    def moved(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
        return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}

    assert moved(states[0], states[1]) == {"autoencoder"}
    assert moved(states[1], states[2]) == {"discriminator"}
    assert {"adversarial", "factor", "reconstruction"} <= parts[0]
    assert parts[1] == {"real", "restored", "gradient_norm"}
    assert not any("discriminator" in name for name in trainer.average.values)


def test_a_discriminator_learns_to_tell_restored_pictures_from_real_ones(started: Path) -> None:
    torch.manual_seed(0)
    objective = AutoencoderObjective(AutoencoderSettings(start=str(started), phase="refine", size=64), run(), CPU)
    optimizer = torch.optim.Adam([p for _, p in objective.parameters_of("discriminator")], lr=2e-4)
    losses = []
    for draw in range(15):
        loss, parts = objective.loss(draw, "discriminator")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert float(parts["real"]) > 0.3 > -0.3 > float(parts["restored"])


def test_a_batch_norm_that_does_not_learn_keeps_its_statistics(tmp_path: Path) -> None:
    config = {**AUTOENCODER, "decoder_norm_types": "batch_norm"}
    AutoencoderDC.from_config(config).save_pretrained(tmp_path / "vae")
    for phase, same in (("refine", True), ("decoder", False)):
        settings = AutoencoderSettings(start=str(tmp_path / "vae"), phase=phase, size=64)
        after = train(settings, tmp_path / phase, steps=2).objective.module.state_dict()
        before = load_file(tmp_path / "vae" / WEIGHTS)
        means = [name for name in before if name.endswith("running_mean")]
        assert means
        assert all(torch.equal(before[n], after[f"autoencoder.{n}"]) for n in means) is same


def test_channels_are_dropped_from_the_end_by_one_draw_a_step() -> None:
    settings = AutoencoderSettings(model=AUTOENCODER, channels=(2, 4, 8), size=64, latent_noise=0.0)
    objective = AutoencoderObjective(settings, run(), CPU)
    seen = [int(objective._kept(random.Random(draw)).sum()) for draw in range(60)]  # type: ignore[union-attr]
    assert set(seen) == {2, 4, 8}
    with torch.no_grad():
        figures = objective.evaluate(checks := Checks(leave_at=99))
    assert checks.calls == 64 // run().batch_size
    with torch.no_grad(), pytest.raises(LookLeft):
        objective.evaluate(Checks(leave_at=2))
    with torch.no_grad(), pytest.raises(LookLeft):
        objective.preview(Checks(leave_at=1))
    assert [name for name in figures if name.startswith("psnr_")] == ["psnr_shaken", "psnr_2", "psnr_4", "psnr_8"]
    assert figures["psnr_8"] == figures["psnr"] != figures["psnr_2"]
    whole = objective.pictures.held_out(0, 64)
    with torch.no_grad():
        restored = objective.module.autoencoder(whole, return_dict=False)[0]
    assert figures["psnr"] == pytest.approx(psnr(squared_error(restored, whole)), abs=1e-3)
    assert float(objective.loss(3)[0].detach()) == float(objective.loss(3)[0].detach())


def test_zeroed_channels_are_the_same_as_slices_of_the_two_layers_around() -> None:
    torch.manual_seed(0)
    model = DCAutoencoder(AutoencoderDC.from_config(AUTOENCODER).config).eval()
    pictures, count = DrawnPictures(0, 64).held_out(0, 2), 3
    encoder, decoder = model.encoder, model.decoder
    whole: dict[str, torch.Tensor] = {}
    encoder.conv_out.register_forward_hook(lambda _, given, out: whole.update(before=given[0], after=out))
    decoder.conv_in.register_forward_hook(lambda _, given, out: whole.update(decoded=out))
    with torch.no_grad():
        latents = model.encode(pictures)[0]
        kept = (torch.arange(8) < count).float().view(1, -1, 1, 1)
        model.decode(latents * kept)
        first = F.conv2d(whole["before"], encoder.conv_out.weight[:count], encoder.conv_out.bias[:count], padding=1)  # type: ignore[index]
        decoded = F.conv2d(first, decoder.conv_in.weight[:, :count], decoder.conv_in.bias, padding=1)
    assert float((whole["after"][:, :count] - first).abs().max()) < 1e-6
    assert float((whole["decoded"] - decoded).abs().max()) < 1e-6


@torch.no_grad()
def test_shortcuts_pass_on_what_they_can_hold() -> None:
    def silent(block: Any) -> Any:
        for weight in block.conv.parameters():
            weight.zero_()
        return block

    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    wide_down, wide_up = silent(DownBlock(8, 32, unshuffle=True)), silent(UpBlock(32, 8, interpolate=False))
    assert torch.equal(wide_up(wide_down(x)), x)
    down, up = silent(DownBlock(8, 16, unshuffle=True)), silent(UpBlock(16, 8, interpolate=False))
    once = up(down(x))
    assert not torch.allclose(once, x)
    rows = x.view(2, 8, 3, 2, 3, 2).mean(5, keepdim=True).expand(-1, -1, -1, -1, -1, 2).reshape(x.shape)
    torch.testing.assert_close(once, rows)  # the average of two sub-pixels next to each other
    torch.testing.assert_close(up(down(once)), once)
    constant = torch.full((1, 8, 6, 6), 0.7)
    torch.testing.assert_close(up(down(constant)), constant)
    y = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(up(down(2 * x - 3 * y)), 2 * once - 3 * up(down(y)))
    numbers = torch.arange(16.0).view(1, 1, 4, 4)
    assert F.pixel_unshuffle(numbers, 2)[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert silent(DownBlock(1, 2, unshuffle=False))(numbers)[0, :, 0, 0].tolist() == [0.5, 4.5]


def test_the_size_of_the_latents_hardly_changes_with_that_of_the_pictures_after_the_second_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.training.autoencoder_pictures.HELD_OUT_PICTURES", 4)
    settings = AutoencoderSettings(start=str(NANO), phase="latent", size=256, latent_noise=0.0)
    trainer = train(settings, tmp_path, steps=2, lr=1e-4)
    objective = trainer.objective
    with torch.no_grad():
        figures = objective.evaluate()
    assert abs(figures["rms_twice"] - 1) < 0.1
    assert figures["psnr"] > 30


def test_pictures_of_the_disk_are_cropped_by_draw_and_some_are_held_out(pictures: Path) -> None:
    source = DatasetPictures(pictures, seed=0, size=128, batch_size=4)
    assert source.content.samples == len(source.source)
    assert source.content == DatasetPictures(pictures, seed=1, size=64, batch_size=2).content
    one, again = (source.batch(random.Random(5), 5, 4) for _ in range(2))
    assert torch.equal(one.pixels, again.pixels)
    assert one.pixels.shape == (4, 3, 128, 128)
    assert one.labels is None
    assert -1 <= float(one.pixels.min()) < float(one.pixels.max()) <= 1
    assert not torch.equal(one.pixels, source.batch(random.Random(6), 5, 4).pixels)  # another crop
    assert not torch.equal(one.pixels, source.batch(random.Random(5), 6, 4).pixels)  # other pictures
    assert source.held_out(0, 64).shape == (1, 3, 128, 128)
    assert set(source._held).isdisjoint(source._trained)
    assert len(source._held) + len(source._trained) == 11
    assert source.batch(random.Random(0), 0, 32).pixels.shape[0] == 32  # more than there are


def test_bare_pictures_are_read_as_those_with_captions_are(pictures: Path, tmp_path: Path) -> None:
    for file in pictures.glob("*.png"):
        shutil.copy(file, tmp_path)
    bare, told = (DatasetPictures(folder, seed=0, size=128, batch_size=4) for folder in (tmp_path, pictures))
    assert bare.content == told.content
    assert torch.equal(bare.held_out(0, 64), told.held_out(0, 64))
    assert torch.equal(bare.batch(random.Random(5), 5, 4).pixels, told.batch(random.Random(5), 5, 4).pixels)


def test_broken_pictures_are_left_out_of_crops_and_looks_until_they_are_too_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(200):
        Image.new("RGB", (64, 64), (number, number, number)).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")

    def shades(source: DatasetPictures) -> tuple[list[int], list[int]]:
        seen = torch.cat([source.batch(random.Random(draw), draw, 9).pixels for draw in range(20)])
        trained, held = (256 * (pixels.mean((1, 2, 3)) + 1) / 2 for pixels in (seen, source.held_out(0, 64)))
        return trained.int().tolist(), held.int().tolist()

    trained, held = shades(DatasetPictures(tmp_path, seed=0, size=64, batch_size=9))
    assert caplog.text.count("left out: gone.png") == 1
    assert sorted((*trained, *held)) == list(range(200))
    (tmp_path / "gone.png").unlink()

    def cut_off(number: int) -> None:
        whole = (tmp_path / f"{number:03d}.png").read_bytes()
        (tmp_path / f"{number:03d}.png").write_bytes(whole[:-30])

    cut_off(trained[30])
    source = DatasetPictures(tmp_path, seed=0, size=64, batch_size=9)
    after, same = shades(source)
    assert [(i, one) for i, one in enumerate(trained) if one != after[i]] == [(30, trained[30])]
    assert same == held
    assert caplog.text.count(f"left out: {trained[30]:03d}.png") == 1
    cut_off(held[0])
    source = DatasetPictures(tmp_path, seed=0, size=64, batch_size=9)
    assert source.held == len(source.held_out(0, 64)) == len(held)
    assert held[0] not in shades(source)[1]
    (tmp_path / f"{trained[60]:03d}.png").write_bytes(b"no picture")
    with pytest.raises(BadData, match=r"3 of 200 samples in .* are broken \(1\.5%\)"):
        shades(DatasetPictures(tmp_path, seed=0, size=64, batch_size=9))


def test_an_autoencoder_learns_from_pictures_of_the_disk(pictures: Path, tmp_path: Path) -> None:
    settings = AutoencoderSettings(model=AUTOENCODER, data=str(pictures), size=64, edge_weight=1.0)
    trainer = train(settings, tmp_path / "run", steps=15, lr=5e-3, batch_size=4)
    first, last = (float(trainer.objective.loss(0)[1]["reconstruction"]) for _ in (0, 1))
    assert first == last
    fresh = AutoencoderObjective(settings, run(batch_size=4), CPU)
    assert last < 0.8 * float(fresh.loss(0)[1]["reconstruction"])
    assert "labels" not in fresh.loss(0)[1]
    assert "edges" in fresh.loss(0)[1]
    with torch.no_grad():
        assert trainer.objective.preview().size == (64, 128)  # type: ignore[union-attr]
        trainer.objective.export(tmp_path / "export")
    assert AutoencoderDC.load_config(tmp_path / "export")["scaling_factor"] != 1.0


def test_scenes_of_another_size_are_the_same_scenes_and_keep_their_labels() -> None:
    small, large = DrawnPictures(0), DrawnPictures(0, 512)
    one, other = (source.batch(random.Random(1), 0, 2) for source in (small, large))
    assert other.pixels.shape == (2, 3, 512, 512)
    torch.testing.assert_close(F.avg_pool2d(other.pixels, 2), one.pixels, rtol=0, atol=0.2)
    assert one.labels is not None
    assert other.labels is not None
    assert torch.equal(other.labels[:, :, ::2, ::2] > 0, other.labels[:, :, ::2, ::2].clamp(0, 1) > 0)
    assert other.labels.shape == (2, 2, 16, 16)
    shares = [float((labels[:, 0] > 0).float().mean()) for labels in (one.labels, other.labels)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
    assert cell_labels.__defaults__ == (8,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"phase": "refin"}, "Did you mean 'refine'"),
        ({"phase": "latent"}, "goes on from a trained autoencoder: set autoencoder.start"),
        ({"start": "x", "model": AUTOENCODER}, "autoencoder.model has no effect with autoencoder.start"),
        ({"gan_weight": 1.0}, "gan_weight has no effect in the phase full"),
        ({"start": "x", "phase": "refine", "latent_penalty": 1.0}, "latent_penalty has no effect in the phase refine"),
        ({"start": "x", "phase": "refine", "channels": (4,)}, "channels has no effect in the phase refine"),
        ({"data": "x", "label_weight": 1.0}, "label_weight is about the drawn world"),
        ({"data": "x", "thing_weight": 1.0}, "thing_weight is about the drawn world"),
        ({"edge_weight": -1.0}, "edge_weight must not be negative"),
        ({"size": 100}, "size must be a multiple of 32"),
        ({"model": AUTOENCODER, "channels": (4, 9)}, "numbers from 1 to 8, and 8 among them"),
        ({"model": AUTOENCODER, "channels": (2, 4)}, "numbers from 1 to 8, and 8 among them"),
        (
            {"model": {**AUTOENCODER, "encoder_out_shortcut": True}, "channels": (4, 8)},
            "whose latents are not mixed: set encoder_out_shortcut",
        ),
    ],
)
def test_contradictory_settings_are_one_clear_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        AutoencoderObjective(AutoencoderSettings(**settings), run(), CPU)


def test_what_cannot_train_together_is_said(started: Path, pictures: Path, tmp_path: Path) -> None:
    refine = AutoencoderSettings(start=str(started), phase="refine")
    with pytest.raises(InvalidInput, match="compile cannot take the two gradients"):
        AutoencoderObjective(refine, run(compile=True), CPU)
    with pytest.raises(InvalidInput, match="smaller than a crop of 192 pixels, as are 11 of 11 pictures"):
        DatasetPictures(pictures, seed=0, size=192, batch_size=4)
    Image.new("RGB", (300, 300)).save(tmp_path / "only.png")
    (tmp_path / "only.txt").write_text("a picture")
    with pytest.raises(InvalidInput, match="has 1 picture, too few"):
        DatasetPictures(tmp_path, seed=0, size=64, batch_size=1)
