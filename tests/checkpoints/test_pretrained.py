"""The public model classes: building, saving, loading, arguments and memory switches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipeline import AUTOENCODER, FILE, INDEX, TRANSFORMER, autoencoder, load, same, stir, transformer

from sana.checkpoints.autoencoder import AutoencoderDC
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.config import TransformerConfig
from sana.errors import CheckpointError, InvalidInput, ModelNotFound
from sana.memory import tiling

# --- building and configuration ---------------------------------------------------------------------------------------


def test_constructor_takes_the_documented_fields() -> None:
    model = transformer()
    assert (model.config.in_channels, model.config["num_layers"], model.config.dropout) == (4, 2, 0.0)
    assert isinstance(model.config, TransformerConfig)
    assert dict(model.config)["caption_channels"] == 8
    assert set(model.config) == set(model.config.to_dict())
    assert "qk_norm" in model.config
    assert len(model.config) == len(dict(**model.config))
    assert model.config == transformer().config
    with pytest.raises(KeyError):
        model.config["inner_dim"]
    with pytest.raises(AttributeError):
        model.config.num_layers = 3  # type: ignore[misc]


def test_constructor_refuses_unknown_fields() -> None:
    with pytest.raises(
        InvalidInput, match=r"SanaTransformer2DModel has no argument 'num_layer'\. Did you mean 'num_layers'\?"
    ):
        SanaTransformer2DModel(num_layer=2)
    with pytest.raises(InvalidInput, match="qk_norm"):
        SanaTransformer2DModel(qk_norm="rms")


@pytest.mark.parametrize("kind", [dict, lambda config: config, lambda config: config.to_dict()])
def test_from_config(kind: Callable[[Any], Any]) -> None:
    model = transformer()
    again = SanaTransformer2DModel.from_config(kind(model.config))
    assert again.config == model.config
    assert SanaTransformer2DModel.from_config(model.config, num_layers=1).config.num_layers == 1
    with pytest.warns(UserWarning, match="no field 'new_thing'"):
        SanaTransformer2DModel.from_config({**TRANSFORMER, "new_thing": 1, "_private": 2})


def test_properties() -> None:
    model = transformer().to(torch.bfloat16)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    model.requires_grad_(False).proj_out.requires_grad_(True)
    assert model.num_parameters(only_trainable=True) == 16 * 4 + 4
    assert model.is_gradient_checkpointing is False
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing is True
    model.disable_gradient_checkpointing()
    assert model.is_gradient_checkpointing is False


# --- round trips ------------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "plain": ({}, {}, {FILE}),
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}, {"diffusion_pytorch_model.fp16.safetensors"}),
    "sharded": (
        {"max_shard_size": "30KB"},
        {},
        {INDEX, *(f"diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4))},
    ),
    "sharded variant": (
        {"max_shard_size": 40_000, "variant": "bf16"},
        {"variant": "bf16"},
        {
            "diffusion_pytorch_model.safetensors.index.bf16.json",
            *(f"diffusion_pytorch_model.bf16-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        },
    ),
    "pickled": ({"safe_serialization": False}, {"use_safetensors": False}, {"diffusion_pytorch_model.bin"}),
    "pickled shards": (
        {"safe_serialization": False, "max_shard_size": "40KB"},
        {"use_safetensors": False},
        {
            "diffusion_pytorch_model.bin.index.json",
            *(f"diffusion_pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)),
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_round_trip(tmp_path: Path, way: str) -> None:
    save_options, load_options, names = WAYS[way]
    model = transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    model.save_pretrained(tmp_path, **save_options)
    assert {path.name for path in tmp_path.iterdir()} == names | {"config.json"}
    again = load(tmp_path, **load_options)
    assert same(again, model)
    assert again.config == model.config
    assert not again.training
    assert all(weight.requires_grad for weight in again.parameters())
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))


def test_autoencoder_round_trip_with_integer_buffers(tmp_path: Path) -> None:
    model = autoencoder(decoder_norm_types="batch_norm", decoder_act_fns=("relu", "silu"))
    model.save_pretrained(tmp_path)
    again = AutoencoderDC.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert again.config == model.config
    kinds = {tensor.dtype for tensor in again.state_dict().values()}
    assert kinds == {torch.bfloat16, torch.int64}
    assert same(AutoencoderDC.from_pretrained(tmp_path), model)


def test_config_file_is_the_published_form(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["_class_name"] == "SanaTransformer2DModel"
    assert "_diffusers_version" in config
    assert SanaTransformer2DModel.load_config(saved) == config


def test_saving_again_leaves_no_stale_weights(tmp_path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    stir(model, seed=5).save_pretrained(tmp_path)
    assert same(load(tmp_path), model)
    assert not (tmp_path / INDEX).exists()
    assert not same(load(tmp_path, variant="fp16"), model), "another variant is another set of files"
    stir(model, seed=6).save_pretrained(tmp_path, max_shard_size="40KB")
    assert same(load(tmp_path), model)
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float64"}, torch.float64),
        ({"torch_dtype": "auto"}, torch.float16),
    ],
)
def test_dtype_of_half_precision_files(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = transformer().half()
    model.save_pretrained(tmp_path)
    again = load(tmp_path, **options)
    assert again.dtype == dtype
    assert same(again, model.to(dtype))


def test_load_does_not_disturb_the_default_dtype_or_generator(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(saved, torch_dtype=torch.float16)
    assert torch.rand(1) == expected
    assert torch.get_default_dtype() == torch.float32


def test_parts_of_a_pipeline_folder(tmp_path: Path) -> None:
    autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert AutoencoderDC.from_pretrained(tmp_path, subfolder="vae").config.latent_channels == 4
    with pytest.raises(InvalidInput, match="folder of a pipeline; pass subfolder='transformer' or subfolder='vae'"):
        AutoencoderDC.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="configuration of AutoencoderDC, not of SanaTransformer2DModel"):
        SanaTransformer2DModel.from_pretrained(tmp_path, subfolder="vae")
    with pytest.raises(ModelNotFound, match=r"no config.json in .*transformer"):
        SanaTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")


def test_a_subclass_loads_the_same_files(saved: Path) -> None:
    class Mine(SanaTransformer2DModel):
        pass

    mine = Mine.from_pretrained(saved)
    assert type(mine) is Mine
    assert same(mine, transformer())


# --- wrong arguments --------------------------------------------------------------------------------------------------


def test_arguments_are_checked(saved: Path) -> None:
    load(saved, low_cpu_mem_usage=True, device_map="cpu")
    for options, says in (
        ({"varient": "fp16"}, r"from_pretrained has no argument 'varient'\. Did you mean 'variant'\?"),
        ({"torch_dtype": "fp8"}, "torch_dtype is 'fp8'; choose 'auto' or one of float32"),
        ({"torch_dtype": torch.int8}, "torch_dtype is torch.int8"),
        ({"device_map": "balanced"}, "device_map is 'balanced'; name one device"),
        ({"variant": "../fp16"}, "variant is '../fp16'"),
    ):
        with pytest.raises(InvalidInput, match=says):
            load(saved, **options)


def test_save_arguments_are_checked(saved: Path) -> None:
    with pytest.raises(InvalidInput, match=r"max_shard_size is '5 apples'"):
        transformer().save_pretrained(saved, max_shard_size="5 apples")
    with pytest.raises(InvalidInput, match="is a file; give a folder"):
        transformer().save_pretrained(saved / FILE)
    transformer().save_pretrained(saved / "not the main process", is_main_process=False)
    assert not (saved / "not the main process").exists()


# --- the autoencoder's memory switches --------------------------------------------------------------------------------


def test_slicing_and_tiling_of_the_autoencoder() -> None:
    model = autoencoder()
    pictures = torch.randn(2, 3, 10, 16, generator=torch.Generator().manual_seed(0))
    latents = model.encode(pictures).latent
    whole = model.decode(latents).sample
    assert (model.use_slicing, model.use_tiling, model.tile_latent_min_height, model.tile_latent_min_width) == (
        False,
        False,
        256,
        256,
    )
    model.enable_slicing()
    torch.testing.assert_close(model.decode(latents).sample, whole)
    torch.testing.assert_close(model.encode(pictures).latent, latents)
    model.disable_slicing()
    model.enable_tiling(8, 12, 6, 8)
    tiles = tiling.Tiling(tile_height=8, tile_width=12, stride_height=6, stride_width=8)
    tiled = model.decode(latents, return_dict=False)[0]
    assert torch.equal(tiled, tiling.tiled_decode(model, latents, tiles))
    assert torch.equal(model.encode(pictures).latent, tiling.tiled_encode(model, pictures, tiles))
    assert not torch.allclose(tiled, whole)
    assert torch.equal(model(pictures).sample, model.decode(model.encode(pictures).latent).sample)
    model.disable_tiling()
    assert torch.equal(model.decode(latents).sample, whole)
    with pytest.raises(InvalidInput, match="cannot cover a picture"):
        model.enable_tiling(tile_sample_min_height=4)


def test_tiling_is_the_reference_s(tmp_path: Path) -> None:
    model = autoencoder()
    oracle = diffusers.AutoencoderDC(**AUTOENCODER).eval()
    oracle.load_state_dict(model.state_dict())
    pictures = torch.randn(2, 3, 10, 16, generator=torch.Generator().manual_seed(0))
    for one in (model, oracle):
        one.enable_tiling(8, 12, 6, 8)
        one.enable_slicing()
    with torch.no_grad():
        latents = oracle.encode(pictures).latent
        torch.testing.assert_close(model.encode(pictures).latent, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.decode(latents).sample, oracle.decode(latents).sample, rtol=1e-5, atol=1e-5)
