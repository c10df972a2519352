"""DC-AE against the public implementation: names, values, gradients and half precision on drawn configurations."""

import random
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from sana.config import AutoencoderConfig
from sana.models.dc_ae import DCAutoencoder

SEEDS = range(10)
RMS_GATE, MAX_GATE = 1e-5, 1e-4  # rms(difference) / rms(reference); max(difference) / std(reference)


def draw_config(seed: int) -> dict[str, Any]:
    """Draw every documented option; the first stage is empty in about a third of the draws."""
    rng = random.Random(seed)
    stages = rng.choice((2, 3))
    config: dict[str, Any] = {"attention_head_dim": rng.choice((8, 16)), "latent_channels": rng.choice((4, 8, 16))}
    for side in ("encoder", "decoder"):
        ladders = {2: ((16, 32), (32, 32), (16, 64), (48, 64)), 3: ((16, 32, 64), (16, 16, 32), (32, 64, 64))}[stages]
        config[f"{side}_block_out_channels"] = rng.choice(ladders)
        config[f"{side}_block_types"] = tuple(rng.choice(("ResBlock", "EfficientViTBlock")) for _ in range(stages))
        config[f"{side}_layers_per_block"] = (rng.choice((0, 1, 2)), *(rng.choice((1, 2)) for _ in range(stages - 1)))
        config[f"{side}_qkv_multiscales"] = tuple(rng.choice(((), (5,), (3, 5))) for _ in range(stages))
    config["decoder_norm_types"] = tuple(rng.choice(("rms_norm", "batch_norm")) for _ in range(stages))
    config["decoder_act_fns"] = tuple(rng.choice(("silu", "relu", "gelu", "mish")) for _ in range(stages))
    config["decoder_conv_act_fn"] = rng.choice(("relu", "silu"))
    config["upsample_block_type"] = rng.choice(("pixel_shuffle", "interpolate"))
    config["downsample_block_type"] = rng.choice(("pixel_unshuffle", "Conv"))
    config["encoder_out_shortcut"] = rng.choice((True, False))
    config["decoder_in_shortcut"] = rng.choice((True, False))
    return config


def redraw(model: nn.Module, seed: int) -> None:
    """Make nothing trivial: norms away from one and zero, and inputs of norms so small that their epsilon counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(drawn + 1.0 if name.endswith("weight") else drawn)
            elif name.endswith(("conv2.weight", "to_out.weight", "conv_point.weight")):
                parameter.mul_(0.03)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.02 + 0.001)


def make_pair(config: dict[str, Any], seed: int = 0) -> tuple[DCAutoencoder, Any]:
    torch.manual_seed(seed)
    reference = AutoencoderDC(**config).eval()
    redraw(reference, seed)
    model = DCAutoencoder(AutoencoderConfig.from_dict(config)).eval()
    model.load_state_dict(reference.state_dict())
    return model, reference


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    difference = actual - expected
    assert actual.shape == expected.shape
    assert rms(difference) <= RMS_GATE * rms(expected)
    assert float(difference.abs().max()) <= MAX_GATE * float(expected.std())


def test_the_draws_cover_every_option() -> None:
    """Without this, a change of the drawing could silently drop an option from the comparison."""
    configs = [draw_config(seed) for seed in SEEDS]
    for name in ("upsample_block_type", "downsample_block_type", "encoder_out_shortcut", "decoder_in_shortcut"):
        assert len({config[name] for config in configs}) == 2
    assert {norm for config in configs for norm in config["decoder_norm_types"]} == {"rms_norm", "batch_norm"}
    assert {act for config in configs for act in config["decoder_act_fns"]} == {"silu", "relu", "gelu", "mish"}
    for side in ("encoder", "decoder"):
        assert {config[f"{side}_layers_per_block"][0] == 0 for config in configs} == {True, False}
        used = {
            (block, scales)
            for config in configs
            for block, scales in zip(config[f"{side}_block_types"], config[f"{side}_qkv_multiscales"], strict=True)
        }
        assert {("EfficientViTBlock", scales) for scales in ((), (5,), (3, 5))} <= used


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("latent_size", [(2, 1), (5, 7)], ids=["quadratic", "linear"])
@pytest.mark.parametrize("seed", SEEDS)
def test_values(seed: int, latent_size: tuple[int, int], memory_format: torch.memory_format) -> None:
    """Sizes are odd in latents; the small one takes the quadratic branch of the attention in the last stage."""
    model, reference = make_pair(draw_config(seed), seed)
    ratio = model.spatial_compression_ratio
    assert (latent_size[0] * latent_size[1] > model.config.attention_head_dim) == (latent_size == (5, 7))
    x = torch.randn(2, 3, *(side * ratio for side in latent_size))
    with torch.no_grad():
        latent, sample = reference.encode(x)[0], reference(x)[0]
        model, x = model.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
        assert_close(model.encode(x)[0], latent)
        assert_close(model.decode(latent.contiguous(memory_format=memory_format))[0], reference.decode(latent)[0])
        assert_close(model(x)[0], sample)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients(seed: int) -> None:
    """Training mode, so that batch norms normalise by the batch and update their statistics alike.

    In float64: a batch norm over a few values makes float32 rounding of 1e-7 a gradient difference of 4e-5.
    """
    model, reference = make_pair(draw_config(seed), seed)
    model, reference = model.double(), reference.double()
    ratio = model.spatial_compression_ratio
    x = torch.randn(2, 3, 3 * ratio, 6 * ratio, dtype=torch.float64)
    inputs = []
    for network in (model.train(), reference.train()):
        inputs.append(x.clone().requires_grad_())
        network(inputs[-1])[0].square().mean().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()} | {"x": inputs[1].grad}
    actual = {name: parameter.grad for name, parameter in model.named_parameters()} | {"x": inputs[0].grad}
    for name, gradient in expected.items():
        # A bias in front of a batch norm has the gradient zero; what is left of it is rounding.
        assert rms(actual[name] - gradient) <= 1e-5 * rms(gradient) + 1e-9, name
    statistics = dict(model.named_buffers())
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(statistics[name], buffer)


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_bfloat16_is_no_worse_than_the_reference(seed: int) -> None:
    config = draw_config(seed)
    model, reference = make_pair(config, seed)
    ratio = model.spatial_compression_ratio
    x = torch.randn(2, 3, 8 * ratio, 6 * ratio)
    with torch.no_grad():
        latent = reference.encode(x)[0]
        exact = {"encode": latent, "decode": reference.decode(latent)[0]}
        model, reference = model.bfloat16(), reference.bfloat16()
        inputs = {"encode": x.bfloat16(), "decode": latent.bfloat16()}
        for part, value in exact.items():
            theirs, ours = getattr(reference, part)(inputs[part])[0], getattr(model, part)(inputs[part])[0]
            assert ours.dtype == torch.bfloat16
            assert rms(ours - value) <= 1.2 * rms(theirs - value)
            assert rms(ours - theirs) <= 1.5e-2 * rms(value)


RELEASED_WIDTHS = (128, 256, 512, 512, 1024, 1024, 2048, 2048)


def released_config(stages: int, sana: bool, latent_channels: int) -> dict[str, Any]:
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (stages - 3)
    empty: tuple[tuple[int, ...], ...] = ((),) * stages
    scales = empty[:3] + ((5,),) * (stages - 3) if sana else empty
    config: dict[str, Any] = {
        "latent_channels": latent_channels,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": RELEASED_WIDTHS[:stages],
        "decoder_block_out_channels": RELEASED_WIDTHS[:stages],
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "Conv",
    }
    if sana:
        return config
    return config | {
        "encoder_layers_per_block": (0, 4, 8) + (2,) * (stages - 3),
        "decoder_layers_per_block": (0, 5, 10) + (2,) * (stages - 3),
        "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * (stages - 3),
        "decoder_act_fns": ("relu",) * 3 + ("silu",) * (stages - 3),
    }


@pytest.mark.parametrize(
    "config",
    [
        released_config(6, True, 32),
        released_config(6, False, 32),
        released_config(7, False, 128),
        released_config(8, False, 512),
    ],
    ids=["f32c32-sana", "f32c32-in", "f64c128", "f128c512"],
)
def test_released_models_have_the_same_tensors(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model, reference = DCAutoencoder(AutoencoderConfig.from_dict(config)), AutoencoderDC(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}


@pytest.mark.slow
def test_full_width() -> None:
    """The published SANA autoencoder's shape, with random weights, at 256 px."""
    torch.manual_seed(0)
    config = released_config(6, True, 32)
    reference = AutoencoderDC(**config).eval()
    redraw(reference, 0)
    model = DCAutoencoder(AutoencoderConfig.from_dict(config)).eval()
    model.load_state_dict(reference.state_dict(), assign=True)
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        latent = reference.encode(x)[0]
        assert_close(model.encode(x)[0], latent)
        sample = reference.decode(latent)[0]
        assert_close(model.decode(latent)[0], sample)
        assert_close(model.decode(latent.to(memory_format=torch.channels_last))[0], sample)
