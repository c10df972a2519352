"""SanaSprintImg2ImgPipeline against the reference, per step, and where it fails or errs. Oracle: diffusers 0.42.1."""

import copy
import inspect
import random
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reference_pipelines import LATENT_GATE, PROMPTS, SIZE, assert_same, oracle_of, quiet, rms_rel, run, seeded
from sana import SanaSprintImg2ImgPipeline
from sana.errors import InvalidInput
from tiny_model import make_tiny_sprint


@pytest.fixture(scope="module")
def pipe() -> SanaSprintImg2ImgPipeline:
    return quiet(SanaSprintImg2ImgPipeline(**make_tiny_sprint().components))


@pytest.fixture(scope="module")
def oracle(pipe: SanaSprintImg2ImgPipeline) -> Any:
    return oracle_of(pipe)


def picture(seed: int = 0, size: tuple[int, int] = (96, 128), mode: str = "RGB") -> Image.Image:
    """A picture of soft blobs in that size (width, height)."""
    made = np.random.default_rng(seed).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    resized = Image.fromarray(made, "RGBA").resize(size, Image.Resampling.BICUBIC)
    return resized.convert(mode) if mode in ("RGBA", "LA") else resized.convert("RGB").convert(mode)


def given_as(kind: str, seed: int, size: tuple[int, int], count: int) -> Any:
    """Return pictures of that size (width, height) as the reference takes them."""
    pictures = [picture(seed + i, size) for i in range(count)]
    arrays = np.stack([np.asarray(one) for one in pictures]).astype(np.float32) / 255
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    return {
        "pil": pictures[0] if count == 1 else pictures,
        "pil list": pictures,
        "array": arrays,
        "arrays": list(arrays),
        "tensor": tensor[0] if count == 1 else tensor,
        "signed": 2 * tensor - 1,
    }[kind]


def drawn(seed: int) -> dict[str, Any]:
    """Return a call drawn at random in which the reference honours the picture."""
    draw = random.Random(seed)
    steps = draw.choice([1, 2, 2, 3, 4, 7])
    prompts, images = draw.choice([(1, 1), (1, 2), (2, 1), (3, 1)])
    height, width = 32 * draw.randint(1, 5), 32 * draw.randint(1, 5)
    other = draw.choice([(width, height), (draw.randint(20, 200), draw.randint(20, 200))])
    # Strength 1, or one that skips a whole step: between them the reference ignores the picture.
    strength = 1.0 if steps == 1 else draw.choice([1.0, draw.uniform(1 / steps, 1 - 1 / steps)])
    return {
        "prompt": PROMPTS[:prompts],
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": draw.uniform(1, 6),
        "max_timesteps": draw.choice([1.57080, 1.5]),
        "intermediate_timesteps": draw.choice([1.3, 1.0, None]) if steps == 2 else None,
        "image": given_as(
            draw.choice(["pil", "pil list", "array", "arrays", "tensor", "signed"]),
            seed,
            other,
            draw.choice([1, prompts]),
        ),
        "strength": strength,
        "height": height,
        "width": width,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    }


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")
@pytest.mark.parametrize("seed", range(14))
def test_calls_drawn_at_random(pipe: Any, oracle: Any, seed: int) -> None:
    call = drawn(seed)
    ours, theirs = seeded(seed), seeded(seed)
    assert_same(run(pipe, generator=ours, **call), run(oracle, generator=theirs, **call))
    assert torch.equal(ours.get_state(), theirs.get_state()), "the generator is left as the reference leaves it"
    assert pipe.num_timesteps == oracle.num_timesteps
    assert pipe.scheduler.begin_index == oracle.scheduler.begin_index
    assert pipe.scheduler.step_index == oracle.scheduler.step_index


def test_resolution_binning_resizes_the_picture() -> None:
    pipe = quiet(SanaSprintImg2ImgPipeline(**make_tiny_sprint(sample_size=32).components))
    call = {"prompt": PROMPTS[0], "image": picture(), "strength": 0.5, "height": 832, "width": 480}
    ours = run(pipe, generator=seeded(), **call)
    assert ours.images.shape == (1, 832, 480, 3)
    assert_same(ours, run(oracle_of(pipe), generator=seeded(), **call))


def test_a_tiled_encoder_and_decoder(pipe: Any) -> None:
    tiled = quiet(SanaSprintImg2ImgPipeline.from_pipe(pipe, vae=copy.deepcopy(pipe.vae)))
    oracle = oracle_of(tiled)
    call = {"prompt": PROMPTS[0], "image": picture(), "strength": 0.5, **SIZE}
    whole = run(tiled, generator=seeded(), **call)
    for vae in (tiled.vae, oracle.vae):
        vae.enable_tiling(64, 64, 32, 32)
    ours = run(tiled, generator=seeded(), **call)
    assert_same(ours, run(oracle, generator=seeded(), **call))
    assert rms_rel(ours.latents[0], whole.latents[0]) > 1e-3


def test_given_latents_are_the_state_itself(pipe: Any, oracle: Any) -> None:
    latents = 0.5 * torch.randn(1, 4, 4, 3, generator=seeded())
    call = {"prompt": PROMPTS[0], "latents": latents, "strength": 0.5, **SIZE}
    theirs = run(oracle, generator=seeded(), image=picture(), **call)
    assert_same(run(pipe, generator=seeded(), **call), theirs)  # the reference reads a picture it has no use for
    with pytest.warns(UserWarning, match="`image` is ignored"):
        assert_same(run(pipe, generator=seeded(), image=picture(), **call), theirs)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_given_latents_begin_where_the_reference_takes_them_to_be(pipe: Any, oracle: Any, steps: int) -> None:
    """At a strength that skips no step, too: there is no picture that could be ignored."""
    latents = 0.5 * torch.randn(1, 4, 4, 3, generator=seeded())
    call = {"prompt": PROMPTS[0], "latents": latents, "strength": 1 - 0.4 / steps, "num_inference_steps": steps, **SIZE}
    call["intermediate_timesteps"] = 1.3 if steps == 2 else None
    theirs = run(oracle, generator=seeded(), image=picture(), **call)
    assert_same(run(pipe, generator=seeded(), **call), theirs)


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.4), (2, 0.9), (4, 0.8)])
def test_a_first_angle_that_is_no_pure_noise(pipe: Any, oracle: Any, steps: int, strength: float) -> None:
    """There the reference honours the picture at every strength, so all is as in the reference."""
    call = {"prompt": PROMPTS[0], "num_inference_steps": steps, "strength": strength, "max_timesteps": 1.0, **SIZE}
    call["intermediate_timesteps"] = None
    made = [run(who, image=picture(), generator=seeded(), **call) for who in (pipe, oracle)]
    assert_same(*made)
    other = run(oracle, image=picture(9), generator=seeded(), **call)
    assert rms_rel(other.latents[0], made[1].latents[0]) > 1e-2


def test_replaced_latents_take_effect_alike(pipe: Any, oracle: Any) -> None:
    def change(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * 0.5} if index == 1 else {}

    call = {"num_inference_steps": 5, "intermediate_timesteps": None, "strength": 0.65, "output_type": "latent", **SIZE}
    made = [
        who(PROMPTS[0], image=picture(), generator=seeded(), callback_on_step_end=change, **call).images
        for who in (pipe, oracle)
    ]
    assert rms_rel(*made) < LATENT_GATE


# Where the reference ignores the picture


def test_the_defaults_of_the_reference_ignore_the_picture(pipe: Any, oracle: Any) -> None:
    """Two steps and strength 0.6: the reference begins at pure noise, here the run begins at an angle in between."""

    def made(who: Any, image: Image.Image) -> Tensor:
        latents: Tensor = who(
            PROMPTS[0], image=image, generator=seeded(), output_type="latent", strength=0.6, **SIZE
        ).images
        return latents

    one, other = picture(0), picture(9)
    assert rms_rel(made(oracle, one), made(oracle, other)) < 1e-4
    assert rms_rel(made(pipe, one), made(pipe, other)) > 1e-2


@pytest.mark.parametrize(("steps", "strength", "angle"), [(2, 0.6, 1.35416), (1, 0.5, 0.7854), (4, 0.9, 1.41372)])
def test_the_angle_in_between(pipe: Any, oracle: Any, steps: int, strength: float, angle: float) -> None:
    """It lies at steps (1 - strength) between the first two; from there on all is as in the reference."""
    middle = 1.3 if steps == 2 else None
    call = {"prompt": PROMPTS[0], "image": picture(), "num_inference_steps": steps, **SIZE}
    ours = run(pipe, generator=seeded(), strength=strength, **call)
    assert ours.timesteps[0] == pytest.approx(angle, abs=1e-4)

    plain = oracle.scheduler.set_timesteps

    def moved(*words: Any, **rest: Any) -> None:
        plain(*words, **rest)
        oracle.scheduler.timesteps[0] = ours.timesteps[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle.scheduler, "set_timesteps", moved)
        assert_same(ours, run(oracle, generator=seeded(), strength=1.0, intermediate_timesteps=middle, **call))


def test_the_effect_of_the_strength_is_continuous_up_to_one(pipe: Any) -> None:
    def made(strength: float) -> Tensor:
        latents: Tensor = pipe(
            PROMPTS[0], image=picture(), generator=seeded(), output_type="latent", strength=strength, **SIZE
        ).images
        return latents

    assert rms_rel(made(0.99999), made(1.0)) < 1e-3
    assert rms_rel(made(0.50001), made(0.5)) < 2, "a step more is done, from nearly the same angle"
    whole = [pipe.scheduler.timesteps[0].item() for strength in (0.50001, 0.7, 0.9, 1.0) if made(strength) is not None]
    assert whole == sorted(whole)


# Where the reference fails


def test_a_strength_of_none_does_not_switch_the_picture_off(pipe: Any) -> None:
    with pytest.raises(InvalidInput, match=r"The value of strength should in \[0.0, 1.0\] but is None"):
        pipe(PROMPTS[0], image=picture(), strength=None, **SIZE)


def test_latents_as_image(pipe: Any, oracle: Any) -> None:
    """What `output_type="latent"` returns may be the picture; the reference resizes it to pixels and fails."""
    call = {"prompt": PROMPTS[0], "strength": 0.5, **SIZE}
    pixels = pipe(image=picture(), generator=seeded(), output_type="pt", **call).images
    with torch.no_grad():
        latents = pipe.vae.encode(2 * pixels - 1).latent * pipe.vae.config.scaling_factor
    with pytest.raises(RuntimeError):
        run(oracle, image=latents, generator=seeded(), **call)
    ours = run(pipe, image=latents, generator=seeded(), **call)
    assert_same(ours, run(oracle, image=pixels, generator=seeded(), **call))


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1"])
def test_pictures_that_are_not_rgb(pipe: Any, oracle: Any, mode: str) -> None:
    image = picture(mode=mode)
    call = {"prompt": PROMPTS[0], "strength": 0.5, **SIZE}
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        run(oracle, image=image, generator=seeded(), **call)
    ours = run(pipe, image=image, generator=seeded(), **call)
    rgb = image.convert("RGB")
    if mode in ("RGBA", "LA"):
        rgb = Image.new("RGBA", image.size, "white")
        rgb.alpha_composite(image.convert("RGBA"))
        rgb = rgb.convert("RGB")
    right = run(oracle, image=rgb, generator=seeded(), **call)
    assert ours.images.shape == right.images.shape
    assert rms_rel(ours.latents[-1], right.latents[-1]) < 0.01, "but for the rounding of half-transparent pixels"


def test_grey_and_transparent_arrays_and_tensors(pipe: Any, oracle: Any) -> None:
    call = {"prompt": PROMPTS[0], "strength": 0.5, "output_type": "latent", **SIZE}

    def made(who: Any, image: Any) -> Tensor:
        latents: Tensor = who(image=image, generator=seeded(), **call).images
        return latents

    grey = np.asarray(picture(mode="L")).astype(np.float32) / 255
    right = made(oracle, np.stack([grey] * 3, axis=-1))
    for image in (grey, grey[..., None], torch.from_numpy(grey)[None], (grey * 255).round().astype(np.uint8)):
        assert rms_rel(made(pipe, image), right) < LATENT_GATE
    with pytest.raises(RuntimeError):
        made(oracle, grey)
    opaque = np.asarray(picture()).astype(np.float32) / 255
    clear = np.concatenate([opaque, np.ones_like(opaque[..., :1])], axis=-1)
    assert rms_rel(made(pipe, clear), made(oracle, opaque)) < LATENT_GATE
    with pytest.raises(RuntimeError):
        made(oracle, clear)
    clear[:64, :, 3] = 0.0  # what is see-through becomes white
    white = opaque.copy()
    white[:64] = 1.0
    assert rms_rel(made(pipe, clear), made(oracle, white)) < LATENT_GATE


def test_bytes_are_scaled(pipe: Any, oracle: Any) -> None:
    """The reference takes bytes for numbers from 0 to 1 and gives noise without a word."""
    call = {"prompt": PROMPTS[0], "strength": 0.5, **SIZE}
    image = np.asarray(picture())
    right = run(oracle, image=image.astype(np.float32) / 255, generator=seeded(), **call)
    assert_same(run(pipe, image=image, generator=seeded(), **call), right)
    wrong = run(oracle, image=image, generator=seeded(), **call)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 0.1


def test_a_picture_for_each_of_several_prompts_times_several_images(pipe: Any, oracle: Any) -> None:
    """The reference pairs pictures and masks with the prompts of others."""
    pictures = [picture(0), picture(9)]
    call = {"strength": 0.5, **SIZE}
    ours = run(pipe, prompt=PROMPTS[:2], image=pictures, num_images_per_prompt=2, generator=seeded(), **call)
    twice = {"prompt": [p for p in PROMPTS[:2] for _ in range(2)], "image": [p for p in pictures for _ in range(2)]}
    right = run(oracle, generator=seeded(), **twice, **call)
    wrong = run(oracle, prompt=PROMPTS[:2], image=pictures, num_images_per_prompt=2, generator=seeded(), **call)
    assert_same(ours, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_custom_timesteps(pipe: Any, oracle: Any) -> None:
    angles = [1.56, 1.2, 0.7, 0.0]
    call = {"prompt": PROMPTS[0], "image": picture(), "num_inference_steps": 3, "timesteps": angles, "strength": 0.6}
    strict = {"max_timesteps": None, "intermediate_timesteps": None, **call, **SIZE}
    with pytest.raises(TypeError, match="num_inference_steps"):
        oracle(**strict)
    ours = run(pipe, generator=seeded(), **strict)
    assert ours.timesteps == pytest.approx([1.2, 0.7])
    plain = oracle.scheduler.set_timesteps

    def patched(timesteps: Any, device: Any, **rest: Any) -> None:
        plain(len(timesteps) - 1, timesteps=timesteps, device=device, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle.scheduler, "set_timesteps", patched)
        # It takes the number of angles for that of the steps.
        patch.setattr(oracle, "get_timesteps", lambda _, s, device: type(oracle).get_timesteps(oracle, 3, s, device))
        assert_same(ours, run(oracle, generator=seeded(), **strict))


# The documented form


def test_default_arguments_are_the_documented_ones() -> None:
    def normal(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    cls, reference = SanaSprintImg2ImgPipeline, diffusers.SanaSprintImg2ImgPipeline
    for name in ("__call__", "encode_prompt", "__init__"):
        ours = inspect.signature(getattr(cls, name)).parameters
        theirs = inspect.signature(getattr(reference, name)).parameters
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert normal(ours[key].default) == normal(value.default), key
    assert list(cls._callback_tensor_inputs) == reference._callback_tensor_inputs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strength": 1.1}, r"The value of strength should in \[0.0, 1.0\] but is 1.1"),
        ({"strength": -0.1}, r"The value of strength should in \[0.0, 1.0\] but is -0.1"),
        ({"strength": 0.0}, "After adjusting the num_inference_steps by strength parameter: 0.0"),
        ({"image": [picture(), picture(), picture()], "num_images_per_prompt": 2}, "Cannot duplicate `image`"),
    ],
)
def test_documented_errors(pipe: Any, oracle: Any, changes: dict[str, Any], words: str) -> None:
    call = {"prompt": PROMPTS[0], "image": picture(), **SIZE, **changes}
    for who in (pipe, oracle):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            who(**call)
        if who is pipe or isinstance(caught.value, ValueError):
            assert re.search(words, str(caught.value))
