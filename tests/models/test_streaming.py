"""Large pictures in strips of rows: the numbers of the whole picture, no more work, never a tensor that is too large.

Everything here compares with the way that has gradients, which computes whole pictures layer by layer.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sana.cards import CARDS
from sana.checkpoints.autoencoder import AutoencoderDC
from sana.models.dc_ae import STREAMED_PIXELS, DCAutoencoder
from sana.nn import rows

PUBLISHED = CARDS["sana-0.6b-1024"].autoencoder
TINY: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (16, 32, 32),
    "decoder_block_out_channels": (16, 32, 32),
    "encoder_layers_per_block": (1, 2, 2),
    "decoder_layers_per_block": (2, 1, 2),
    "encoder_qkv_multiscales": ((), (), (3, 5)),
    "decoder_qkv_multiscales": ((), (), (3, 5)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
}
SHUFFLED = {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}
NO_FULL_STAGE = {"encoder_layers_per_block": (0, 1, 1), "decoder_layers_per_block": (0, 1, 1)}
ATTENTION = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
CHANGES: dict[str, dict[str, Any]] = {
    "published": {},
    "shuffled": SHUFFLED,
    "no stage at full size": NO_FULL_STAGE,
    "shuffled, no stage at full size": SHUFFLED | NO_FULL_STAGE,
    "more attention": {"encoder_block_types": ATTENTION, "decoder_block_types": "EfficientViTBlock"},
    "batch norms": {"decoder_norm_types": "batch_norm", "decoder_act_fns": "relu"},
    "rows only": {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"},
}
SIZES = [(1, 1, 1), (2, 5, 3), (1, 7, 4), (1, 16, 9)]


def make(changes: dict[str, Any] | None = None) -> AutoencoderDC:
    torch.manual_seed(0)
    model = AutoencoderDC(**(TINY | (changes or {}))).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def latent(batch: int, height: int, width: int, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def whole(model: DCAutoencoder, part: str, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return getattr(model, f"_{part}")(x).detach()


def streamed(model: AutoencoderDC, part: str, x: Tensor, *, frugal: bool = False) -> Tensor:
    model.enable_streaming(frugal=frugal)
    with torch.no_grad():
        return getattr(model, part)(x, return_dict=False)[0]


def assert_same(found: Tensor, expected: Tensor, gate: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=gate * float(expected.abs().max()), rtol=0)


class Ways:
    """Counts which networks were computed in strips."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams = 0
        original = rows.stream

        def stream(*args: Any, **kwargs: Any) -> Tensor:
            self.streams += 1
            return original(*args, **kwargs)

        monkeypatch.setattr("sana.models.dc_ae.stream", stream)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


@pytest.mark.parametrize("strip", [1, 3_000, 1 << 22], ids=["one row", "some", "all"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_strips_give_the_whole_picture_and_its_latent(
    changes: dict[str, Any], strip: int, ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "STRIP_BYTES", strip)
    model = make(changes)
    for size in SIZES:
        z = latent(*size)
        expected = whole(model, "decode", z)
        x = torch.tanh(expected)
        back, before = whole(model, "encode", x), (z.clone(), x.clone())
        for frugal in (False, True):
            picture = streamed(model, "decode", z, frugal=frugal)
            assert_same(picture, expected)
            assert_same(streamed(model, "encode", x, frugal=frugal), back)
        assert picture.stride() == torch.empty(picture.shape, memory_format=torch.channels_last).stride()
        assert torch.equal(z, before[0])
        assert torch.equal(x, before[1])
    assert ways.streams == 4 * sum(size[0] for size in SIZES)


def test_the_encoder_takes_strips_of_large_pictures_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the budget, for speed: only the stages without attention."""
    monkeypatch.setattr(rows, "LARGE_STRIPS", 0)
    monkeypatch.setattr(rows, "STRIP_BYTES", 3_000)
    for changes in CHANGES.values():
        model, x = make(changes), latent(2, 28, 20, channels=3)
        with torch.no_grad():
            assert_same(model.encode(x).latent, whole(model, "encode", x))


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("part", ["encode", "decode"])
def test_bfloat16_is_no_further_from_float32(part: str, frugal: bool) -> None:
    model = make()
    x = latent(2, 36, 28, channels=3) if part == "encode" else latent(2, 36, 28)
    exact = whole(model, part, x)
    model, x = model.bfloat16(), x.bfloat16()
    found = streamed(model, part, x, frugal=frugal), whole(model, part, x)
    errors = [float((one.float() - exact).square().mean().sqrt()) for one in found]
    assert found[0].dtype == torch.bfloat16
    assert 0 < errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("width", [6, pytest.param(128, marks=pytest.mark.slow)])
def test_a_picture_of_4096_px_has_no_seams(width: int) -> None:
    """The published stages at a fraction of their width: strips join without a trace, blended tiles do not."""
    narrow = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (4, 4, 8, 32, 32, 32))
    layers = dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1,) * 6)
    torch.manual_seed(0)
    config = {**PUBLISHED.to_dict(), **narrow, **layers, "latent_channels": 4}
    model = AutoencoderDC(**config).eval()
    z = latent(1, 128, width)
    with torch.no_grad():
        model.disable_streaming()
        plain = model.decoder
        expected = plain.conv_out(plain.act(plain.norm_out(stages(plain, z))))
        model.enable_streaming()
        picture = model.decode(z).sample
        assert_same(picture, expected)
        assert_same(model.encode(picture).latent, model.encoder._last(down(model.encoder, picture)))
        model.enable_tiling(1024, 1024, 896, 896)
        tiled = model.decode(z).sample
    assert float((tiled - expected).abs().max()) > 100 * float((picture - expected).abs().max())


def stages(decoder: Any, z: Tensor) -> Tensor:
    """The stages of a decoder, whole pictures, without keeping anything for gradients."""
    x = decoder._first(z)
    for stage in reversed(decoder.up_blocks):
        x = stage(x)
    return x


def down(encoder: Any, x: Tensor) -> Tensor:
    x = encoder.conv_in(x.contiguous(memory_format=torch.channels_last))
    for stage in encoder.down_blocks:
        x = stage(x)
    return x


def test_it_is_on_by_itself_above_a_number_of_pixels(ways: Ways) -> None:
    model = make()
    assert model.streaming_min_pixels == STREAMED_PIXELS == 2 << 20
    model.enable_streaming(min_pixels=4 * 4 * 16)
    with torch.no_grad():
        model.decode(latent(1, 4, 4))
        model.encode(latent(1, 16, 16, channels=3))
        assert ways.streams == 0
        model.decode(latent(2, 4, 4))
        assert ways.streams == 2  # all pictures of a call count
        model.encode(latent(1, 16, 20, channels=3))
        assert ways.streams == 3
        model.disable_streaming()
        model.decode(latent(2, 16, 16))
        model.encode(latent(2, 64, 64, channels=3))
        assert ways.streams == 3
        model.enable_streaming()
        model.enable_tiling(32, 32, 16, 16)
        tiled = model.decode(latent(1, 9, 9)).sample
        model.disable_streaming()
        assert_same(tiled, model.decode(latent(1, 9, 9)).sample)  # tiles go first


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_gradients_and_autocast_see_the_whole_picture(part: str, ways: Ways) -> None:
    model = make().train()
    model.enable_streaming()
    x = latent(1, 12, 12, channels=3) if part == "encode" else latent(1, 12, 12)
    getattr(model, part)(x, return_dict=False)[0].square().mean().backward()
    network = model.encoder if part == "encode" else model.decoder
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        getattr(model, part)(x)
    assert ways.streams == 0


def hook_attention(network: Any, stage: nn.Sequential) -> None:
    stage[-1].attn.register_forward_hook(lambda module, args, out: 2 * out)


def hook_feed_forward(network: Any, stage: nn.Sequential) -> None:
    stage[-1].conv_out.conv_depth.register_forward_hook(lambda module, args, out: 2 * out)


def hook_a_block(network: Any, stage: nn.Sequential) -> None:
    stage[-1].register_forward_hook(lambda module, args, out: 2 * out)


def hook_a_stage(network: Any, stage: nn.Sequential) -> None:
    stage.register_forward_hook(lambda module, args, out: 2 * out)


def hook_a_projection(network: Any, stage: nn.Sequential) -> None:
    stage[-1].attn.to_qkv_multiscale[0].proj_in.register_forward_hook(lambda module, args, out: out + 1)


def hook_the_last_convolution(network: Any, stage: nn.Sequential) -> None:
    network.conv_out.register_forward_hook(lambda module, args, out: 2 * out)


def hook_the_first_convolution(network: Any, stage: nn.Sequential) -> None:
    network.conv_in.register_forward_hook(lambda module, args, out: 2 * out)


HOOKS: list[Callable[[Any, nn.Sequential], None]] = [
    hook_attention,
    hook_feed_forward,
    hook_a_block,
    hook_a_stage,
    hook_a_projection,
    hook_the_last_convolution,
    hook_the_first_convolution,
]


@pytest.mark.parametrize("change", HOOKS)
def test_layers_that_are_more_than_their_weights_are_called(
    change: Callable[[Any, nn.Sequential], None], ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They alone see the whole picture; the others go on in strips."""
    monkeypatch.setattr(rows, "STRIP_BYTES", 3_000)
    model = make()
    for part, x in (("encode", latent(1, 28, 20, channels=3)), ("decode", latent(1, 7, 5))):
        network: Any = model.encoder if part == "encode" else model.decoder
        plain = whole(model, part, x)
        change(network, network.down_blocks[-1] if part == "encode" else network.up_blocks[-1])
        expected = whole(model, part, x)
        assert (expected - plain).abs().max() > 1e-3
        assert_same(streamed(model, part, x), expected)
    assert ways.streams == 2


def test_a_network_with_hooks_is_called(ways: Ways) -> None:
    model, seen = make(), []
    model.decoder.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    streamed(model, "decode", latent(1, 4, 4))
    assert len(seen) == 1
    assert ways.streams == 0
    assert not model.can_stream("decoder")
    assert model.can_stream("encoder")
    model.encoder.down_blocks[0][0].conv1.register_forward_hook(lambda module, args, out: out)
    assert not model.can_stream("encoder")


def test_compiled_forms_give_the_same(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled norms join the strips; a network compiled as a whole is not used for what is too large for it."""
    model, z = make(), latent(1, 7, 5)
    expected = whole(model, "decode", z)
    rest = copy.deepcopy(model)
    model.decoder.compile_rows()
    assert_same(streamed(model, "decode", z), expected)
    monkeypatch.setattr(rest.decoder, "_compiled_call_impl", None)
    rest.decoder._compiled_call_impl = lambda *args: pytest.fail("the compiled decoder was called")
    assert_same(streamed(rest, "decode", z), expected)
    assert ways.streams == 2


def on_meta() -> AutoencoderDC:
    with torch.device("meta"):
        return AutoencoderDC(**PUBLISHED.to_dict()).eval().bfloat16()


class Work(TorchDispatchMode):
    """Counts operations of products and convolutions; the counter of torch hooks every module, which alters the way."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_the_arithmetic_is_that_of_the_whole_picture(part: str) -> None:
    """At most 1.15 times, with the least memory; without, the decoder saves by its kernels for doubling."""
    model = on_meta()
    shape = (1, 3, 512, 512) if part == "encode" else (1, 32, 16, 16)
    x, flops = torch.empty(shape, dtype=torch.bfloat16, device="meta"), []
    for way in (whole, streamed, lambda *args: streamed(*args, frugal=True)):
        with Work() as work:
            way(model, part, x)
        flops.append(work.flops)
    assert flops[0] == pytest.approx({"encode": 1.295e12, "decode": 2.092e12}[part], rel=0.01)
    assert flops[1] <= {"encode": 1.001, "decode": 0.90}[part] * flops[0]
    assert flops[1] < flops[2] <= 1.15 * flops[0]


MAKES = {torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format, torch.ops.aten.new_zeros.default}


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that is computed with, views included, and how far its last element lies."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.reach = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func not in MAKES:
            for one in tree_leaves((args, kwargs, out)):
                if isinstance(one, Tensor) and one.numel():
                    self.elements = max(self.elements, one.numel())
                    last = sum((size - 1) * step for size, step in zip(one.shape, one.stride(), strict=True))
                    self.reach = max(self.reach, last)
        return out


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_no_index_needs_more_than_32_bits(part: str) -> None:
    """At 4096 px, or 8192 by 2048, the stage at full size has 2^31 elements as a whole.

    Strips are views that begin where they begin: what a kernel counts from there on is bounded by the strip, as long as
    one row of it is.
    """
    layers = dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), (1,) * 6)
    with torch.device("meta"):
        model = AutoencoderDC(**{**PUBLISHED.to_dict(), **layers}).eval().bfloat16()
    shape = (1, 3, 8192, 2048) if part == "encode" else (1, 32, 256, 64)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    found = []
    for way in (streamed, whole):
        with Largest() as largest:
            way(model, part, x)
        found.append((largest.elements, largest.reach))
    assert max(found[0]) < 2**28
    assert max(found[1]) >= 2**31 - 1
