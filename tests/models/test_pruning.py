"""Block importance and what pruning leaves."""

import copy

import pytest
import torch
from test_growth import answer, inputs, small

from sana.errors import InvalidInput
from sana.models.growth import Growth, grow
from sana.models.pruning import BlockImportance, most_important, prune, turned


def measured(model: torch.nn.Module) -> list[float]:
    meter = BlockImportance(len(model.transformer_blocks))  # type: ignore[arg-type]
    with meter.watching(model):  # type: ignore[arg-type]
        answer(model)  # type: ignore[arg-type]
    return meter.values


def test_an_identity_block_has_no_importance_and_leaves_no_gap() -> None:
    model = small(3)
    before = answer(model)
    grow(model, Growth(layers=5))
    values = measured(model)
    assert values[3:] == [0.0, 0.0]
    assert all(0 < value <= 2 for value in values[:3])
    kept = most_important(values, 3)
    assert kept == (0, 1, 2)
    prune(model, kept)
    assert torch.equal(answer(model), before)
    assert model.config.num_layers == 3
    type(model).from_config(model.config).load_state_dict(model.state_dict(), strict=True)


def test_importance_is_one_minus_the_cosine_averaged_over_tokens() -> None:
    model = small(2)
    seen = []
    hook = model.transformer_blocks[1].register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    values = measured(model)
    hook.remove()
    before, after = seen[0]
    expected = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1).mean()
    assert values[1] == pytest.approx(float(expected), rel=1e-5)


def test_importance_averages_over_everything_that_goes_through_and_hooks_are_taken_off() -> None:
    model = small(2)
    meter = BlockImportance(2)
    latents, text, times = inputs()
    singles = []
    for row in range(2):
        with meter.watching(model), torch.no_grad():
            model(latents[row : row + 1], text[row : row + 1], times[row : row + 1])
        alone = BlockImportance(2)
        with alone.watching(model), torch.no_grad():
            model(latents[row : row + 1], text[row : row + 1], times[row : row + 1])
        singles.append(alone.values)
    assert meter.values == pytest.approx([(a + b) / 2 for a, b in zip(*singles, strict=True)])
    assert not any(block._forward_hooks for block in model.transformer_blocks)


def test_turned_is_exact_at_both_ends() -> None:
    x = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(1))
    assert turned(x, x.clone()).tolist() == [[0.0] * 50]
    assert turned(x, 3 * x).max() < 1e-6
    torch.testing.assert_close(turned(x, -x), torch.full((1, 50), 2.0))


def test_the_most_important_stay_in_their_order() -> None:
    assert most_important([0.5, 0.1, 0.4, 0.1, 0.9], 3) == (0, 2, 4)
    assert most_important([0.1, 0.1, 0.1], 2) == (0, 1)


def test_pruning_any_other_block_changes_the_output() -> None:
    model = small(3)
    shorter = copy.deepcopy(model)
    prune(shorter, (0, 2))
    ends = [one.transformer_blocks[i].ff.conv_point.weight for one, i in ((shorter, 1), (model, 2))]
    assert torch.equal(*ends)
    assert not torch.equal(answer(shorter), answer(model))


def test_what_cannot_be_pruned_is_said() -> None:
    with pytest.raises(InvalidInput, match="Nothing went through"):
        _ = BlockImportance(2).values
    for layers in (0, 3, 4):
        with pytest.raises(InvalidInput, match="give a depth from 1 to 2"):
            most_important([1.0, 2.0, 3.0], layers)
    with pytest.raises(InvalidInput, match="from 0 to 1 that stay, not 2"):
        prune(small(2), (0, 2))
    with pytest.raises(InvalidInput, match="not none"):
        prune(small(2), ())
