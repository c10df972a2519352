"""Block importance of a model while it draws."""

import copy

import pytest

from sana.engine.generate import generate_images
from sana.engine.parts import Parts
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.evaluation.importance import block_importance
from sana.models.growth import Growth, grow
from tiny_model import make_tiny_parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    made = make_tiny_parts(qk_norm="rms_norm_across_heads", num_layers=3)
    grow(made.transformer, Growth(layers=4))
    return made


def test_blocks_are_ranked_over_prompts_and_steps(parts: Parts) -> None:
    told: list[tuple[int, int]] = []
    values = block_importance(parts, ["a fox", "two boats"], steps=2, progress=lambda *counts: told.append(counts))
    assert told == [(1, 2), (2, 2)]
    assert values[3] == 0
    assert all(0 < value <= 2 for value in values[:3])
    assert block_importance(parts, ["a fox", "two boats"], steps=2) == values
    assert block_importance(parts, ["a fox", "two boats"], steps=3) != values
    assert not any(block._forward_hooks for block in parts.transformer.transformer_blocks)


def test_nothing_is_decoded_and_nothing_is_left_behind(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(prompt="a fox", steps=2, seed=0)
    before = generate_images(parts, request).images[0]
    watched = copy.copy(parts)

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("a picture was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(type(watched.vae), "decode", decode)
        block_importance(watched, ["a fox"], steps=2)
    assert generate_images(parts, request).images[0].tobytes() == before.tobytes()


def test_no_prompts_are_refused(parts: Parts) -> None:
    with pytest.raises(InvalidInput, match="no prompts to draw"):
        block_importance(parts, [])
