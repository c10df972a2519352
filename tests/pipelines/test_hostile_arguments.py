"""Every argument of the documented call with values of every kind: drawn, or refused in one sentence."""

import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sana import (
    Parts,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
)
from sana.errors import InvalidInput
from tiny_model import make_tiny_parts, make_tiny_sprint, tiny_controlnet

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


def refused(call: Callable[..., Any], name: str, values: Iterable[Any]) -> int:
    """Call with each value of an argument; return how many were refused, each in one short sentence."""
    count = 0
    for value in values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(**{name: value})
            except InvalidInput as error:
                count += 1
                said = str(error)
            else:
                continue
        assert len(said) < 420, said
        assert "\n" not in said
        said.encode()
    return count


@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused_in_one_sentence(tiny_parts: Parts, name: str) -> None:
    pipe = SanaPipeline(**tiny_parts.components)
    pipe.set_progress_bar_config(disable=True)

    def call(**change: Any) -> None:
        pipe(**{**SMALL, **change})

    assert refused(call, name, VALUES) > 3 or name.endswith("attention_mask")  # not looked at without embeddings


# The options of the other pipelines


@pytest.fixture(scope="module")
def others() -> dict[str, Any]:
    plain, sprint = make_tiny_parts(), make_tiny_sprint()
    made: dict[str, Any] = {
        "pag": SanaPAGPipeline(**plain.components),
        "sprint": SanaSprintPipeline(**sprint.components),
        "pictures": SanaSprintImg2ImgPipeline(**sprint.components),
        "control": SanaControlNetPipeline(**plain.components, controlnet=tiny_controlnet(plain.transformer)),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


PICTURE = torch.zeros(1, 3, 32, 32)
NEEDED: dict[str, dict[str, Any]] = {
    "pictures": {"image": PICTURE, "strength": 0.5},
    "control": {"control_image": PICTURE},
}
OPTIONS = [
    *(("pag", name) for name in ("pag_scale", "pag_adaptive_scale")),
    *(("sprint", name) for name in ("timesteps", "max_timesteps", "intermediate_timesteps", "guidance_scale")),
    *(("sprint", name) for name in ("num_inference_steps", "latents", "generator", "prompt_embeds")),
    *(("pictures", name) for name in ("image", "strength", "latents", "timesteps", "max_timesteps")),
    *(("control", name) for name in ("control_image", "controlnet_conditioning_scale", "latents")),
    *(("control", name) for name in ("control_guidance_start", "control_guidance_end")),
]


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_any_value_of_a_further_option(others: dict[str, Any], kind: str, name: str) -> None:
    def call(**change: Any) -> None:
        others[kind](**{**SMALL, **NEEDED.get(kind, {}), **change})

    assert refused(call, name, (*VALUES, -0.5, 0.5, 1.5, [0.5], [1.5, 0.7], (0.1,) * 100, 1e-300, float("-inf"))) > 10


def test_any_value_of_the_pag_layers(others: dict[str, Any]) -> None:
    def call(layers: Any) -> None:
        others["pag"].set_pag_applied_layers(layers)
        others["pag"](**SMALL)

    assert refused(call, "layers", (*VALUES, "(", "blocks.(", ["blocks.9"], "x" * 10_000, "(a+)+$")) > 15
    others["pag"].set_pag_applied_layers("blocks.0")


def pictures() -> Iterator[Any]:
    """Yield what is given for a picture and is none, or a bad one."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((64, 64)).save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) // 2]))
    moving = io.BytesIO()
    Image.fromarray(noise).save(moving, "GIF", save_all=True, append_images=[Image.fromarray(255 - noise)])
    closed = Image.open(io.BytesIO(buffer.getvalue()))
    closed.close()
    yield from (cut, Image.open(moving), closed, Image.new("RGB", (1, 65535)), Image.new("L", (20_000, 20)))
    yield from ([], [None], ["a.png"], "a.png", Path("a.png"))
    yield from ([Image.fromarray(noise), noise], [[Image.fromarray(noise)]])
    for shape in ((0, 8, 3), (8, 0, 3), (8, 8, 5), (2, 8, 8, 7), (8,), (1, 1, 8, 8, 3), (20_000, 1, 3)):
        yield np.zeros(shape, np.float32)
    for kind in (bool, complex, object, "U1", "M8[s]"):
        yield np.zeros((8, 8, 3), kind)
    yield from (np.full((8, 8, 3), np.nan), np.full((8, 8, 3), np.inf), np.full((8, 8, 3), 1e308))
    for dims in ((3, 0, 8), (5, 8, 8), (8,), (1, 1, 3, 8, 8), (3, 20_000, 8)):
        yield torch.zeros(dims)
    yield from (torch.full((3, 8, 8), math.nan), torch.zeros(3, 8, 8, dtype=torch.bool))
    yield from (torch.zeros(3, 8, 8, dtype=torch.complex64), torch.zeros(7, 3, 8, 8), torch.zeros(1, 4, 600, 1))
    yield [np.zeros((8, 8, 3), np.float32), np.zeros((9, 8, 3), np.float32)]


@pytest.mark.parametrize(("kind", "name"), [("pictures", "image"), ("control", "control_image")])
def test_bad_pictures_are_refused(others: dict[str, Any], kind: str, name: str) -> None:
    bad = list(pictures())

    def call(**change: Any) -> None:
        others[kind](**{**SMALL, **NEEDED[kind], **change})

    assert refused(call, name, bad) == len(bad)


@pytest.mark.parametrize(("kind", "name"), [("pictures", "image"), ("control", "control_image")])
def test_unusual_but_good_pictures_are_taken(others: dict[str, Any], kind: str, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    flipped = noise[::-1, ::-1]
    unusual = [
        *(Image.fromarray(noise), [Image.fromarray(noise)], (Image.fromarray(noise),), flipped, noise[..., 0]),
        *(np.asfortranarray(noise), (noise / 255).astype(np.float64), (noise / 255).astype(np.float16)),
        *(torch.from_numpy(noise).permute(2, 0, 1), torch.from_numpy(noise / 255).permute(2, 0, 1).double()),
        *(torch.from_numpy(noise / 255).permute(2, 0, 1).bfloat16(), torch.zeros(3, 32, 32, requires_grad=True)),
        Image.fromarray(noise[..., 0].astype(np.uint16) * 256),
    ]
    for value in unusual:
        made = others[kind](**{**SMALL, **NEEDED[kind], name: value}).images
        assert made.shape == (1, 4, 1, 1)
        assert not made.requires_grad


def test_nothing_is_computed_before_a_refusal(others: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was used")

    changes: dict[str, list[dict[str, Any]]] = {
        "pag": [{"pag_scale": -1}, {"timesteps": [1, 2]}, {"sigmas": [0.1, 0.5]}],
        "sprint": [
            *({"timesteps": [1.0, 1.1]}, {"max_timesteps": None}),
            {"max_timesteps": 1.0, "num_inference_steps": 2},
        ],
        "pictures": [{"image": None}, {"strength": 0.0}, {"strength": 2.0}, {"image": torch.zeros(1, 4, 3, 3)}],
        "control": [
            *({"control_image": None}, {"controlnet_conditioning_scale": [1.0, 2.0]}, {"control_guidance_start": 1.0}),
            {"control_image": torch.zeros(2, 3, 32, 32)},
            {"control_guidance_end": 0.1, "num_inference_steps": 4},
        ],
    }
    for kind, calls in changes.items():
        pipe = others[kind]
        pipe.parts.prompts.clear()
        for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
            monkeypatch.setattr(part, "forward", never)
        monkeypatch.setattr(pipe.vae, "_encode", never)
        for change in calls:
            with pytest.raises(InvalidInput):
                pipe(**{**SMALL, **NEEDED.get(kind, {}), **change})


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
