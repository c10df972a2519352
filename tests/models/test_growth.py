"""Growing a transformer: what each strategy promises, to the last bit where it promises it."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sana.errors import InvalidInput
from sana.models.growth import STRATEGIES, Growth, grow, near_identity
from sana.models.linear_dit import LinearDiT
from sana.models.pruning import prune
from tiny_model import lively, tiny_transformer

NORMED = "rms_norm_across_heads"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    return latents, torch.randn(2, 5, 32, generator=generator), torch.tensor([200.0, 900.0])


def small(num_layers: int = 3, qk_norm: str | None = NORMED) -> Any:
    return tiny_transformer(num_layers=num_layers, qk_norm=qk_norm)


@torch.no_grad()
def answer(model: LinearDiT) -> Tensor:
    return model(*inputs(), return_dict=False)[0]


def grown(model: LinearDiT, layers: int, **settings: Any) -> LinearDiT:
    made = copy.deepcopy(model)
    grow(made, Growth(layers=layers, **settings))
    return made


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_grown_model_has_the_depth_and_the_rest_of_the_old_one(name: str) -> None:
    old = small()
    new = grown(old, 6, strategy=name)
    assert (new.config.num_layers, len(new.transformer_blocks), old.config.num_layers) == (6, 6, 3)
    before, after = old.state_dict(), new.state_dict()
    outside = [key for key in before if not key.startswith("transformer_blocks.")]
    assert all(torch.equal(before[key], after[key]) for key in outside)
    assert type(new) is type(old)
    rebuilt = type(new).from_config(new.config)
    rebuilt.load_state_dict(after, strict=True)
    assert torch.isfinite(answer(new)).all()
    assert bool(torch.equal(answer(new), answer(old))) is STRATEGIES[name].identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, one in STRATEGIES.items() if one.identity])
def test_a_strategy_that_promises_identity_keeps_it_in_every_precision_and_learns(
    name: str, dtype: torch.dtype
) -> None:
    old = small().to(dtype)
    new = grown(old, 6, strategy=name)
    arguments = [tensor.to(dtype) for tensor in inputs()]
    one, other = (model(*arguments, return_dict=False)[0] for model in (old, new))
    assert torch.equal(one, other)
    other.float().square().sum().backward()
    ends = [block.ff.conv_point.weight for block in new.transformer_blocks]
    assert all(end.dtype == dtype and end.grad is not None and end.grad.abs().sum() > 0 for end in ends)


def test_partial_preservation_is_the_model_without_its_last_blocks() -> None:
    old = small(4)
    shorter = copy.deepcopy(old)
    prune(shorter, range(2))
    assert torch.equal(answer(grown(old, 9, keep=2)), answer(shorter))
    assert not torch.equal(answer(shorter), answer(old))


def test_copies_stand_where_the_strategy_says() -> None:
    old = small()
    marks = [block.attn1.to_q.weight for block in old.transformer_blocks]

    def order(**settings: Any) -> list[int]:
        blocks = grown(old, 6, gate=False, **settings).transformer_blocks
        return [next(i for i, mark in enumerate(marks) if torch.equal(mark, b.attn1.to_q.weight)) for b in blocks]

    assert order(strategy="cyclic") == [0, 1, 2, 0, 1, 2]
    assert order(strategy="block_expand") == [0, 0, 1, 1, 2, 2]
    assert not torch.equal(answer(grown(old, 6, strategy="cyclic", gate=False)), answer(old))


def test_interpolation_blends_the_two_blocks_around() -> None:
    old = small(3)
    first, second, third = (block.attn2.to_k.weight for block in old.transformer_blocks)
    blocks = grown(old, 5, strategy="interpolation").transformer_blocks
    for block, expected in zip(blocks, [first, (first + second) / 2, second, (second + third) / 2, third], strict=True):
        torch.testing.assert_close(block.attn2.to_k.weight, expected)


def test_progressive_blocks_differ_from_the_one_before_by_a_hundredth() -> None:
    blocks = grown(small(2), 5, strategy="progressive").transformer_blocks
    for before, after in pairwise(list(blocks)[1:]):
        steps = torch.cat([(b - a).flatten() for a, b in zip(before.parameters(), after.parameters(), strict=True)])
        assert float(steps.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_a_near_identity_block_is_drawn_as_published() -> None:
    config = small().config
    block = near_identity(config, torch.Generator().manual_seed(0))
    zero = {name for name, weight in block.named_parameters() if not weight.any()}
    assert zero >= {"attn1.to_out.0.weight", "attn2.to_out.0.weight", "ff.conv_point.weight", "attn2.to_q.bias"}
    assert float(block.ff.conv_depth.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert float(block.attn1.to_q.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert block.attn1.norm_q.weight.tolist() == [1.0] * config.inner_dim
    again = near_identity(config, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), again.parameters(), strict=True))


def test_the_norms_of_queries_and_keys_are_added_with_gain_1_where_asked() -> None:
    plain = lively(small(2, qk_norm=None), 3)
    new = grown(plain, 3, add_qk_norm=True)
    assert new.config.qk_norm == NORMED
    norms = [m for b in new.transformer_blocks for a in (b.attn1, b.attn2) for m in (a.norm_q, a.norm_k)]
    assert len(norms) == 12
    assert all(norm.weight.tolist() == [1.0] * 32 for norm in norms)
    type(new).from_config(new.config).load_state_dict(new.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": 3}, "has 3 blocks already"),
        ({"layers": 4, "strategy": "cyclc"}, "Did you mean 'cyclic'"),
        ({"layers": 4, "strategy": "block_expand"}, "whole multiples of the 3 blocks, not 4. Give 6"),
        ({"layers": 8, "strategy": "block_expand"}, "not 8. Give 6"),
        ({"layers": 4, "keep": 4}, "`keep` must lie between 1 and the 3"),
        ({"layers": 4, "strategy": "cyclic", "keep": 2}, "`keep` has no effect on the strategy cyclic"),
        ({"layers": 4, "gate": False}, "`gate` has no effect on the strategy constant"),
        ({"layers": 4, "add_qk_norm": True}, "normalises queries and keys already"),
    ],
)
def test_what_cannot_be_grown_is_said(settings: dict[str, Any], words: str) -> None:
    model = small()
    before = answer(model)
    with pytest.raises(InvalidInput, match=words):
        grow(model, Growth(**settings))
    assert torch.equal(answer(model), before)


def test_a_model_without_normed_queries_is_refused_with_the_way_out() -> None:
    with pytest.raises(InvalidInput, match="does not normalise queries and keys"):
        grow(small(qk_norm=None), Growth(layers=4))
