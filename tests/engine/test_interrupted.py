"""Ctrl-C, or a consumer that goes away, at any moment: nothing stays behind and the next request is exact."""

import copy
import gc
import weakref
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from torch import nn

from sana import Request, generate_images
from sana.engine import generate as module
from sana.engine.generate import generate
from sana.engine.parts import Parts

pytestmark = pytest.mark.usefixtures("quick_collection")

REQUEST = Request(prompt="a red fox", steps=2, seed=4, count=2, batch_size=1, width=64, height=64, binning=False)


@pytest.fixture(scope="module")
def parts(tiny_parts: Parts) -> Parts:
    return copy.deepcopy(tiny_parts)


def pixels(parts: Parts) -> np.ndarray:
    return np.stack([np.asarray(image) for image in generate_images(parts, REQUEST).images])


def interrupted(parts: Parts, part: nn.Module, k: int) -> bool:
    """Press Ctrl-C at the k-th call of the part's modules; tell whether there was one."""
    calls = 0

    def press(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == k:
            raise KeyboardInterrupt

    leaves = [one for one in part.modules() if not list(one.children())]
    handles = [one.register_forward_pre_hook(press) for one in leaves]
    try:
        generate_images(parts, REQUEST)
    except KeyboardInterrupt:
        return True
    finally:
        for handle in handles:
            handle.remove()
    return False


@pytest.mark.parametrize("name", ["text_encoder", "transformer", "vae"])
def test_at_any_call_of_any_part(parts: Parts, name: str) -> None:
    expected = pixels(parts)
    parts.prompts.clear()
    part = getattr(parts, name)
    settings = {key: value for key, value in vars(parts.vae).items() if "til" in key or "slic" in key}
    stops = 0
    for k in range(1, 10_000, 7):
        if not interrupted(parts, part, k):
            break
        stops += 1
        assert {key: value for key, value in vars(parts.vae).items() if "til" in key or "slic" in key} == settings
        assert np.array_equal(pixels(parts), expected), k
        if name == "text_encoder":
            parts.prompts.clear()
    assert stops > 5


def test_in_the_middle_of_the_ladder_the_settings_survive(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.engine.decode.TILES", ((32, 32),))
    shapes: list[tuple[int, ...]] = []

    def press(_: object, words: tuple[Any, ...]) -> None:
        shapes.append(tuple(words[0].shape))
        if shapes[-1][-1] == 1:
            raise KeyboardInterrupt
        raise MemoryError

    handle = parts.vae.decoder.register_forward_pre_hook(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate_images(parts, REQUEST)
    finally:
        handle.remove()
    assert shapes[-1] == (1, 4, 1, 1)
    assert parts.vae.use_tiling is False
    assert parts.vae.tile_sample_min_height == 512


def test_closing_the_generator_at_any_step_frees_everything(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixels(parts)
    plans: list[weakref.ref[Any]] = []
    whole = module.denoise

    def watched(plan: Any) -> Generator[Any, Any, Any]:
        plans.extend([weakref.ref(plan), weakref.ref(plan.predictor), weakref.ref(plan.latents)])
        return whole(plan)

    monkeypatch.setattr(module, "denoise", watched)
    for stop in range(1, 7):
        loop = generate(parts, REQUEST)
        for _ in range(stop):
            next(loop)
        loop.close()
        gc.collect()
        assert plans
        assert [one() for one in plans] == [None] * len(plans), stop
        plans.clear()
        with pytest.raises(StopIteration):
            next(loop)
    monkeypatch.undo()
    assert np.array_equal(pixels(parts), expected)
