"""The metrics' way of drawing is the engine's way, many prompts at once."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sana import SanaSprintPipeline, SanaTransformer2DModel
from sana.data.cutouts import Scene, Thing, render
from sana.engine.attachments import ControlRequest
from sana.engine.control_maps import control_map
from sana.engine.generate import generate_images
from sana.engine.parts import Parts
from sana.engine.request import Request
from sana.errors import InvalidInput
from sana.evaluation.drawing import drawer, follower, resolve, restorer
from sana.training.objectives.sprint.students import student_of
from tiny_model import make_tiny_sprint, tiny_controlnet, tiny_transformer

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


def as_student(**angles: tuple[float, ...]) -> Parts:
    """A tiny teacher's untrained student as a distillation begins, with a guidance embedder that is not zero."""
    parts = make_tiny_sprint()
    teacher = tiny_transformer(qk_norm="rms_norm_across_heads", timestep_scale=0.001)
    student = SanaTransformer2DModel.from_config(student_of(teacher, 0).config)
    student.load_state_dict(student_of(teacher, 0).state_dict())
    torch.nn.init.normal_(student.time_embed.guidance_embedder.linear_2.weight, std=0.3)
    parts.transformer = student.eval()
    parts.angles = {int(steps.removeprefix("steps_")): found for steps, found in angles.items()}
    return parts


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kept", [False, True])
def test_pictures_of_a_distilled_model_are_those_of_its_pipeline(steps: int, kept: bool) -> None:
    found = {1: (1.5, 0.0), 2: (1.52, 0.8, 0.0), 4: (1.55, 1.1, 0.7, 0.3, 0.0)}
    parts = as_student(**({f"steps_{steps}": found[steps]} if kept else {}))
    order = resolve(parts, steps=steps)
    assert (order.sampler, order.guidance) == ("scm", 4.5)
    together = drawer(parts, order)(PROMPTS, SEEDS)
    pipeline = SanaSprintPipeline(**parts.components)
    angles = {"timesteps": found[steps], "max_timesteps": None, "intermediate_timesteps": None} if kept else {}
    if steps != 2:
        angles = {"intermediate_timesteps": None, **angles}
    for prompt, seed, picture in zip(PROMPTS, SEEDS, together, strict=True):
        generator = torch.Generator().manual_seed(seed)
        size = {"width": 256, "height": 256, "use_resolution_binning": False}
        made = pipeline(
            prompt, generator=generator, num_inference_steps=steps, guidance_scale=4.5, **size, **angles
        ).images[0]
        assert np.abs(picture.astype(int) - np.asarray(made)).max() <= 1
    other = drawer(parts, resolve(parts, steps=steps, guidance=1.0))(PROMPTS[:1], SEEDS[:1])
    assert (other[0] != together[0]).any()


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_pictures_under_control_are_those_of_the_engine(tiny_parts: Parts, guidance: float) -> None:
    parts = copy.copy(tiny_parts)
    parts.controlnet = tiny_controlnet(parts.transformer)
    things = (Thing(kind="cat", colour="blue", x=100, y=120, radius=50),)
    maps = [
        control_map(
            "ink", Image.fromarray(render(Scene(groups=(), things=things[:count], relation=None, background="sky")))
        )
        for count in (1, 0, 1, 0)
    ]
    order = resolve(parts, steps=3, guidance=guidance)
    together = list(follower(parts, order)(PROMPTS, SEEDS, [np.asarray(one) for one in maps]))
    plain = drawer(parts, order)(PROMPTS, SEEDS)
    for prompt, seed, picture, steered, free in zip(PROMPTS, SEEDS, maps, together, plain, strict=True):
        request = Request(
            prompt=prompt, seed=seed, steps=3, guidance=guidance, width=256, height=256,
            controls=[ControlRequest(kind="map", image=picture)],
        )  # fmt: skip
        alone = np.asarray(generate_images(parts, request).image)
        assert np.abs(steered.astype(int) - alone).max() <= 1
        assert np.abs(steered.astype(int) - free).max() > 1


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
    uses = (
        ("text_encoder", lambda p: drawer(p, order)),
        ("vae", restorer),
        ("controlnet", lambda p: follower(p, order)),
    )
    for name, use in uses:
        lacking: Any = copy.copy(tiny_parts)
        setattr(lacking, name, None)
        with pytest.raises(InvalidInput, match=name):
            use(lacking)
