"""The faster ways of plain inference: the same numbers, and never where they would be wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana.models.linear_dit import modulate, modulated_norm
from sana.nn import mixffn
from sana.nn.attention import linear_attention
from sana.nn.inference import bare, inference, lean, unhooked
from sana.nn.mixffn import HALF_COLUMNS, GLUMBConv, slices

WAYS: dict[str, dict[str, Any]] = {"transformer": {}, "autoencoder": {"norm": True, "residual": True}}


def block(ratio: float = 3.0, **options: Any) -> GLUMBConv:
    torch.manual_seed(0)
    return GLUMBConv(24, 24, ratio, **options).eval()


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 24, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return x.to(dtype, memory_format=torch.channels_last)


def plain(module: GLUMBConv, x: Tensor) -> Tensor:
    """The way with gradients."""
    with torch.enable_grad():
        return module(x).detach()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Note the inputs that go the way of rows."""
    seen: list[Tensor] = []
    original = GLUMBConv._mix_rows
    monkeypatch.setattr(GLUMBConv, "_mix_rows", lambda self, x: seen.append(x) or original(self, x))
    return seen


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("dtype", "gate"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rows_give_the_numbers_of_convolutions(
    options: dict[str, Any], dtype: torch.dtype, gate: float, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixffn, "HALF_COLUMNS", 64)  # 72 hidden channels: a whole slice and a short one
    module, x = block(**options).to(dtype), image(dtype)
    before = x.clone()
    with torch.no_grad():
        found = module(x)
    expected = plain(module, x)
    assert len(rows) == 1
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) < gate
    assert torch.equal(x, before)


def test_convolutions_where_rows_would_be_wrong(rows: list[Tensor]) -> None:
    calls: list[str] = []
    x = image()
    with torch.no_grad():
        block()(x.contiguous())  # rows would be a copy
        with torch.autocast("cpu", torch.bfloat16):
            block()(x)
        block().double()(x.double().requires_grad_())
        for name in ("conv_inverted", "conv_depth", "conv_point"):
            hooked = block()
            getattr(hooked, name).register_forward_hook(lambda *_, name=name: calls.append(name))
            hooked(x)
            offloaded = block()
            layer = getattr(offloaded, name)
            layer.forward = lambda x, name=name, layer=layer: calls.append(name) or type(layer).forward(layer, x)
            offloaded(x)
            adapted = block()
            setattr(adapted, name, nn.Sequential(getattr(adapted, name)))
            adapted(x)
    block()(x)
    assert len(rows) == 1
    assert rows[0].dtype == torch.float64
    assert calls == [name for name in ("conv_inverted", "conv_depth", "conv_point") for _ in range(2)]


def test_new_weights_are_seen(rows: list[Tensor]) -> None:
    module, other, x = block(), block(), image()
    with torch.no_grad():
        first = module(x)
        for name in ("conv_inverted", "conv_depth", "conv_point"):
            getattr(module, name).weight.mul_(2)
            doubled = module(x)
            assert not torch.allclose(doubled, first)
            assert torch.allclose(doubled, plain(module, x), atol=1e-6)
            getattr(module, name).weight = nn.Parameter(getattr(other, name).weight.clone())
            assert torch.equal(module(x), first)
        module.load_state_dict({name: value * 2 for name, value in other.state_dict().items()})
        assert torch.allclose(module(x), plain(module, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(module.bfloat16()(image(torch.bfloat16)), module(image(torch.bfloat16)))
    assert len(rows) == 10


@pytest.mark.parametrize("channels", [8, 64, 576, 2048, 2880, 5600])
def test_slices_cover_all_channels_once(channels: int) -> None:
    assert slices(channels, torch.float32) == [(0, channels)]
    cut = slices(channels, torch.bfloat16)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == channels
    assert all(stop - start <= HALF_COLUMNS for start, stop in cut)
    assert all((stop - start) % 64 == 0 for start, stop in cut[:-1])


def test_what_is_plain_inference() -> None:
    x = torch.zeros(1)
    assert not lean(x)
    with torch.no_grad():
        assert lean(x)
        assert inference(x)
        assert not lean(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not lean(x)
    layer = nn.Linear(2, 2)
    assert bare(torch.float32, layer)
    assert not bare(torch.bfloat16, layer)
    assert not bare(torch.float32, nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert unhooked(layer)
    layer.register_forward_pre_hook(lambda *_: None)
    assert not unhooked(layer)
    assert not bare(torch.float32, layer)


def test_compiled_code_is_told_apart() -> None:
    seen: list[tuple[bool, bool]] = []

    def probe(x: Tensor) -> Tensor:
        seen.append((lean(x), inference(x)))
        return x + 1

    with torch.no_grad():
        torch.compile(probe, backend="eager")(torch.zeros(1))
    torch.compiler.reset()
    assert seen == [(False, True)]


@pytest.mark.parametrize("heads", [1, 3])
def test_linear_attention_leaves_its_inputs(heads: int) -> None:
    """With one head, or one token, the reordered tensor could be the same memory."""
    for tokens in (1, 4):
        x = [torch.randn(1, tokens, heads, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        before = [tensor.clone() for tensor in x]
        linear_attention(*x)
        assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_shared_modulation_is_part_of_the_norm() -> None:
    norm, x = nn.LayerNorm(16, elementwise_affine=False, eps=1e-6), torch.randn(2, 5, 16)
    shift, scale = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    expected = modulate(norm(x), shift, scale)
    assert torch.allclose(modulated_norm(norm, x, shift, scale), expected, atol=1e-6)
    twice = (shift.expand(2, 1, 16), scale.expand(2, 1, 16))
    assert torch.equal(modulated_norm(norm, x, *twice), expected)
    affine = nn.LayerNorm(16)
    nn.init.normal_(affine.weight)
    assert torch.equal(modulated_norm(affine, x, shift, scale), modulate(affine(x), shift, scale))
    calls: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, out: calls.append(out))
    modulated_norm(norm, x, shift, scale)
    assert len(calls) == 1


def test_a_padding_that_makes_pictures_tile_is_honoured() -> None:
    module = block()
    zeros = plain(module, image())
    module.conv_depth.padding_mode = "circular"
    circular = plain(module, image())
    assert not torch.allclose(circular, zeros, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(module(image()), circular.detach(), rtol=1e-5, atol=1e-5)
    assert not bare(torch.float32, nn.Conv2d(4, 4, 3, stride=2))
    assert not bare(torch.float32, nn.Conv2d(4, 4, 3, dilation=2))


def test_a_hook_on_all_modules_is_honoured() -> None:
    layer = nn.Linear(2, 2)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: out)
    try:
        assert not unhooked(layer)
    finally:
        handle.remove()
    assert unhooked(layer)
