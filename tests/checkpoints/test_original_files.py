"""Original files become our models, exactly, with their architecture told by the tensors alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import (
    FAMILIES,
    TOLD,
    controlled_state,
    original_state,
    save_pth,
    small_autoencoder,
    tiny_branch,
    tiny_original,
)
from safetensors.torch import save_file
from tiny_pipeline import same, transformer
from torch import nn

from sana.cards import CARDS, Card
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.controlnet import SanaControlNetModel
from sana.checkpoints.original.architecture import (
    infer_autoencoder,
    infer_controlnet,
    infer_transformer,
    keys_of_autoencoder,
)
from sana.checkpoints.original.examine import examine, original_tensors
from sana.checkpoints.original.keymap import controlnet_keys, transformer_keys
from sana.checkpoints.original.loading import load_single_file
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.references import card_of_file
from sana.checkpoints.weights import Stored, on_meta
from sana.config import AutoencoderConfig
from sana.errors import CheckpointError, InvalidInput, ModelNotFound
from sana.models.controlnet import LinearControlNet
from sana.models.dc_ae import DCAutoencoder
from sana.models.linear_dit import LinearDiT

PUBLISHED = [card for card in CARDS.values() if card.original]


def listing(state: dict[str, torch.Tensor]) -> dict[str, Stored]:
    return {name: Stored(file="x", shape=tuple(t.shape), dtype=t.dtype) for name, t in state.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["pth", "safetensors", "old pth"])
def test_every_family_loads_bit_by_bit(tmp_path: Path, family: str, form: str) -> None:
    model = transformer(**FAMILIES[family])
    state = original_state(model)
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=form == "pth")
    loaded = load_single_file(path, **TOLD)
    assert loaded.transformer is not None
    assert loaded.transformer.config == model.config
    assert same(loaded.transformer, model)
    assert not loaded.transformer.training
    assert loaded.parts == {"transformer": loaded.transformer}


@pytest.mark.parametrize("card", PUBLISHED, ids=lambda card: card.name)
def test_published_sizes_are_recognised_from_names_and_shapes(card: Card) -> None:
    with on_meta():
        model = LinearDiT(card.transformer)
    state = dict(original_tensors(model.state_dict(), transformer_keys(model.config.guidance_embeds), model.config))
    name = str(card.original)
    if card.controlnet is not None:
        with on_meta():
            branch = LinearControlNet(card.controlnet)
        control = dict(original_tensors(branch.state_dict(), controlnet_keys(), branch.config))
        state |= {key: tensor for key, tensor in control.items() if key.startswith("controlnet.")}
        assert sum(p.numel() for p in branch.parameters()) == card.control_params
    found = infer_transformer(listing(state), name, {}, name)
    assert found.config == card.transformer
    pieces, dropped, unknown = found.keys.pieces(state)
    assert set(dropped) == {"pos_embed", "y_embedder.y_embedding"}
    assert all(key.startswith("controlnet.") for key in unknown)
    assert {key: piece.shape_of(state[piece.original].shape) for key, piece in pieces.items()} == {
        key: tuple(tensor.shape) for key, tensor in model.state_dict().items()
    }
    if card.controlnet is not None:
        assert infer_controlnet(listing(state), found.config, name).config == card.controlnet
    assert card_of_file(name) is card
    assert card_of_file(name.rpartition("/")[2]) is card


def test_what_a_published_file_holds_is_what_its_size_says() -> None:
    """Bytes of two published files, which are known: all in float32, with the table of positions and the caption."""
    sizes = {"sana-0.6b-512": 2_371_119_642, "sana-sprint-teacher-0.6b-1024": 2_375_214_166}
    for name, size in sizes.items():
        with on_meta():
            model = LinearDiT(CARDS[name].transformer)
        state = original_tensors(model.state_dict(), transformer_keys(False), model.config)
        numbers = sum(tensor.numel() for _, tensor in state)
        assert 0 < size - 4 * numbers < 1_000_000  # names, shapes and the archive around them


@pytest.mark.parametrize("kind", ["f32-sana", "f32-in", "f64-mix", "f128-in"])
def test_autoencoders_load_bit_by_bit(tmp_path: Path, kind: str) -> None:
    model = small_autoencoder(kind)
    path = tmp_path / f"dc-ae-{kind.replace('-', 'c32-')}-1.0.pth"
    torch.save({"model": original_state(model)}, path)
    told = {} if kind == "f32-sana" else {"attention_head_dim": 4}
    loaded = load_single_file(path, **told).vae
    assert loaded is not None
    assert same(loaded, model)
    assert loaded.config == model.config


def test_the_full_autoencoder_has_its_published_names() -> None:
    config = CARDS["sana-1.6b-1024"].autoencoder
    with on_meta():
        model = DCAutoencoder(config)
    state = dict(original_tensors(model.state_dict(), keys_of_autoencoder(config), config))
    # The names by which the reference recognises such a file.
    assert state["encoder.project_in.conv.bias"].shape == (128,)
    assert state["decoder.stages.1.op_list.0.main.conv.conv.bias"].shape == (256,)
    found = infer_autoencoder(listing(state), "dc-ae-f32c32-sana-1.0/model.safetensors", {}, "it")
    assert found.assumed == ()
    assert found.config == config
    with on_meta():
        again = DCAutoencoder(found.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_one_file_holds_transformer_and_control_branch(tmp_path: Path) -> None:
    base = transformer()
    branch = tiny_branch(base)
    path = save_pth(tmp_path / "Some_ControlNet.pth", controlled_state(base, branch))
    loaded = load_single_file(path, **TOLD)
    assert loaded.transformer is not None
    assert loaded.controlnet is not None
    assert same(loaded.transformer, base)
    assert same(loaded.controlnet, branch)
    assert loaded.controlnet.wiring == "native"
    alone = SanaControlNetModel.from_single_file(path, **TOLD)
    assert same(alone, branch)
    assert alone.wiring == "native"


def test_averaged_weights_are_a_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, average = transformer(), transformer(sample_size=16)
    with torch.no_grad():
        for weight in average.parameters():
            weight.mul_(0.5)
    path = save_pth(tmp_path / "t.pth", original_state(plain), state_dict_ema=original_state(average))
    with caplog.at_level(logging.INFO, "sana"):
        assert same(SanaTransformer2DModel.from_single_file(path, **TOLD), plain)
    assert "averaged weights too" in caplog.text
    assert same(SanaTransformer2DModel.from_single_file(path, ema=True, **TOLD), average)
    single, _ = tiny_original(tmp_path / "single.pth")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_single_file(single, ema=True)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "module.", "_orig_mod."])
def test_prefixes_of_other_programs_are_removed(tmp_path: Path, prefix: str) -> None:
    model = transformer()
    save_file({prefix + name: tensor for name, tensor in original_state(model).items()}, tmp_path / "m.safetensors")
    assert same(SanaTransformer2DModel.from_single_file(tmp_path / "m.safetensors", **TOLD), model)


def test_a_fused_tensor_does_not_keep_its_siblings(tmp_path: Path) -> None:
    path, _ = tiny_original(tmp_path / "m.pth")
    loaded = SanaTransformer2DModel.from_single_file(path, **TOLD)
    for name, tensor in loaded.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_dtypes_and_what_is_stored(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in original_state(transformer()).items()}
    path = save_pth(tmp_path / "m.pth", state)
    load = SanaTransformer2DModel.from_single_file
    assert load(path, **TOLD).dtype == torch.float32
    assert load(path, torch_dtype="auto", **TOLD).dtype == torch.bfloat16
    assert load(path, torch_dtype=torch.float16, **TOLD).dtype == torch.float16
    assert load(path, dtype="float16", **TOLD).dtype == torch.float16
    assert (
        load_single_file(path, dtype={"transformer": "bfloat16"}, **TOLD).parts["transformer"].dtype == torch.bfloat16
    )


def test_a_configuration_may_be_given(tmp_path: Path) -> None:
    path, model = tiny_original(tmp_path / "m.pth", sample_size=16)
    model.save_pretrained(tmp_path / "folder" / "transformer")
    load = SanaTransformer2DModel.from_single_file
    assert load(path, config=str(tmp_path / "folder")).config == model.config
    assert load(path, config=tmp_path / "folder", subfolder="transformer").config == model.config
    assert load(path, config=dict(model.config)).config == model.config
    assert load(path, config=model.config.to_dict(), sample_size=64).config.sample_size == 64
    with pytest.raises(CheckpointError, match=r"missing, first 'blocks.2"):
        load(path, config={**model.config.to_dict(), "num_layers": 3})
    with pytest.raises(InvalidInput, match=r"has no argument 'sample_sise'.*sample_size"):
        load(path, sample_sise=3)


def test_a_configuration_of_the_original_code_may_be_given(tmp_path: Path) -> None:
    path, _ = tiny_original(tmp_path / "m.pth", qk_norm="rms_norm_across_heads")
    yaml = {"model": {"model": "SanaMS_1600M_P1_D20", "image_size": 512, "qk_norm": True}}
    value = {**yaml, "scheduler": {"timestep_norm_scale_factor": 1000}}
    loaded = SanaTransformer2DModel.from_single_file(path, original_config=value, **TOLD)
    assert (loaded.config.sample_size, loaded.config.timestep_scale) == (16, 0.001)
    with pytest.raises(InvalidInput, match="Both config and original_config were given"):
        SanaTransformer2DModel.from_single_file(path, original_config=value, config={})


def test_tensors_in_memory_will_do() -> None:
    model = transformer()
    assert same(SanaTransformer2DModel.from_single_file({"state_dict": original_state(model)}, **TOLD), model)


def test_what_is_assumed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = tiny_original(tmp_path / "mine.pth", qk_norm="rms_norm_across_heads")
    loaded = load_single_file(path, attention_head_dim=8)
    assert loaded.card is None
    assert loaded.base is None
    assert loaded.assumed == (
        "16 heads of the attention to the caption",
        "timestep_scale 1 (a Sprint teacher needs 0.001)",
    )
    assert "mine.pth does not say all about its model; assumed: 16 heads" in caplog.text
    caplog.clear()
    load_single_file(path, timestep_scale=1.0, **TOLD)
    assert caplog.text == ""
    teacher, _ = tiny_original(tmp_path / "my_teacher.pth", qk_norm="rms_norm_across_heads")
    assert examine(teacher, told=TOLD).models["transformer"].config.timestep_scale == 0.001


def test_sizes_are_told_by_positions_then_by_the_name() -> None:
    with on_meta():
        model = LinearDiT(CARDS["sana-1.6b-2k"].transformer)
    state = listing(dict(original_tensors(model.state_dict(), transformer_keys(False), model.config)))
    told = infer_transformer(state, "weights.pth", {}, "it")
    assert (told.config.sample_size, told.config.interpolation_scale) == (64, 1.0)
    del state["pos_embed"]
    named = infer_transformer(state, "Mine_4Kpx.pth", {}, "it")
    assert (named.config.sample_size, named.config.interpolation_scale) == (128, 2.0)
    blind = infer_transformer(state, "weights.pth", {}, "it")
    assert (blind.config.sample_size, blind.assumed) == (32, ("sample_size 32 (1024 px)",))


def test_the_scaling_factor_comes_from_the_name() -> None:
    state = listing(original_state(small_autoencoder("f64-mix")))
    told = {"attention_head_dim": 4}
    for name, factor in (("dc-ae-f64c128-in-1.0.pth", 0.2889), ("dc-ae-f64c128-mix-1.0/model.safetensors", 0.4538)):
        found = infer_autoencoder(state, name, told, "it")
        assert (found.config.scaling_factor, found.assumed) == (factor, ())
    blind = infer_autoencoder(state, "vae.pth", told, "it")
    assert blind.assumed == ("scaling_factor 0.4538, that of the 'mix' model",)
    assert infer_autoencoder(state, "vae.pth", {**told, "scaling_factor": 0.3}, "it").assumed == ()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "half", "width", "extra block"])
def test_anything_else_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    state = original_state(transformer())
    expected = {
        "missing": r"1 missing, first 'blocks.1.attn.qkv.weight'",
        "unexpected": r"1 unexpected, first 'blocks.0.attn.surprise'",
        "shape": r"3 of a wrong shape, first 'blocks.0.attn.qkv.weight': \[47, 16\]",
        "half": r"missing, first",
        "width": r"of a wrong shape",
        "extra block": r"holds 'blocks.7' but not 'blocks.2'",
    }[fault]
    if fault == "missing":
        del state["blocks.1.attn.qkv.weight"]
    elif fault == "unexpected":
        state["blocks.0.attn.surprise"] = torch.ones(2)
    elif fault == "shape":
        state["blocks.0.attn.qkv.weight"] = torch.ones(47, 16)
    elif fault == "half":
        state = {name: tensor for name, tensor in state.items() if "cross_attn" not in name}
    elif fault == "width":
        state["t_block.1.weight"] = torch.ones(96, 8)
    else:
        state["blocks.7.attn.proj.bias"] = torch.ones(16)
    with pytest.raises(CheckpointError, match=expected):
        load_single_file(save_pth(tmp_path / "m.pth", state), **TOLD)


def test_training_leftovers_are_dropped(tmp_path: Path) -> None:
    model = transformer(guidance_embeds=True)
    state = {**original_state(model), "logvar_linear.weight": torch.ones(1, 16), "logvar_linear.bias": torch.ones(1)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    path = save_pth(tmp_path / "m.pth", state, optimizer=optimizer)
    assert same(SanaTransformer2DModel.from_single_file(path, **TOLD), model)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    save_file(transformer().state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match="folder layout, not an original one: put it into a folder"):
        load_single_file(tmp_path / "ours.safetensors")
    save_file({"transformer.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"adapters \(LoRA\), no model: load them"):
        load_single_file(tmp_path / "lora.safetensors")
    save_file({"a": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no SANA model: .*first tensor is 'a'"):
        load_single_file(tmp_path / "other.safetensors")
    with pytest.raises(ModelNotFound, match="There is no file"):
        load_single_file(tmp_path / "nowhere.pth")
    with pytest.raises(InvalidInput, match=r"no file of weights; these end in \.safetensors, \.pth"):
        load_single_file(tmp_path / "model.onnx")
    vae = save_pth(tmp_path / "vae.pth", original_state(small_autoencoder("f32-sana")))
    with pytest.raises(InvalidInput, match="holds no transformer, only vae"):
        SanaTransformer2DModel.from_single_file(vae)
    assert isinstance(AutoencoderDC.from_single_file(vae), nn.Module)


def test_a_card_of_another_model_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, model = tiny_original(tmp_path / "Sana_1600M_1024px.pth")
    loaded = load_single_file(path, **TOLD)
    assert "is not the model of the card sana-1.6b-1024-fp16; the card is not used" in caplog.text
    assert loaded.card is None
    assert same(loaded.transformer, model)


def test_the_folder_around_a_file_tells_its_heads(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path, model = tiny_original(tmp_path / "checkpoints" / "mine.pth", sample_size=16)
    model.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    loaded = load_single_file(path)
    assert loaded.transformer is not None
    assert loaded.transformer.config == model.config
    assert loaded.assumed == ()


def test_configs_of_the_inferred_kind_are_checked() -> None:
    state = listing(original_state(transformer()))
    with pytest.raises(CheckpointError, match=r"describes no model that can be built: .*sample_size"):
        infer_transformer(state, "x", {**TOLD, "sample_size": -1}, "it")
    assert isinstance(
        infer_autoencoder(
            listing(original_state(small_autoencoder("f32-in"))), "x", {"attention_head_dim": 4}, "it"
        ).config,
        AutoencoderConfig,
    )


def test_every_setting_of_the_family_has_a_name_here() -> None:
    """The rules reach every tensor of the largest transformer both ways."""
    fields: dict[str, Any] = {"qk_norm": "layer_norm_across_heads", "guidance_embeds": True, "attention_bias": True}
    model = transformer(**fields)
    keys = transformer_keys(True)
    sources, unknown = keys.sources(model.state_dict())
    pieces, dropped, strange = keys.pieces(sources)
    assert (unknown, dropped, strange) == ([], [], [])
    assert pieces.keys() == model.state_dict().keys()
