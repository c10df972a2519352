"""The gradients written by hand are those of the plain formulas, in every precision and with any part frozen."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.nn import caption_attention, linear_attention, mixffn
from sana.nn.mixffn import GLUMBConv, slices

WAYS: tuple[Any, ...] = (caption_attention, linear_attention, mixffn)
CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 24,
    "cross_attention_dim": 48,
    "caption_channels": 24,
    "sample_size": 4,
}
PRECISIONS = [(torch.float32, False, 2e-5), (torch.float32, True, 3e-2), (torch.bfloat16, True, 3e-2)]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


@contextmanager
def plain_formulas(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in WAYS:
            patch.setattr(module, "learning", lambda *_: False)
        yield


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the functions were called."""
    called: list[str] = []
    for kind in (caption_attention._CaptionAttention, linear_attention._LinearAttention, mixffn.MixRows):
        real: Callable[..., Any] = kind.apply

        def apply(*args: Any, real: Any = real, name: str = kind.__name__) -> Any:
            called.append(name)
            return real(*args)

        monkeypatch.setattr(kind, "apply", apply)
    return called


def test_gradients_are_those_of_finite_differences(by_hand: list[str]) -> None:
    q, k, v = (drawn(2, 5, 3, 4).add_(shift).requires_grad_() for shift in (0.0, 0.3, -0.2))
    assert torch.autograd.gradcheck(linear_attention.linear_attention, (q, k, v))
    bias = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    bias[1, ..., 3:] = -10000
    heads = [one.detach().transpose(1, 2).requires_grad_() for one in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: caption_attention.caption_attention(*qkv, bias), heads)
    feed = GLUMBConv(3, 2, 2.0).double()
    x = drawn(2, 3, 4, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    names = dict(feed.named_parameters())

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        return mixffn.MixRows.apply(x, *weights, torch.float64, [(0, 2), (2, 6)])  # type: ignore[no-any-return, no-untyped-call]

    assert [name.rpartition(".")[0] for name in names] == ["conv_inverted"] * 2 + ["conv_depth"] * 2 + ["conv_point"]
    assert torch.autograd.gradcheck(forward, (x, *names.values()))
    assert set(by_hand) == {"_CaptionAttention", "_LinearAttention", "MixRows"}


def gradients(model: nn.Module, cast: bool, mask: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    dtype = next(model.parameters()).dtype
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        out = model(
            drawn(2, 4, 4, 3, dtype=dtype),
            drawn(2, mask.shape[1], 24, dtype=dtype),
            torch.tensor([900.0, 20.0]),
            encoder_attention_mask=mask,
        )[0]
    loss = (out.float() - drawn(2, 4, 4, 3).flip(0).float()).square().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    # Some gradients, as that of the keys' bias, are zero but for rounding.
    largest = max(tensor.double().norm() for tensor in wanted.values())
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        error = (found[name].double() - tensor.double()).norm() / max(tensor.double().norm(), 1e-3 * largest)
        assert error < tolerance, name


@pytest.mark.parametrize("part", ["all", "to_q", "conv_depth", "conv_inverted.weight"])
@pytest.mark.parametrize(("dtype", "cast", "tolerance"), PRECISIONS)
def test_a_step_is_that_of_the_plain_formulas(
    monkeypatch: pytest.MonkeyPatch, by_hand: list[str], dtype: torch.dtype, cast: bool, tolerance: float, part: str
) -> None:
    model = SanaTransformer2DModel(**CONFIG).to(dtype).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part == "all" or part in name)
    found = gradients(model, cast, MASK)
    assert {"_CaptionAttention", "MixRows"} <= set(by_hand)
    with plain_formulas(monkeypatch):
        by_hand.clear()
        wanted = gradients(model, cast, MASK)
        assert not by_hand
    assert len(wanted) > 1
    close(found, wanted, tolerance)


@pytest.mark.parametrize("cast", [False, True])
def test_checkpointing_changes_no_bit(cast: bool) -> None:
    model = SanaTransformer2DModel(**CONFIG).train()
    wanted = gradients(model, cast, MASK)
    model.gradient_checkpointing = True
    found = gradients(model, cast, MASK)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_padding_texts_further_changes_nothing() -> None:
    model = SanaTransformer2DModel(**CONFIG).train()
    short, long = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.zeros(2, 9, dtype=torch.int64)
    long[:, :3] = short
    embeds = drawn(2, 9, 24, dtype=torch.float32)
    found = []
    for mask in (short, long):
        model.zero_grad()
        told = embeds[:, : mask.shape[1]]
        out = model(
            drawn(2, 4, 4, 3, dtype=torch.float32), told, torch.tensor([900.0, 20.0]), encoder_attention_mask=mask
        )[0]
        out.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    close(found[0], found[1], 2e-5)


def test_forward_mode_goes_the_plain_way(by_hand: list[str]) -> None:
    model = SanaTransformer2DModel(**CONFIG).double().train()
    text, along = drawn(2, 5, 24), drawn(2, 4, 4, 3).flip(0)

    def velocity(x: Tensor) -> Tensor:
        out: Tensor = model(x, text, torch.tensor([900.0, 20.0], dtype=torch.float64))[0]
        return out

    x = drawn(2, 4, 4, 3)
    value, slope = torch.func.jvp(velocity, (x,), (along,))
    assert not by_hand
    difference = (velocity(x + 1e-5 * along) - velocity(x - 1e-5 * along)).detach() / 2e-5
    torch.testing.assert_close(slope, difference, rtol=0, atol=1e-4)
    assert value.shape == slope.shape


def test_layers_with_hooks_or_adapters_are_called(by_hand: list[str]) -> None:
    feed = GLUMBConv(8, 8, 2.0)
    x = drawn(1, 8, 3, 3, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    handle = feed.conv_depth.register_forward_hook(lambda _layer, _given, out: seen.append(out))
    hooked = feed(x)
    assert len(seen) == 1
    assert not by_hand
    handle.remove()
    torch.testing.assert_close(feed(x), hooked, rtol=0, atol=1e-6)
    assert by_hand == ["MixRows"]


def test_the_feed_forward_keeps_less_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = GLUMBConv(64, 64, 2.5).requires_grad_(False)
    x = drawn(1, 64, 8, 8, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()

    def kept() -> int:
        places: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            places[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = copy.copy(feed)(x)
        assert out.requires_grad
        return sum(places.values())

    ours = kept()
    with plain_formulas(monkeypatch):
        assert ours < 0.75 * kept()
    assert slices(160, torch.float32) == [(0, 160)]
