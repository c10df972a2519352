"""The configurations: defaults, reading, writing, refusing."""

import inspect
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Any

import diffusers
import pytest

from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig
from sana.errors import InvalidInput

CONFIGS = (TransformerConfig, ControlNetConfig, AutoencoderConfig)


def test_published_defaults() -> None:
    config = TransformerConfig()
    assert (config.inner_dim, config.cross_attention_dim, config.num_layers, config.caption_channels) == (
        2240,
        2240,
        20,
        2304,
    )
    assert ControlNetConfig().num_layers == 7
    assert AutoencoderConfig().spatial_compression_ratio == 32


def test_controlnet_has_the_transformers_first_fields() -> None:
    names = [field.name for field in fields(TransformerConfig)]
    assert [field.name for field in fields(ControlNetConfig)] == [*names[:17], "qk_norm"]
    assert names[17:] == ["guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"]


@pytest.mark.parametrize("oracle_name", ["SanaTransformer2DModel", "AutoencoderDC", "SanaControlNetModel"])
def test_fields_and_defaults_are_the_documented_ones(oracle_name: str) -> None:
    ours = dict(zip(("SanaTransformer2DModel", "SanaControlNetModel", "AutoencoderDC"), CONFIGS, strict=True))
    parameters = inspect.signature(getattr(diffusers, oracle_name).__init__).parameters
    expected = {name: p.default for name, p in parameters.items() if name != "self"}
    config = ours[oracle_name]()
    added = {"SanaControlNetModel": {"qk_norm": None}}.get(oracle_name, {})
    assert {field.name: getattr(config, field.name) for field in fields(config)} == {**expected, **added}
    assert config.to_dict().keys() == expected.keys(), "what is added is not written where it is not used"


TWO = {
    "encoder_block_out_channels": [64, 128],
    "decoder_block_out_channels": [64, 128],
    "encoder_layers_per_block": [1, 1],
    "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], []],
}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"decoder_block_out_channels": [64]}, "decoder_block_out_channels .* have as many stages as the encoder, 2"),
        ({"encoder_layers_per_block": [1, -1]}, "encoder_layers_per_block .* hold no negative number, and a 0 only"),
        ({"encoder_qkv_multiscales": [[], [4]]}, "encoder_qkv_multiscales .* hold odd kernel sizes"),
        ({"encoder_qkv_multiscales": [[], [-1]]}, "encoder_qkv_multiscales .* hold odd kernel sizes"),
        ({"decoder_block_out_channels": [64, 512]}, "decoder_block_out_channels .* let each width divide four times"),
        ({"encoder_block_out_channels": [64, 2], "latent_channels": 2}, "hold multiples of 4 for the pixel_unshuffle"),
        ({"latent_channels": 48}, "end with a multiple of latent_channels = 48, or encoder_out_shortcut be False"),
        (
            {"attention_head_dim": 80, "decoder_block_types": "EfficientViTBlock"},
            "decoder_block_out_channels .* hold at least attention_head_dim = 80 in attention stages",
        ),
    ],
)
def test_widths_and_stages_that_contradict_each_other(values: dict[str, Any], says: str) -> None:
    AutoencoderConfig.from_dict(TWO)
    with pytest.raises(InvalidInput, match=says):
        AutoencoderConfig.from_dict({**TWO, **values})


@pytest.mark.parametrize("cls", CONFIGS)
def test_round_trip_through_json(cls: Any) -> None:
    config = cls()
    again = cls.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    unwritten = {"qk_norm"} if cls is ControlNetConfig else set()
    assert list(config.to_dict()) == [field.name for field in fields(cls) if field.name not in unwritten]


def test_lists_become_tuples_all_the_way_down() -> None:
    config = AutoencoderConfig.from_dict({"encoder_qkv_multiscales": [[], [], [], [5], [5], [3, 5]]})
    assert config.encoder_qkv_multiscales == ((), (), (), (5,), (5,), (3, 5))
    assert config.to_dict()["encoder_qkv_multiscales"] == [[], [], [], [5], [5], [3, 5]]


def test_missing_and_private_keys() -> None:
    config = TransformerConfig.from_dict({"_class_name": "SanaTransformer2DModel", "num_layers": 3})
    assert config == TransformerConfig(num_layers=3)


def test_unknown_keys_warn_with_a_suggestion() -> None:
    with pytest.warns(UserWarning, match="no field 'qknorm'; it is ignored. Did you mean 'qk_norm'"):
        config = TransformerConfig.from_dict({"qknorm": "l2"})
    assert config == TransformerConfig()


def test_an_integer_may_stand_for_a_float() -> None:
    assert TransformerConfig.from_dict({"mlp_ratio": 3, "interpolation_scale": 2}).interpolation_scale == 2


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (TransformerConfig, {"num_layers": "20"}),
        (TransformerConfig, {"num_layers": 20.0}),
        (TransformerConfig, {"num_layers": True}),
        (TransformerConfig, {"num_layers": 0}),
        (TransformerConfig, {"num_layers": None}),
        (TransformerConfig, {"out_channels": -1}),
        (TransformerConfig, {"attention_bias": 1}),
        (TransformerConfig, {"mlp_ratio": "2.5"}),
        (TransformerConfig, {"norm_eps": float("nan")}),
        (TransformerConfig, {"dropout": 1.0}),
        (TransformerConfig, {"cross_attention_dim": None}),
        (TransformerConfig, {"cross_attention_dim": 1152}),
        (TransformerConfig, {"interpolation_scale": 0.0}),
        (TransformerConfig, {"qk_norm": "rms_norm"}),
        (TransformerConfig, {"qk_norm": 1}),
        (TransformerConfig, {"timestep_scale": None}),
        (ControlNetConfig, {"patch_size": 0}),
        (AutoencoderConfig, {"encoder_block_out_channels": [0, 256, 512, 512, 1024, 1024]}),
        (AutoencoderConfig, {"encoder_block_out_channels": [128, "256"]}),
        (AutoencoderConfig, {"decoder_layers_per_block": [3, 3, 3]}),
        (AutoencoderConfig, {"encoder_block_types": "ResNet"}),
        (AutoencoderConfig, {"upsample_block_type": "bilinear"}),
        (AutoencoderConfig, {"scaling_factor": 0}),
        (AutoencoderConfig, {"encoder_qkv_multiscales": [5, 5, 5, 5, 5, 5]}),
    ],
)
def test_bad_values_name_the_field(cls: Any, values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InvalidInput, match=rf"{cls.__name__}\.{name} is .*; it must "):
        cls.from_dict(values)


def test_misspelt_choice_gets_a_suggestion() -> None:
    with pytest.raises(InvalidInput, match="Did you mean 'rms_norm_across_heads'"):
        TransformerConfig(qk_norm="rms_norm_across_head")


def test_width_must_allow_positions() -> None:
    narrow = {"num_attention_heads": 1, "attention_head_dim": 6, "cross_attention_dim": 6}
    assert TransformerConfig(**narrow).inner_dim == 6
    with pytest.raises(InvalidInput, match="interpolation_scale"):
        TransformerConfig(**narrow, interpolation_scale=1.0)


def test_configurations_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        TransformerConfig().num_layers = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        TransformerConfig(32)  # type: ignore[misc]


def test_config_and_cards_do_not_import_torch() -> None:
    code = "import sys, sana.config, sana.cards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
