"""The attentions and embeddings against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from sana.nn.attention import CrossAttention, LinearSelfAttention, head_norm, text_bias
from sana.nn.embeddings import PatchEmbed, TimeEmbed, position_table, sinusoid
from sana.nn.linear_attention import linear_attention


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same attention with explicit weights, in float64: [B, N, A, K]."""
    weights = torch.einsum("bnak,bmak->banm", q.double().relu(), k.double().relu())
    return torch.einsum("banm,bmak->bnak", weights / (weights.sum(-1, keepdim=True) + 1e-15), v.double())


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_linear_attention_is_the_quadratic_form(tokens: int) -> None:
    q, k, v = (draw(2, tokens, 3, 16, seed=seed) for seed in range(3))
    assert torch.allclose(linear_attention(q, k, v).double(), quadratic(q, k, v), rtol=0, atol=2e-6)


def test_linear_attention_of_a_query_without_positive_part_is_zero() -> None:
    q, k, v = (draw(1, 4, 1, 8, seed=seed) for seed in range(3))
    q[:, 2] = -q[:, 2].abs()
    out = linear_attention(q, k, v)
    assert not out[:, 2].any()
    assert out[:, [0, 1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_attention_sums_in_float32(dtype: torch.dtype) -> None:
    # Large enough for every sum over the tokens to leave the range of float16.
    q, k, v = (draw(1, 256, 2, 32, scale=30.0, seed=seed).to(dtype) for seed in range(3))
    expected = quadratic(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(q, k, v)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e-4)


def summed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The attention [B, N, A, K] and its denominators [B, N, A, 1], every sum kept in the dtype that is given."""
    q, k, v = q.relu().transpose(1, 2), k.relu().transpose(1, 2), v.transpose(1, 2)
    weights = q @ k.sum(2, keepdim=True).mT
    return (q @ (k.mT @ v) / weights).transpose(1, 2), weights.transpose(1, 2)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("tokens", "scale", "largest"), [(1024, 1.0, 1.0e4), (16384, 1.0, 1.7e5), (1024, 4.0, 1.7e5)], ids=str
)
def test_sums_that_leave_the_range_of_half_precision_do_no_harm(tokens: int, scale: float, largest: float) -> None:
    """Algorithms 1.8: the largest sum of unit-normal heads of width 32, whose float16 ends at 65504."""
    given = [draw(1, tokens, 4, 32, scale=scale, seed=seed).half() for seed in range(3)]
    expected, weights = summed(*(one.double() for one in given))
    assert float(weights.max()) == pytest.approx(largest, rel=0.15)
    assert bool(weights.half().isinf().any()) == (largest > 65504)
    assert relative(linear_attention(*given), expected) < 5e-7


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.00042), (torch.bfloat16, 0.0033)])
def test_sums_in_half_precision_would_cost_what_was_measured(dtype: torch.dtype, error: float) -> None:
    """Algorithms 1.8: 0.042% in float16 and 0.33% in bfloat16, of which nothing is left but the rounding of inputs."""
    given = [draw(1, 1024, 4, 32, seed=seed).to(dtype) for seed in range(3)]
    expected, _ = summed(*(draw(1, 1024, 4, 32, seed=seed).double() for seed in range(3)))
    assert relative(summed(*given)[0], expected) == pytest.approx(error, rel=0.1)
    assert relative(linear_attention(*given), expected) < 0.65 * error
    assert relative(linear_attention(*given), summed(*(one.double() for one in given))[0]) < 5e-7


def test_linear_attention_weights_are_a_convex_combination() -> None:
    q, k = draw(1, 9, 2, 8), draw(1, 9, 2, 8, seed=1)
    assert torch.allclose(linear_attention(q, k, torch.ones(1, 9, 2, 8)), torch.ones(1, 9, 2, 8))


def test_text_bias() -> None:
    bias = text_bias(torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.float32)
    assert bias.shape == (2, 1, 1, 3)
    assert bias.flatten(1).tolist() == [[0, 0, -10000], [0, 0, 0]]
    ready = draw(2, 1, 3)
    assert torch.equal(text_bias(ready, torch.float32)[:, 0], ready)
    assert torch.isfinite(text_bias(torch.tensor([[1, 0]]), torch.float16)).all()


def test_cross_attention_is_softmax_attention() -> None:
    layer = CrossAttention(12, heads=2, head_dim=5, dropout=0.0, qk_norm=None).double()
    x, caption = draw(2, 7, 12).double(), draw(2, 4, 12, seed=1).double()
    with torch.no_grad():
        out = layer(x, layer.key_value(caption), None)
        q, k, v = (
            linear(source).view(2, -1, 2, 5)
            for linear, source in ((layer.to_q, x), (layer.to_k, caption), (layer.to_v, caption))
        )
        weights = (torch.einsum("bnak,btak->bant", q, k) / math.sqrt(5)).softmax(-1)
        expected = layer.to_out[0](torch.einsum("bant,btak->bnak", weights, v).flatten(2))
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["rms_norm_across_heads", "layer_norm_across_heads", "l2"])
def test_head_norms_span_all_heads(kind: str) -> None:
    norm = head_norm(kind, 16)
    assert norm is not None
    normed = norm(draw(3, 5, 16, scale=7.0))
    length = 1.0 if kind == "l2" else 4.0
    assert torch.allclose(normed.norm(dim=-1), torch.full((3, 5), length), rtol=1e-4)
    layer = LinearSelfAttention(16, heads=2, head_dim=8, bias=False, dropout=0.0, qk_norm=kind)
    names = {name.split(".")[0] for name in layer.state_dict()}
    assert ("norm_q" in names) == (kind != "l2")


def test_linear_self_attention_clips_float16_only() -> None:
    for dtype, bound in ((torch.float16, 65504.0), (torch.bfloat16, math.inf)):
        layer = LinearSelfAttention(8, heads=1, head_dim=8, bias=False, dropout=0.0, qk_norm=None).to(dtype)
        with torch.no_grad():
            layer.to_out[0].weight.fill_(3e4)  # type: ignore[operator]
            out = layer(draw(1, 6, 8, scale=100.0).to(dtype))
        assert out.abs().max() <= bound
        assert out.abs().max() >= 65504


def test_sinusoid() -> None:
    out = sinusoid(torch.tensor([0, 5, 999]))
    assert out.shape == (3, 256)
    assert out.dtype == torch.float32
    assert out[0].tolist() == [1.0] * 128 + [0.0] * 128
    frequency = 10000 ** (-77 / 128)
    assert out[1, 77].item() == pytest.approx(math.cos(5 * frequency), abs=1e-6)
    assert out[1, 128 + 77].item() == pytest.approx(math.sin(5 * frequency), abs=1e-6)


def test_position_table_closed_form() -> None:
    height, width, dim, base, scale = 3, 6, 16, 8, 2.0
    table = position_table(height, width, dim, base, scale).view(height, width, dim)
    for row, column, k in ((0, 0, 0), (2, 5, 1), (1, 3, 3)):
        p_row, p_column = row * base / height / scale, column * base / width / scale
        omega = 10000 ** (-k / (dim / 4))
        expected = [f(p * omega) for p in (p_column, p_row) for f in (math.sin, math.cos)]
        found = [table[row, column, half * 8 + part * 4 + k].item() for half in (0, 1) for part in (0, 1)]
        assert found == pytest.approx(expected, abs=1e-6)


def test_patch_embed_orders_tokens_by_row() -> None:
    embed = PatchEmbed(2, 4, 2)
    with torch.no_grad():
        embed.proj.weight.zero_()
        embed.proj.weight[0, 0, 0, 1] = 1.0
        assert embed.proj.bias is not None
        embed.proj.bias.zero_()
        tokens = embed(torch.arange(48.0).view(1, 2, 4, 6))
    assert tokens.shape == (1, 6, 4)
    assert tokens.is_contiguous()
    assert tokens[0, :, 0].tolist() == [1, 3, 5, 13, 15, 17]


def test_time_embed_names() -> None:
    plain, guided = set(TimeEmbed(8, guidance=False).state_dict()), set(TimeEmbed(8, guidance=True).state_dict())
    assert "emb.timestep_embedder.linear_1.weight" in plain
    assert {"timestep_embedder.linear_1.weight", "guidance_embedder.linear_2.bias"} <= guided
    assert not any(name.startswith("emb.") for name in guided)
