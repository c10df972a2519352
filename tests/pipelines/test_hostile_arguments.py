"""Every argument of the documented call with values of every kind: drawn, or refused in one sentence."""

import inspect
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from sana import Parts, SanaPipeline
from sana.errors import InvalidInput

SMALL: dict[str, Any] = {
    "prompt": "a fox",
    "height": 32,
    "width": 32,
    "use_resolution_binning": False,
    "num_inference_steps": 1,
    "output_type": "latent",
    "complex_human_instruction": None,
}
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 1e308, math.nan, math.inf, 10**5000, -(10**5000), "", "x", "a\x00b", "\ud83d", "x" * 10**6),
    *(b"x", [], [1], ["a"], [math.nan], [0.9, 0.1], [1e308, 5], [500, 400], ["a", "b"], [[1], 2], {"a": 1}, (1, 2)),
    *(object(), np.array([1.0, 2.0]), torch.zeros(1), torch.zeros(1, 4, 2, 3), lambda *_: None),
)
NAMES = [name for name in inspect.signature(SanaPipeline.__call__).parameters if name != "self"]


@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused_in_one_sentence(tiny_parts: Parts, name: str) -> None:
    pipe = SanaPipeline(**tiny_parts.components)
    pipe.set_progress_bar_config(disable=True)
    refused = 0
    for value in VALUES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pipe(**{**SMALL, name: value})
            except InvalidInput as error:
                refused += 1
                said = str(error)
            else:
                continue
        assert len(said) < 420, said
        assert "\n" not in said
        said.encode()
    assert refused > 3 or name.endswith("attention_mask")  # not looked at without embeddings


@pytest.mark.parametrize("name", ["height", "width", "num_inference_steps", "num_images_per_prompt"])
def test_numbers_have_a_bound(tiny_parts: Parts, name: str) -> None:
    with pytest.raises(InvalidInput, match=f"`{name}` has to be at most"):
        SanaPipeline(**tiny_parts.components)(**{**SMALL, name: 10**9})


def test_a_long_length_is_refused_by_encode_prompt_too(tiny_parts: Parts) -> None:
    with pytest.raises(InvalidInput, match="`max_sequence_length` has to be at most"):
        SanaPipeline(**tiny_parts.components).encode_prompt("a", max_sequence_length=10**9)


def test_a_shape_far_from_the_trained_ones_is_told(tiny_parts: Parts) -> None:
    pipe = SanaPipeline(**tiny_parts.components)
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="drawn at 256 x 256, and 97% of it is cut away"):
        image = pipe("a fox", height=10, width=300, num_inference_steps=1).images[0]
    assert image.size == (300, 10)


def test_memory_that_does_not_do_is_told(tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.errors import OutOfMemory

    pipe = SanaPipeline(**tiny_parts.components)
    pipe.set_progress_bar_config(disable=True)

    def full(*_: object) -> None:
        raise MemoryError

    for part, words in (
        (pipe.text_encoder, "max_sequence_length"),
        (pipe.transformer.proj_out, "num_images_per_prompt"),
    ):
        pipe.parts.prompts.clear()
        handle = part.register_forward_pre_hook(full)
        with pytest.raises(OutOfMemory, match=words):
            pipe(**SMALL)
        handle.remove()
    pipe(**SMALL)


def test_a_batch_that_is_decoded_one_by_one_keeps_its_form(tiny_parts: Parts) -> None:
    pipe = SanaPipeline(**tiny_parts.components)
    pipe.set_progress_bar_config(disable=True)

    def full(_: object, words: tuple[Any, ...]) -> None:
        if len(words[0]) > 1:
            raise MemoryError

    for kind in ("pil", "np", "pt"):
        settings = {**SMALL, "output_type": kind, "num_images_per_prompt": 2}
        expected = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
        handle = pipe.vae.decoder.register_forward_pre_hook(full)
        with pytest.warns(UserWarning, match="one by one"):
            images = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
        handle.remove()
        assert type(images) is type(expected)
        assert len(images) == 2
        for left, right in zip(images, expected, strict=True):
            assert np.allclose(
                np.asarray(left, np.float32), np.asarray(right, np.float32), atol=1 if kind == "pil" else 1e-4
            )


def test_compiling_is_passed_on(tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Parts, "compile", lambda self, cache_dir=None: asked.append(cache_dir))
    SanaPipeline(**tiny_parts.components).compile("here")
    assert asked == ["here"]
