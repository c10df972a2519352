"""Strips of rows give what the whole picture gives, whatever their height; and they notice every change of a weight."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana.config import AutoencoderConfig
from sana.models.dc_ae import Decoder
from sana.models.dc_ae_blocks import ResBlock, UpBlock
from sana.nn import rows
from sana.nn.norms import ChannelRMSNorm
from sana.nn.rows import ConvRows, Link, NormRows, Window, local, send

CONFIG: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (16, 32, 32),
    "decoder_block_out_channels": (16, 32, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (2, 1, 2),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), (3, 5)),
    "upsample_block_type": "interpolate",
}
CHANGES: dict[str, dict[str, Any]] = {
    "published": {},
    "shuffled": {"upsample_block_type": "pixel_shuffle"},
    "upsampled at the end": {"decoder_layers_per_block": (0, 2, 1)},
    "shuffled at the end": {"decoder_layers_per_block": (0, 1, 1), "upsample_block_type": "pixel_shuffle"},
    "batch norms": {"decoder_norm_types": "batch_norm", "decoder_act_fns": "relu", "decoder_conv_act_fn": "silu"},
    "rows only": {"decoder_block_types": "ResBlock", "decoder_act_fns": "gelu", "decoder_in_shortcut": False},
    "wide steps": {"decoder_block_out_channels": (8, 16, 64)},
}


def make(changes: dict[str, Any] | None = None) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(AutoencoderConfig(**(CONFIG | (changes or {})))).eval()
    with torch.no_grad():
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            if tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return decoder


def latent(batch: int = 2, height: int = 5, width: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(decoder: nn.Module, z: Tensor) -> Tensor:
    """The way with gradients."""
    with torch.enable_grad():
        out: Tensor = decoder(z).detach()
    return out


def lean(decoder: nn.Module, z: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = decoder(z)
    return out


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small pictures be cut as well."""
    monkeypatch.setattr(rows, "LARGE_STRIPS", 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the number of links of every picture that is computed in strips."""
    seen: list[int] = []
    original = rows.send

    def send(x: Tensor, links: Sequence[Link], out: Tensor) -> None:
        if len(links) > 1:  # else an upsampling block by itself
            seen.append(len(links))
        original(x, links, out)

    monkeypatch.setattr(rows, "send", send)
    return seen


@pytest.mark.parametrize("strip", [1, 2_000, 6_000, 1 << 22], ids=["one row", "few", "some", "all"])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 3), (3, 2, 7)])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_strips_give_the_whole_picture(
    changes: dict[str, Any], size: tuple[int, int, int], strip: int, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "STRIP_BYTES", strip)
    decoder, z = make(changes), latent(*size)
    before = z.clone()
    expected, found = plain(decoder, z), lean(decoder, z)
    assert len(runs) == size[0]
    assert found.stride() == torch.empty(found.shape, memory_format=torch.channels_last).stride()
    assert torch.equal(z, before)
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("changes", [{}, {"upsample_block_type": "pixel_shuffle"}], ids=["nearest", "shuffled"])
def test_bfloat16_is_no_further_from_float32_than_the_plain_way(changes: dict[str, Any]) -> None:
    decoder, z = make(changes), latent(2, 9, 7)
    exact = plain(decoder, z)
    decoder, z = decoder.bfloat16(), z.bfloat16()
    errors = [float((way(decoder, z).float() - exact).square().mean().sqrt()) for way in (lean, plain)]
    assert 0 < errors[0] <= 1.05 * errors[1]


def replace_in_place(decoder: Decoder) -> None:
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5)


def replace_by_assignment(decoder: Decoder) -> None:
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 0.5))


def load(decoder: Decoder) -> None:
    decoder.load_state_dict({name: tensor * 0.5 for name, tensor in decoder.state_dict().items()})


@pytest.mark.parametrize("replace", [replace_in_place, replace_by_assignment, load])
def test_replaced_weights_are_noticed(replace: Callable[[Decoder], None], runs: list[int]) -> None:
    decoder, z = make(), latent(1)
    before = lean(decoder, z)
    replace(decoder)
    after = lean(decoder, z)
    assert len(runs) == 2
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain(decoder, z), atol=1e-5, rtol=1e-4)


def test_a_change_of_dtype_is_noticed(runs: list[int]) -> None:
    decoder, z = make(), latent(1)
    first = lean(decoder, z)
    assert lean(decoder.bfloat16(), z.bfloat16()).dtype == torch.bfloat16
    assert len(runs) == 2
    rounded = {name: tensor.float() for name, tensor in decoder.state_dict().items()}
    decoder.float().load_state_dict(rounded)
    torch.testing.assert_close(lean(decoder, z), first, atol=0.05 * float(first.abs().max()), rtol=0)
    assert torch.equal(lean(decoder.double(), z.double()), plain(decoder, z.double())) or len(runs) == 4
    torch.testing.assert_close(lean(decoder, z.double()), plain(decoder, z.double()))


def hook_a_convolution(decoder: Decoder) -> None:
    decoder.up_blocks[0][1].conv2.register_forward_hook(lambda module, args, out: 2 * out)


def hook_a_stage(decoder: Decoder) -> None:
    decoder.up_blocks[0].register_forward_hook(lambda module, args, out: 2 * out)


def hook_the_norm(decoder: Decoder) -> None:
    decoder.norm_out.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def wrap_a_convolution(decoder: Decoder) -> None:
    nn.utils.parametrizations.weight_norm(decoder.up_blocks[0][1].conv1)


@pytest.mark.parametrize("change", [hook_a_convolution, hook_a_stage, hook_the_norm, wrap_a_convolution])
def test_layers_that_are_more_than_their_weights_are_called(change: Callable[[Decoder], None], runs: list[int]) -> None:
    """Strips then take fewer stages, or none; the result is that of the calls."""
    decoder = make()
    lean(decoder, latent())
    links = runs[0]
    runs.clear()
    change(decoder)
    z = latent()
    torch.testing.assert_close(lean(decoder, z), plain(decoder, z), atol=1e-4, rtol=1e-4)
    assert all(count < links for count in runs)


def test_batch_norms_in_training_see_the_whole_picture(runs: list[int]) -> None:
    decoder = make(CHANGES["batch norms"])
    lean(decoder, latent())
    runs.clear()
    lean(decoder.train(), latent())
    assert all(count == 2 for count in runs)
    assert not local(nn.BatchNorm2d(4), torch.float32)
    assert not local(nn.LayerNorm(4), torch.float32)
    assert not local(ChannelRMSNorm(4, 1e-5), torch.bfloat16)


def test_gradients_and_autocast_take_the_plain_way(runs: list[int]) -> None:
    decoder, z = make(), latent()
    plain(decoder, z).sum()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder(z)
    assert not runs


def test_small_pictures_are_computed_whole(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """20 by 12 pixels of 16 channels in float32."""
    monkeypatch.setattr(rows, "LARGE_STRIPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for strip, cut in ((7680, False), (7679, True)):
        monkeypatch.setattr(rows, "STRIP_BYTES", strip)
        lean(make(), latent(1))
        assert bool(runs) == cut


def test_a_chain_ends_where_a_picture_does() -> None:
    conv, norm = nn.Conv2d(3, 2, 3, padding=1), ChannelRMSNorm(2, 1e-5, bias=True)
    x = torch.randn(4, 5, 3)
    links = [Link(lambda width, following: ConvRows(conv, width, following), 2)]
    links.append(Link(lambda width, following: NormRows(norm, F.relu, False, width, following), 2))
    out = torch.empty(4, 5, 2)
    with torch.no_grad():
        send(x, links, out)
        expected = F.relu(norm(conv(x.movedim(-1, 0)[None])))[0].movedim(0, -1)
    torch.testing.assert_close(out, expected)


def test_a_window_keeps_two_rows() -> None:
    window = Window(1, 1, torch.empty(0))
    window.room(1).fill_(1)
    assert window.push(1, last=False) == 0
    window.room(2).copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1))
    assert window.push(2, last=False) == 2
    assert window.visible().flatten().tolist() == [0, 1, 2, 3]
    window.move()
    assert (window.first, window.visible().flatten().tolist()) == (1, [2, 3])
    assert window.push(0, last=True) == 1
    assert window.visible().flatten().tolist() == [2, 3, 0]


@pytest.mark.parametrize("channels", [(8, 8), (8, 4), (8, 2), (4, 8), (16, 12)])
@pytest.mark.parametrize("interpolate", [True, False])
def test_doubling_with_its_shortcut(channels: tuple[int, int], interpolate: bool) -> None:
    block = UpBlock(*channels, interpolate)
    link = block.link(torch.float32)
    x, out = torch.randn(3, 5, channels[0]), torch.empty(6, 10, channels[1])
    assert link is not None
    with torch.no_grad():
        send(x, [link], out)
        expected = block(x.movedim(-1, 0)[None])[0].movedim(0, -1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_norms_give_the_same_picture(dtype: torch.dtype, runs: list[int]) -> None:
    decoder = make().to(dtype)
    expected, latents = [], [latent(1, 5, 3, dtype), latent(2, 3, 7, dtype)]
    for z in latents:
        expected.append(lean(decoder, z))
    decoder.compile_rows()
    for z, picture in zip(latents, expected, strict=True):
        gate = (1e-5 if dtype == torch.float32 else 2e-2) * float(picture.abs().max())
        torch.testing.assert_close(lean(decoder, z), picture, atol=gate, rtol=0)
    assert len(runs) == 6
    replace_in_place(decoder)
    torch.testing.assert_close(lean(decoder, latents[0]), plain(decoder, latents[0]), atol=0.05, rtol=0.05)


def test_blocks_of_another_dtype_do_not_join() -> None:
    assert ResBlock(4).parts(torch.bfloat16) is None
    assert UpBlock(4, 4, interpolate=True).parts(torch.bfloat16) is None
