"""The metrics' way of drawing is the engine's way, many prompts at once."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from sana.data.cutouts import Scene, Thing, render
from sana.engine.generate import generate_images
from sana.engine.parts import Parts
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.evaluation.drawing import drawer, resolve, restorer

PROMPTS = ["a red fish", "一条鱼", "a red fish", "a photo of two large blue umbrellas on mint paper"]
SEEDS = [0, 1, 2, 0]


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_pictures_are_those_of_the_engine(tiny_parts: Parts, guidance: float) -> None:
    together = drawer(tiny_parts, resolve(tiny_parts, steps=3, guidance=guidance))(PROMPTS, SEEDS)
    for prompt, seed, picture in zip(PROMPTS, SEEDS, together, strict=True):
        request = Request(prompt=prompt, seed=seed, steps=3, guidance=guidance, width=256, height=256)
        alone = np.asarray(generate_images(tiny_parts, request).image)
        assert picture.shape == (256, 256, 3)
        assert picture.dtype == np.uint8
        assert np.abs(picture.astype(int) - alone).max() <= 1
    assert np.abs(together[0].astype(int) - together[2]).max() > 1
    assert np.abs(together[0].astype(int) - together[3]).max() > 1


def test_other_prompts_give_other_pictures(tiny_parts: Parts) -> None:
    one, other = drawer(tiny_parts, resolve(tiny_parts, steps=2, guidance=4.5))(PROMPTS[:2], [3, 3])
    assert (one != other).any()


def test_the_order_is_the_cards_unless_told_otherwise(tiny_parts: Parts) -> None:
    order = resolve(tiny_parts)
    assert (order.width, order.height, order.steps, order.guidance) == (256, 256, 20, 4.5)
    assert resolve(tiny_parts, steps=7).steps == 7


def test_restored_pictures_are_the_autoencoders(tiny_parts: Parts) -> None:
    things = (Thing(kind="cat", colour="blue", x=100, y=120, radius=50),)
    pictures = [
        render(Scene(groups=(), things=things, relation=None, background=name)) for name in ("sky", "mint", "grey")
    ]
    restored = restorer(tiny_parts, batch_size=2)(pictures)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        plain = tiny_parts.vae.decode(tiny_parts.vae.encode(images).latent).sample
    expected = ((plain.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.stack(list(restored)) - expected).max() <= 0.51


def test_missing_parts_are_named(tiny_parts: Parts) -> None:
    order = resolve(tiny_parts)
    for name, use in (("text_encoder", lambda p: drawer(p, order)), ("vae", restorer)):
        lacking: Any = copy.copy(tiny_parts)
        setattr(lacking, name, None)
        with pytest.raises(InvalidInput, match=name):
            use(lacking)
