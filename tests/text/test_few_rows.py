"""Linear layers with the weight first: the same sums, only where they are meant to be."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sana.text.few_rows import MAX_ROWS, FewRows
from sana.text.gemma import PromptEncoder
from text.tiny_gemma import INSTRUCTION, tiny_gemma, tiny_tokenizer

ROUNDING = 2.0**-8


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the inputs that took the other road."""
    from sana.text import few_rows

    plain, shapes = few_rows._swapped, []

    def noted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return plain(x, weight)

    monkeypatch.setattr(few_rows, "_swapped", noted)
    return shapes


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 5), (3, 1), (60,), (), (2, 2, 3)])
@pytest.mark.parametrize("widths", [(32, 24), (32, 32), (16, 80)])
def test_equals_the_plain_layer(
    shape: tuple[int, ...], widths: tuple[int, int], swapped: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, widths[0], generator=generator).bfloat16()
    layer = nn.Linear(*widths, bias=False).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        with FewRows():
            found = layer(x)
    assert swapped == [(*shape, widths[0])]
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), rtol=ROUNDING, atol=ROUNDING)


class Marked(torch.Tensor):
    """A weight of its own kind, as quantised ones are."""


@pytest.mark.parametrize("case", ["gradients", "float32", "bias", "many rows", "weight of its own kind", "no rows"])
def test_leaves_other_layers_alone(case: str, swapped: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(8, 6, bias=case == "bias").to(torch.float32 if case == "float32" else torch.bfloat16)
    rows = {"many rows": MAX_ROWS + 1, "no rows": 0}.get(case, 4)
    x = torch.ones(rows, 8, dtype=layer.weight.dtype)
    weight = layer.weight.detach().as_subclass(Marked) if case.startswith("weight") else layer.weight
    with torch.set_grad_enabled(case == "gradients"), FewRows():
        found = F.linear(x, weight, layer.bias)
    assert not swapped
    assert torch.equal(found.detach().as_subclass(torch.Tensor), layer(x).detach())
    if case == "gradients":
        found.sum().backward()
        assert layer.weight.grad is not None


def test_a_prompt_takes_it_and_stays_as_near_to_float32(swapped: list[tuple[int, ...]], monkeypatch: Any) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma(len(tokenizer), dtype=torch.bfloat16)
    golden = PromptEncoder(tokenizer, copy.deepcopy(model).float()).encode(["a red fox"], INSTRUCTION).embeds
    assert not swapped

    def far() -> float:
        embeds = PromptEncoder(tokenizer, model).encode(["a red fox"], INSTRUCTION).embeds
        return float((embeds.float() - golden).square().mean().sqrt())

    ours = far()
    assert swapped
    monkeypatch.setattr("sana.text.few_rows._applies", lambda *_: False)
    assert ours <= 1.1 * far()


def test_a_replaced_layer_and_a_hook_are_met(swapped: list[tuple[int, ...]]) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_gemma(len(tokenizer), dtype=torch.bfloat16)
    encoder = PromptEncoder(tokenizer, model)
    before = encoder.encode(["a red fox"]).embeds
    handle = model.layers[0].mlp.down_proj.register_forward_hook(lambda *arguments: arguments[2].flip(-1))
    encoder.clear()
    hooked = encoder.encode(["a red fox"]).embeds
    assert not torch.equal(hooked, before)
    handle.remove()
    model.layers[1].mlp.down_proj = nn.Linear(48, 32, bias=False).bfloat16()
    replaced = encoder.encode(["a red fox"]).embeds
    assert not torch.equal(replaced, hooked)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.neg_()
    assert not torch.equal(encoder.encode(["a red fox"]).embeds, replaced)
