"""RMS norms and the gated convolutional feed-forward, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from sana.nn.mixffn import GLUMBConv
from sana.nn.norms import ChannelRMSNorm, RMSNorm


def drawn_norm(dim: int, bias: bool, eps: float = 1e-5) -> RMSNorm:
    torch.manual_seed(0)
    norm = RMSNorm(dim, eps, bias=bias)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return norm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_is_its_formula(bias: bool, scale: float) -> None:
    """At a scale of 1e-3 the epsilon is ten times the mean square."""
    norm = drawn_norm(12, bias)
    x = torch.randn(3, 5, 12) * scale
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    if norm.bias is not None:
        expected = expected + norm.bias.double()
    torch.testing.assert_close(norm(x), expected.float())
    assert ("bias" in norm.state_dict()) == bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_round_the_normalised_value_first(dtype: torch.dtype) -> None:
    """The mean of squares is float32: 300² in float16 would be infinite."""
    norm = drawn_norm(16, bias=False).to(dtype)
    x = (torch.randn(4, 16) * 300).to(dtype)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), normed.to(dtype) * norm.weight, rtol=0, atol=0)


def test_a_float32_weight_gives_float32() -> None:
    assert drawn_norm(4, bias=True)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_rms_norm_of_zeros_has_a_finite_gradient() -> None:
    norm = drawn_norm(4, bias=False)
    x = torch.zeros(2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (norm.weight.detach() * 1e-5**-0.5).expand(2, 4))


def test_rms_norm_gradient() -> None:
    norm = drawn_norm(5, bias=True).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channel_norm_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    last = drawn_norm(6, bias=True)
    norm = ChannelRMSNorm(6, 1e-5, bias=True)
    norm.load_state_dict(last.state_dict())
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=memory_format)
    out = norm(x)
    torch.testing.assert_close(out, last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    assert out.stride() == x.stride()


@pytest.mark.parametrize(("norm", "residual"), [(False, False), (True, False), (True, True)])
def test_feed_forward_is_its_formula(norm: bool, residual: bool) -> None:
    torch.manual_seed(0)
    ff = GLUMBConv(4, 4, expand_ratio=2.5, norm=norm, residual=residual)
    x = torch.randn(2, 4, 5, 6)
    hidden = F.silu(torch.einsum("oc,bchw->bohw", ff.conv_inverted.weight[:, :, 0, 0], x) + bias_of(ff.conv_inverted))
    padded = F.pad(hidden, (1, 1, 1, 1))
    kernel = ff.conv_depth.weight
    shifted = [padded[:, :, i : i + 5, j : j + 6] * kernel[:, 0, i, j, None, None] for i in range(3) for j in range(3)]
    depth = torch.stack(shifted).sum(0) + bias_of(ff.conv_depth)
    gated = depth[:, :10] * F.silu(depth[:, 10:])
    expected = torch.einsum("oc,bchw->bohw", ff.conv_point.weight[:, :, 0, 0], gated)
    if norm:
        expected = expected * torch.rsqrt(expected.square().mean(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(ff(x), expected + x if residual else expected)


def bias_of(conv: torch.nn.Conv2d) -> torch.Tensor:
    assert conv.bias is not None
    return conv.bias[:, None, None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_in_fewer_passes_rounds_alike(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, for rows of every size and of nothing but zeros; a strided input takes the usual way."""
    norm = drawn_norm(24, bias).to(dtype)
    ways: list[int] = []
    fewer = RMSNorm._lean
    monkeypatch.setattr(RMSNorm, "_lean", lambda self, x: ways.append(x.ndim) or fewer(self, x))
    for x in (torch.randn(7, 24), torch.randn(2, 3, 4, 24) * 1e-3, torch.randn(5, 24) * 100, torch.zeros(1, 2, 24)):
        x, before = x.to(dtype), x.to(dtype)
        expected = norm(x)
        with torch.no_grad():
            assert torch.equal(norm(x), expected)
            assert torch.equal(norm(x.mT.contiguous().mT), expected)
        assert torch.equal(x, before)
    assert ways == [2, 4, 2, 3]
