"""Flow matching that starts from a model: every trainable, from a recipe's settings to what others load."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml  # type: ignore[import-untyped]
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from look_checks import Checks
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.convert import Conversion, convert
from sana.checkpoints.hub import locate
from sana.checkpoints.lora.files import read_lora
from sana.data import cutouts
from sana.engine import placement
from sana.engine.generate import generate_images
from sana.engine.model_card import CARD_KEY
from sana.engine.parts import load
from sana.engine.request import LoraRequest, Request
from sana.errors import CheckpointError, InvalidInput
from sana.flow.density import loss_weights
from sana.memory.offload import Shelf
from sana.training.config import OptimizerSettings, RunSettings
from sana.training.drawn_batches import DrawnBatches
from sana.training.drawn_features import scene_of
from sana.training.loop import Trainer
from sana.training.objectives.base import LookLeft
from sana.training.objectives.flow_matching import FlowMatchingObjective
from sana.training.objectives.flow_settings import FlowMatchingSettings
from sana.training.players import use_checkpointing
from sana.training.starting import StartModel
from sana.training.trainables import LoraTrainable, chosen_layers

CPU = torch.device("cpu")
PROMPT = "a red fish"


def run(**changes: Any) -> RunSettings:
    base = {"steps": 2, "batch_size": 2, "precision": "float32", "ema": 0.0, "evaluate_every": 1000}
    return RunSettings(**{**base, **changes})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.fromarray(cutouts.render(scene_of(3, number))).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"thing number {number}", encoding="utf-8")
    return folder


def objective(pictures: Path, settings: RunSettings | None = None, **changes: Any) -> FlowMatchingObjective:
    options: dict[str, Any] = {"start": "nano", "data": {"path": str(pictures)}, "prompts": (PROMPT,)}
    return FlowMatchingObjective(FlowMatchingSettings(**{**options, **changes}), settings or run(), CPU)


def train(one: FlowMatchingObjective, folder: Path, lr: float = 1e-2) -> Path:
    trainer = Trainer(one, one.run, OptimizerSettings(lr=lr, warmup=1), folder / "run")
    trainer._look = lambda stop: {}  # type: ignore[method-assign]
    for _ in trainer.steps():
        pass
    trainer.export(folder / "run" / "export")
    return folder / "run" / "export"


def test_an_adapter_acts_in_the_command_as_it_did_in_training_and_the_reference_loads_it(
    pictures: Path, tmp_path: Path
) -> None:
    import diffusers

    one = objective(
        pictures,
        train="lora",
        data={"path": str(pictures), "trigger": "sks"},
        lora={"rank": 2, "targets": ["to_q", "to_v", "conv_point"], "dialects": ["peft", "kohya"]},
    )
    export = train(one, tmp_path)
    batch = next(iter(one.origin.batches.held_out()))
    with torch.no_grad():
        wanted = one.trainable.velocity(batch.latents, batch, torch.full((len(batch.latents),), 500.0))
    assert {file.name for file in export.iterdir()} == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "kohya.safetensors",
    }
    parts = load("nano", device="cpu", dtype=torch.float32)
    plain = generate_images(parts, Request(prompt=PROMPT, seed=1, steps=2)).image
    adapter = LoraRequest(source=str(export / "pytorch_lora_weights.safetensors"))
    adapted = Request(prompt=PROMPT, seed=1, steps=2, loras=(adapter,))
    other = generate_images(parts, adapted).image
    assert np.abs(np.asarray(plain, int) - np.asarray(other, int)).max() > 3
    folder = locate("nano").folder
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    theirs.load_lora_adapter(load_file(export / "pytorch_lora_weights.safetensors"), prefix="transformer")
    with torch.no_grad():
        found = theirs(
            batch.latents,
            batch.embeds,
            torch.full((len(batch.latents),), 500.0),
            encoder_attention_mask=batch.mask,
        ).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "base_model: nano" in card
    assert "Apache-2.0" in card
    assert "instance_prompt: sks" in card


def test_every_dialect_of_an_export_is_the_same_adapter_and_tells_what_it_is(pictures: Path, tmp_path: Path) -> None:
    dialects = {"peft": "pytorch_lora_weights", "kohya": "kohya", "comfyui": "comfyui"}
    lora = {
        "rank": 2,
        "alpha": 3.0,
        "targets": ["to_q", "to_k", "to_v"],
        "trigger": "thing",
        "dialects": list(dialects),
    }
    one = objective(pictures, run(steps=1), train="lora", lora=lora)
    export = train(one, tmp_path)
    trainable = one.trainable
    assert isinstance(trainable, LoraTrainable)
    known = chosen_layers(trainable.transformer, ("to_q", "to_k", "to_v"))
    names: dict[str, set[str]] = {}
    for dialect, stem in dialects.items():
        file = export / f"{stem}.safetensors"
        found = read_lora(file, known)
        assert (found.dialect, found.unmatched) == (dialect, ())
        assert found.updates.keys() == trainable.updates.keys()
        for name, update in found.updates.items():
            assert update.scaling == 1.5
            wanted = trainable.updates[name].tensors
            assert all(torch.equal(tensor, wanted[kind]) for kind, tensor in update.tensors.items()), (dialect, name)
        with safe_open(file, "pt") as opened:
            names[dialect] = set(opened.keys())
            told = opened.metadata()
        data = file.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert {key: text for key, text in told.items() if key.startswith("modelspec.")} == {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "nano/lora",
            "modelspec.implementation": "https://github.com/NVlabs/Sana",
            "modelspec.title": "run",
            "modelspec.license": "Apache-2.0",
            "modelspec.trigger_phrase": "thing",
            "modelspec.hash_sha256": f"0x{digest}",
        }
        assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_base_model_version"]) == ("2", "3", "nano")
    blocks = range(len(trainable.transformer.transformer_blocks))
    fused = [f"diffusion_model.blocks.{i}.{part}" for i in blocks for part in ("attn.qkv", "cross_attn.q_linear")]
    fused += [f"diffusion_model.blocks.{i}.cross_attn.kv_linear" for i in blocks]
    kinds = ("lora_A.weight", "lora_B.weight", "alpha")
    assert names["comfyui"] == {f"{layer}.{kind}" for layer in fused for kind in kinds}
    flat = ["lora_unet_" + name.replace(".", "_") for name in known]
    kinds = ("lora_down.weight", "lora_up.weight", "alpha")
    assert names["kohya"] == {f"{layer}.{kind}" for layer in flat for kind in kinds}
    assert names["peft"] == {f"transformer.{name}.lora_{kind}.weight" for name in known for kind in "AB"}
    check_card(export, "lora")


def check_card(export: Path, kind: str) -> None:
    """The card tells what an export was made from, on what terms and how."""
    _, header, text = (export / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["base_model"] == "nano"
    assert told["pipeline_tag"] == "text-to-image"
    assert told["tags"] == ["sana", "sanakit", "text-to-image", *([kind] if kind else [])]
    assert "Licence of the base weights: Apache-2.0." in text
    assert "| batch size | 2 |" in text
    assert "```sh\nsana " in text


def test_a_control_network_is_exported_alone_and_steers_the_command(pictures: Path, tmp_path: Path) -> None:
    one = objective(pictures, train="controlnet", control={"kind": "canny", "blocks": 2, "dropout": 0.0})
    export = train(one, tmp_path)
    check_card(export, "controlnet")
    network = SanaControlNetModel.from_pretrained(export)
    assert len(network.transformer_blocks) == 2
    assert any(bool(block.weight.any()) for block in network.controlnet_blocks)  # type: ignore[union-attr]
    preview = one.preview()
    assert preview is not None
    assert preview.size == (256, 512)  # a picture above its control


def test_a_control_network_is_gone_on_with_as_it_is_joined(pictures: Path, tmp_path: Path) -> None:
    options = {"kind": "canny", "dropout": 0.0}
    begun = train(
        objective(pictures, train="controlnet", control={**options, "blocks": 2, "wiring": "native"}), tmp_path
    )
    assert "| joined | as in the original code" in (begun / "README.md").read_text()
    for told, wiring in (({}, "native"), ({"wiring": "diffusers"}, "diffusers")):
        one = objective(pictures, train="controlnet", control={**options, **told, "start": str(begun)})
        assert one.trainable.network.wiring == wiring


def test_all_weights_are_written_as_a_model_that_the_reference_loads(pictures: Path, tmp_path: Path) -> None:
    import diffusers

    one = objective(pictures, train="full")
    export = train(one, tmp_path)
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(export / "transformer", torch_dtype=torch.float32)
    ours = one.trainable.transformer.state_dict()
    assert all(torch.equal(ours[name].half().float(), tensor) for name, tensor in theirs.state_dict().items())
    drawn = generate_images(load(export, device="cpu"), Request(prompt=PROMPT, seed=1, steps=1)).image
    assert drawn.size == (256, 256)
    assert json.loads((export / "model_index.json").read_text())[CARD_KEY] == "nano"
    check_card(export, "")


def test_an_exported_model_can_be_trained_on(pictures: Path, tmp_path: Path) -> None:
    export = train(objective(pictures, train="full"), tmp_path)
    again = objective(pictures, start=str(export), train="lora")
    assert again.origin.shift == 2.5
    stored = load_file(export / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(again.trainable.transformer.proj_out.weight, stored["proj_out.weight"].float())
    assert bool(torch.isfinite(again.loss(0)[0]))


def test_a_folder_of_unknown_origin_trains_at_the_shift_of_its_scheduler(tiny_folder: Path) -> None:
    start = StartModel(str(tiny_folder), CPU)
    assert start.card is None
    assert start.flow_shift == 3.0


def test_features_kept_in_files_give_the_losses_of_features_made_on_the_way(pictures: Path, tmp_path: Path) -> None:
    data = {"path": str(pictures), "features": str(tmp_path / "features")}
    stored, fresh = objective(pictures, data=data), objective(pictures)
    for number in range(4):
        assert torch.equal(stored.loss(number)[0], fresh.loss(number)[0])
    again = objective(pictures, data=data)
    assert "_autoencoder" not in again.origin.start.__dict__  # type: ignore[attr-defined]  # nothing had to be encoded
    assert torch.equal(again.loss(2)[0], fresh.loss(2)[0])
    for file in (tmp_path / "features").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        objective(pictures, data=data).loss(0)


def weights_of(start: StartModel) -> dict[str, list[torch.Tensor]]:
    return {
        "autoencoder": list(start._autoencoder.parameters()),
        "text encoder": list(start._prompts.text_encoder.parameters()),
    }


def test_encoders_that_come_and_go_change_no_bit(pictures: Path) -> None:
    plain, spared = objective(pictures), objective(pictures, run(offload=True))
    start: StartModel = spared.origin.start  # type: ignore[attr-defined]
    there: list[tuple[str, ...]] = []

    def watched(encode: Any) -> Any:
        def encoded(what: Any) -> Any:
            made = encode(what)
            known = weights_of(start) if "_autoencoder" in start.__dict__ else {}
            there.append(tuple(name for name, weights in known.items() if not any(p.is_meta for p in weights)))
            return made

        return encoded

    encoders: Any = spared.origin.encoders  # type: ignore[attr-defined]
    encoders.picture, encoders.text = watched(encoders.picture), watched(encoders.text)
    for draw in range(3):
        assert torch.equal(spared.loss(draw)[0], plain.loss(draw)[0])
        assert all(p.is_meta for weights in weights_of(start).values() for p in weights)
    assert {("autoencoder",), ("text encoder",)} == set(there)
    shown, wanted = spared.origin.preview_batch(), plain.origin.preview_batch()
    assert shown is not None
    assert wanted is not None
    assert torch.equal(shown.embeds, wanted.embeds)
    assert torch.equal(spared.origin.decode(shown.latents[:1]), plain.origin.decode(wanted.latents[:1]))
    assert all(p.is_meta for weights in weights_of(start).values() for p in weights)


def test_away_from_an_accelerator_encoders_lie_in_main_memory_and_one_is_there_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Shelf, "_follow", lambda _: None)  # constants outside of the files cannot go to meta and back
    start = StartModel("nano", torch.device("meta"), offload=True)  # stands for an accelerator: values there are lost
    assert all(p.is_meta for p in start.autoencoder.parameters())
    assert all(p.is_meta for p in start.prompts.text_encoder.parameters())
    rested = weights_of(start)["autoencoder"]
    for mine, known in zip(rested, StartModel("nano", CPU).autoencoder.parameters(), strict=True):
        assert torch.equal(mine, known)
    start.rest()
    assert not any(p.is_meta for weights in weights_of(start).values() for p in weights)


def test_encoders_that_cannot_go_are_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "origin_of", lambda module: None)  # as of files that are no safetensors
    with pytest.raises(InvalidInput, match=r"run\.offload has no effect on nano: on a CPU, weights are let go of"):
        objective(pictures, run(offload=True)).loss(0)


@pytest.mark.parametrize(
    "changes",
    [{"train": "full"}, {"train": "lora"}, {"train": "controlnet", "control": {"kind": "ink", "blocks": 2}}],
    ids=lambda changes: changes["train"],
)
def test_checkpointing_reaches_what_gradients_pass_through_and_changes_no_number(
    pictures: Path, changes: dict[str, Any]
) -> None:
    def gradients(checkpointing: bool) -> tuple[float, list[torch.Tensor]]:
        one = objective(pictures, **changes)
        if checkpointing:
            use_checkpointing(one)
            assert one.trainable.transformer.gradient_checkpointing
        loss = one.loss(0)[0]
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), [p.grad for _, p in one.parameters_of("main") if p.grad is not None]

    (loss, plain), (again, checkpointed) = gradients(False), gradients(True)
    assert again == pytest.approx(loss, rel=1e-6)
    assert len(plain) == len(checkpointed) > 0
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * (float(one.abs().max()) or 1.0))


def test_figures_look_at_fixed_levels(pictures: Path) -> None:
    one = objective(pictures)
    one.module.eval()
    first = one.evaluate()
    assert set(first) == {"matched", "gap"}
    checks = Checks(leave_at=99)
    assert first == one.evaluate(checks)
    assert checks.calls == len(list(one.origin.batches.held_out()))
    assert one.better == "lower"


@pytest.mark.parametrize("at", [1, 7, 21])
def test_a_preview_is_left_between_two_steps_and_before_it_is_decoded(pictures: Path, at: int) -> None:
    one, checks = objective(pictures), Checks(leave_at=at)
    one.module.eval()
    with pytest.raises(LookLeft):
        one.preview(checks)
    assert checks.calls == at


def test_a_fresh_transformer_keeps_the_encoders_and_predicts_nothing_at_first(pictures: Path) -> None:
    one = objective(pictures, fresh=True)
    for number in range(2):
        latents = one.origin.batches.batch(number, torch.Generator().manual_seed(0)).latents
        expected = 1 + float(latents.square().mean())
        assert float(one.loss(number)[0].detach()) == pytest.approx(expected, rel=0.05)


def test_a_prior_is_drawn_once_and_learnt_beside(pictures: Path, tmp_path: Path) -> None:
    prior = {"prompt": "a blue star", "folder": str(tmp_path / "class"), "count": 3, "steps": 1, "guidance": 1.0}
    options: dict[str, Any] = {"data": {"path": str(pictures), "square": True}, "prior": prior, "train": "lora"}
    one = objective(pictures, **options)
    names = sorted(file.name for file in (tmp_path / "class").iterdir())
    assert names == ["class-0000.png", "class-0001.png", "class-0002.png", "class.json"]
    times = [file.stat().st_mtime_ns for file in sorted((tmp_path / "class").iterdir())]
    batch = one.origin.batches.batch(0, torch.Generator())
    assert len(batch.latents) == 4
    assert batch.weights is not None
    objective(pictures, **options)
    assert times == [file.stat().st_mtime_ns for file in sorted((tmp_path / "class").iterdir())]


def test_what_is_learnt_is_called_by_the_trigger_of_the_data_in_every_export(pictures: Path, tmp_path: Path) -> None:
    data = {"path": str(pictures), "trigger": "sks"}
    for kind in ("lora", "full"):
        export = train(objective(pictures, run(steps=1), train=kind, data=data), tmp_path / kind)
        text = (export / "README.md").read_text(encoding="utf-8")
        assert "instance_prompt: sks\n" in text, kind
        assert "Call it with: `sks`" in text, kind
        assert 'sana "a prompt with sks" -m ' in text, kind


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "trigger is 'sks', but no caption of .* says it, so nothing would learn it. Set flow_matching.data.trigger",
        ),
        ({"data": {}, "features": "f"}, "flow_matching.lora.trigger has no effect on the drawn world"),
    ],
)
def test_a_trigger_that_nothing_would_learn_is_refused(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(DrawnBatches, "__init__", lambda self, *_, **__: None)
    with pytest.raises(InvalidInput, match=sentence):
        objective(pictures, train="lora", lora={"trigger": "sks"}, **changes)


def test_a_fresh_transformer_may_be_another_one_and_carries_no_card_of_the_start(
    pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"num_layers = 2\) does not fit the weights of nano.* or set fresh = true"):
        objective(pictures, model={"num_layers": 2})
    export = train(objective(pictures, run(steps=1), model={"num_layers": 2}, fresh=True), tmp_path)
    assert CARD_KEY not in json.loads((export / "model_index.json").read_text())
    assert len(load(export, device="cpu").transformer.transformer_blocks) == 2


def test_a_card_of_another_model_is_refused_at_the_start(pictures: Path) -> None:
    sentence = (
        r"flow_matching\.card is that of sana-1\.6b-4k, whose \w+ is \d+, but what is trained has \d+\. Make them"
    )
    with pytest.raises(InvalidInput, match=sentence):
        objective(pictures, card="sana-1.6b-4k")
    assert objective(pictures, card="nano").settings.card == "nano"


def test_a_branch_as_deep_as_its_transformer_names_its_setting(pictures: Path) -> None:
    sentence = r"flow_matching\.control\.blocks is 7, but the transformer has only 6 blocks; copy fewer"
    with pytest.raises(InvalidInput, match=sentence):
        objective(pictures, train="controlnet")


def test_a_control_network_learns_beside_a_prior(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    shutil.copy(pictures / "0.png", tmp_path / "class" / "class-0000.png")
    prior = {"prompt": "a blue star", "folder": str(tmp_path / "class"), "count": 1}
    data, control = {"path": str(pictures), "square": True}, {"kind": "canny", "blocks": 1}
    one = objective(pictures, data=data, prior=prior, train="controlnet", control=control)
    total = one.loss(0)[0]
    total.backward()
    assert bool(torch.isfinite(total))
    assert any(p.grad is not None and bool(p.grad.any()) for p in one.module.parameters())


def test_a_model_with_a_time_of_its_own_scale_is_told_it_untruncated(pictures: Path) -> None:
    dense = objective(pictures, model={"timestep_scale": 0.001})
    levels = dense._levels(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(levels.timesteps, 1000 * levels.sigmas)
    assert bool((levels.timesteps != levels.timesteps.round()).any())
    table = objective(pictures)._levels(64, torch.Generator().manual_seed(0))
    assert table.timesteps.dtype == torch.int64


def test_what_a_configuration_may_change(pictures: Path) -> None:
    data = {"path": str(pictures), "small": "upscale"}
    larger = objective(pictures, data=data, model={"sample_size": 16}).trainable.transformer
    assert larger.config.sample_size == 16
    with pytest.raises(InvalidInput, match=r"flow_matching.model \(num_layers = 7\) does not fit the weights of nano"):
        objective(pictures, model={"num_layers": 7})


def test_missing_norms_start_at_one(pictures: Path, tmp_path: Path) -> None:
    export = train(objective(pictures, train="full"), tmp_path)
    config = json.loads((export / "transformer" / "config.json").read_text())
    (export / "transformer" / "config.json").write_text(json.dumps({**config, "qk_norm": None}))
    file = next((export / "transformer").glob("*.safetensors"))
    from safetensors.torch import save_file

    save_file({name: t for name, t in load_file(file).items() if "norm_q" not in name and "norm_k" not in name}, file)
    grown = StartModel(str(export), CPU).transformer(torch.float32, {"qk_norm": "rms_norm_across_heads"})
    added = [t for name, t in grown.state_dict().items() if name.endswith(("norm_q.weight", "norm_k.weight"))]
    assert len(added) == 4 * len(grown.transformer_blocks)
    assert all(bool((tensor == 1).all()) for tensor in added)


def test_weights_of_the_levels() -> None:
    sigmas = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    assert loss_weights("none", sigmas).tolist() == [1, 1, 1]
    torch.testing.assert_close(loss_weights("sigma-sqrt", sigmas), sigmas**-2)
    torch.testing.assert_close(
        loss_weights("cosmap", sigmas), 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2)), rtol=1e-12, atol=0
    )
    ratio = ((1 - sigmas) / sigmas) ** 2
    torch.testing.assert_close(loss_weights("min-snr", sigmas), sigmas**2 * ratio.clamp(max=5.0))
    with pytest.raises(InvalidInput, match="There is no weighting 'snr'"):
        loss_weights("snr", sigmas)


@pytest.mark.parametrize(
    ("start", "sentence"),
    [("no-such-model", "no-such-model"), ("sana-1.6b-512x", "sana-1.6b-512")],
)
def test_a_model_that_is_not_there(pictures: Path, start: str, sentence: str) -> None:
    from sana.errors import ModelNotFound

    with pytest.raises(ModelNotFound, match=sentence):
        objective(pictures, start=start)


def test_a_single_file_of_the_original_layout_is_trained_on_with_the_encoders_of_its_folder(
    pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(locate("nano").folder, folder)
    convert(Conversion(source="nano", target=folder / "original.safetensors"))
    data = {"path": str(pictures), "features": str(tmp_path / "features")}
    one = objective(pictures, start=str(folder / "original.safetensors"), data=data)
    plain = objective(pictures)
    assert float(one.loss(0)[0].detach()) == pytest.approx(float(plain.loss(0)[0].detach()), rel=1e-3)
    export = train(one, tmp_path)
    assert load(export, device="cpu").transformer is not None
