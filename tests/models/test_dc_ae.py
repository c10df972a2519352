"""DC-AE by itself: the published sizes, its branches, memory formats and errors."""

import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import AutoencoderConfig
from sana.errors import InvalidInput
from sana.models import dc_ae_blocks
from sana.models.dc_ae import DCAutoencoder
from sana.models.dc_ae_blocks import DownBlock, UpBlock
from sana.models.outputs import DecoderOutput, EncoderOutput
from sana.nn.head_attention import attend_by_heads, linear_attention, quadratic_attention

BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA = AutoencoderConfig(
    encoder_block_types=BLOCKS,
    decoder_block_types=BLOCKS,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
TINY: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}


def make(**changes: Any) -> DCAutoencoder:
    torch.manual_seed(0)
    return DCAutoencoder(AutoencoderConfig(**(TINY | changes))).eval()


def test_the_published_autoencoder_has_the_published_tensors() -> None:
    """The hash is over every name and shape of the published file."""
    with torch.device("meta"):
        model = DCAutoencoder(SANA)
    state = model.state_dict()
    lines = [f"{name}:{'x'.join(map(str, tensor.shape))}" for name, tensor in sorted(state.items())]
    assert len(state) == 375
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "787bf8c3101e4b2b"
    assert sum(p.numel() for p in model.encoder.parameters()) == 153_027_104
    assert sum(p.numel() for p in model.decoder.parameters()) == 159_223_171
    assert (model.spatial_compression_ratio, model.temporal_compression_ratio) == (32, 1)


def test_outputs_are_named_and_indexable() -> None:
    model, x = make(), torch.randn(1, 3, 8, 12)
    encoded = model.encode(x)
    assert isinstance(encoded, EncoderOutput)
    assert encoded.latent.shape == (1, 4, 4, 6)
    assert encoded[0] is encoded.latent is encoded["latent"]
    (latent,) = model.encode(x, return_dict=False)
    assert torch.equal(latent, encoded.latent)
    decoded = model.decode(latent)
    assert isinstance(decoded, DecoderOutput)
    assert decoded.sample.shape == x.shape
    (sample,) = model(x, return_dict=False)
    assert torch.equal(sample, decoded.sample)
    assert torch.equal(model(x).sample, sample)
    with pytest.raises(KeyError, match="picture"):
        decoded["picture"]


@pytest.mark.parametrize("shape", [(9, 8), (8, 9)])
def test_sides_that_do_not_fit_are_named(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=r"multiples of 2\."):
        make().encode(torch.zeros(1, 3, *shape))


def attention_inputs(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(3))
    return [F.relu(q), F.relu(k), v]


def test_both_attentions_are_the_same_function() -> None:
    q, k, v = attention_inputs(5, torch.float64)
    expected = torch.einsum("bgnm,bgmd->bgnd", F.normalize(q @ k.mT, p=1, dim=-1), v)
    torch.testing.assert_close(linear_attention(q, k, v), expected)
    torch.testing.assert_close(quadratic_attention(q, k, v), expected.float().double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attend", [linear_attention, quadratic_attention])
def test_a_query_without_positive_products_gives_zeros(attend: Any) -> None:
    q, k, v = attention_inputs(5)
    q[:, :, 2] = 0
    out = attend(q, k, v)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    assert out[:, :, 1].abs().amax() > 0


@pytest.mark.parametrize("strip", [1, 700, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_few_heads_at_a_time_are_all_heads(dtype: torch.dtype, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.nn.rows.STRIP_BYTES", strip)
    tokens = torch.randn(2, 11, 5 * 3 * 8, dtype=torch.float32).to(dtype)
    before, out = tokens.clone(), torch.empty(2, 11, 5 * 8, dtype=dtype)
    attend_by_heads(tokens, 8, out)
    q, k, v = tokens.view(2, 11, 5, 3, 8).permute(3, 0, 2, 1, 4)
    expected = linear_attention(F.relu(q), F.relu(k), v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    assert torch.equal(tokens, before)


def test_linear_attention_ignores_autocast() -> None:
    """In bfloat16 the sums over many tokens would lose most of their digits."""
    q, k, v = attention_inputs(500)
    with torch.autocast("cpu", torch.bfloat16):
        cast = linear_attention(q, k, v)
    assert torch.equal(cast, linear_attention(q, k, v))


@pytest.mark.parametrize(("shape", "name"), [((2, 4), "quadratic_attention"), ((3, 3), "linear_attention")])
def test_the_branch_depends_on_the_number_of_positions(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], name: str
) -> None:
    """Eight positions and a head width of eight is the last quadratic case."""
    used: list[str] = []
    for branch in ("linear_attention", "quadratic_attention"):
        real = getattr(dc_ae_blocks, branch)
        monkeypatch.setattr(
            dc_ae_blocks, branch, lambda *args, real=real, branch=branch: used.append(branch) or real(*args)
        )
    make().decode(torch.randn(1, 4, *shape))
    assert used == [name]


def is_channels_last(x: Tensor) -> bool:
    return x.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"upsample_block_type": "interpolate", "downsample_block_type": "conv"}])
def test_every_convolution_sees_channels_last(changes: dict[str, Any], batch: int) -> None:
    """One layer that left the format would make all that follow several times slower on a CPU.

    The strides themselves are compared: in a batch of one the usual question also accepts strides that convolutions
    take for the other format.
    """
    model = make(**changes)
    formats: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args: formats.append(is_channels_last(args[0])))
    latent = model.encode(torch.randn(batch, 3, 16, 24)).latent
    assert is_channels_last(latent)
    assert is_channels_last(model.decode(latent.contiguous()).sample)
    assert len(formats) == 20
    assert all(formats)


@pytest.mark.parametrize("channels", [(8, 4), (8, 8), (8, 16), (8, 2), (16, 12)])
def test_the_up_shortcut_repeats_and_shuffles(channels: tuple[int, int]) -> None:
    wide, narrow = channels
    if 4 * narrow % wide:
        pytest.skip("not a group of whole channels")
    block = UpBlock(wide, narrow, interpolate=True)
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    x = torch.randn(2, wide, 3, 5)
    expected = F.pixel_shuffle(x.repeat_interleave(4 * narrow // wide, dim=1), 2)
    assert torch.equal(block(x), expected)
    assert torch.equal(block(x.contiguous(memory_format=torch.channels_last)), expected)


def test_the_down_shortcut_averages_groups_of_unshuffled_channels() -> None:
    block = DownBlock(2, 4, unshuffle=False)
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    x = torch.arange(16.0).view(1, 2, 2, 4)
    rows = [x[0, c, i, 0::2].add(x[0, c, i, 1::2]) / 2 for c in range(2) for i in range(2)]
    assert torch.equal(block(x), torch.stack(rows).view(1, 4, 1, 2))


def test_bfloat16_autocast_trains() -> None:
    model = make().train()
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (model(x).sample - x).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32
        if name.endswith("weight"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types"),
        ({"decoder_act_fns": "tanh"}, "decoder_act_fns"),
        ({"decoder_conv_act_fn": "tanh"}, "decoder_conv_act_fn"),
        ({"encoder_block_types": ("ResBlock", "VitBlock")}, "encoder_block_types"),
        ({"upsample_block_type": "bilinear"}, "upsample_block_type"),
        ({"encoder_layers_per_block": (1, 1, 1)}, "encoder_layers_per_block"),
        ({"decoder_layers_per_block": (-1, 1)}, "decoder_layers_per_block"),
        ({"encoder_block_out_channels": (8, 20)}, "encoder_block_out_channels"),
        ({"encoder_block_out_channels": (8, 40), "latent_channels": 5}, "encoder_block_out_channels"),
        ({"decoder_block_out_channels": (8, 16, 16)}, "decoder_block_out_channels"),
        ({"decoder_block_out_channels": (8, 6)}, "decoder_block_out_channels"),
        ({"latent_channels": 5}, "encoder_block_out_channels"),
        ({"encoder_qkv_multiscales": ((), (4,))}, "encoder_qkv_multiscales"),
        ({"attention_head_dim": 32}, "encoder_block_out_channels"),
    ],
)
def test_contradictory_configurations_name_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        AutoencoderConfig(**(TINY | changes))


def test_an_empty_first_stage_moves_the_resolution_into_the_outer_convolutions() -> None:
    model = make(encoder_layers_per_block=(0, 1), decoder_layers_per_block=(0, 1))
    assert isinstance(model.encoder.conv_in, DownBlock)
    assert isinstance(model.decoder.conv_out, UpBlock)
    assert len(model.encoder.down_blocks[0]) == len(model.decoder.up_blocks[0]) == 0
    assert model(torch.randn(1, 3, 8, 12)).sample.shape == (1, 3, 8, 12)


def test_shapes_are_known_without_memory() -> None:
    with torch.device("meta"):
        model = make()
    assert model.decode(torch.empty(1, 4, 3, 5, device="meta")).sample.shape == (1, 3, 6, 10)
