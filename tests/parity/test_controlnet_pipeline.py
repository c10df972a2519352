"""SanaControlNetPipeline against the reference, per step, and where that fails or errs. Oracle: diffusers 0.42.1."""

import copy
import inspect
import random
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reference_pipelines import LATENT_GATE, PROMPTS, SIZE, assert_same, oracle_of, quiet, rms_rel, run, seeded
from sana import FlowMatchEulerDiscreteScheduler, SanaControlNetModel, SanaControlNetPipeline, SanaPipeline
from tiny_model import make_tiny_parts, tiny_controlnet, tiny_transformer


def make(**changes: Any) -> SanaControlNetPipeline:
    parts = make_tiny_parts(**{"num_layers": 3, **changes})
    return quiet(SanaControlNetPipeline(**parts.components, controlnet=tiny_controlnet(parts.transformer)))


@pytest.fixture(scope="module")
def pipe() -> SanaControlNetPipeline:
    return make()


@pytest.fixture(scope="module")
def oracle(pipe: SanaControlNetPipeline) -> Any:
    return oracle_of(pipe)


def picture(seed: int = 0, size: tuple[int, int] = (96, 128), mode: str = "RGB") -> Image.Image:
    """Black and white blobs in that size (width, height)."""
    made = np.random.default_rng(seed).integers(0, 2, (6, 5, 3), dtype=np.uint8) * 255
    return Image.fromarray(made).resize(size, Image.Resampling.NEAREST).convert(mode)


def drawn(seed: int) -> dict[str, Any]:
    """Return a call drawn at random, which the reference carries out rightly."""
    draw = random.Random(seed)
    prompts, images = draw.choice([(1, 1), (1, 2), (2, 1), (3, 1)])
    height, width = 32 * draw.randint(1, 5), 32 * draw.randint(1, 5)
    kind = draw.choice(["pil", "pil list", "array", "tensor"])
    # A picture for each prompt, times the images of each, is put in order by the reference; one serves all.
    count = draw.choice([1, prompts])
    size = (width, height) if kind == "tensor" else draw.choice([(width, height), (77, 150)])
    pictures = [picture(seed + i, size) for i in range(count)]
    arrays = np.stack([np.asarray(one) for one in pictures]).astype(np.float32) / 255
    call: dict[str, Any] = {
        "prompt": PROMPTS[:prompts],
        "negative_prompt": draw.choice(["", "a blurry picture"]),
        "control_image": {
            "pil": pictures[0] if count == 1 else pictures,
            "pil list": pictures,
            "array": arrays,
            "tensor": torch.from_numpy(arrays).permute(0, 3, 1, 2) * 2 - 1,
        }[kind],
        "controlnet_conditioning_scale": draw.choice([1.0, draw.uniform(-1, 2), 0.0]),
        "num_images_per_prompt": images,
        "num_inference_steps": draw.choice([1, 2, 3, 5]),
        "guidance_scale": draw.uniform(1.1, 8),
        "height": height,
        "width": width,
        "use_resolution_binning": False,
        "complex_human_instruction": None,
    }
    if draw.random() < 0.4:
        call |= {"guidance_scale": 1.0, "negative_prompt": ""}
    if draw.random() < 0.3:
        call["latents"] = torch.randn(prompts * images, 4, height // 32, width // 32, generator=seeded(seed))
    return call


@pytest.mark.parametrize("seed", range(12))
def test_calls_drawn_at_random(pipe: Any, oracle: Any, seed: int) -> None:
    call = drawn(seed)
    assert_same(run(pipe, generator=seeded(seed), **call), run(oracle, generator=seeded(seed), **call))


def test_twenty_steps_with_the_documented_defaults(pipe: Any, oracle: Any) -> None:
    call = {"prompt": PROMPTS[0], "control_image": picture(), **SIZE}
    ours = run(pipe, generator=seeded(), **call)
    assert_same(ours, run(oracle, generator=seeded(), **call))
    free = run(quiet(SanaPipeline.from_pipe(pipe)), prompt=PROMPTS[0], generator=seeded(), **SIZE)
    assert rms_rel(ours.latents[-1], free.latents[-1]) > 0.01


@pytest.mark.parametrize("size", [(300, 500), (512, 512)])
def test_resolution_binning_resizes_the_control(size: tuple[int, int]) -> None:
    pipe = make(sample_size=16)
    call = {"prompt": PROMPTS[0], "control_image": picture(), "num_inference_steps": 1}
    call |= {"height": size[0], "width": size[1]}
    ours = run(pipe, generator=seeded(), **call)
    assert ours.images.shape == (1, *size, 3)
    assert_same(ours, run(oracle_of(pipe), generator=seeded(), **call))


def test_a_tensor_says_what_size_is_drawn(pipe: Any, oracle: Any) -> None:
    control = torch.rand(1, 3, 160, 64, generator=seeded()) * 2 - 1
    call = {"prompt": PROMPTS[0], "control_image": control, "num_inference_steps": 2, **SIZE}
    ours = run(pipe, generator=seeded(), **call)
    assert ours.images.shape == (1, 160, 64, 3)
    assert_same(ours, run(oracle, generator=seeded(), **call))


def test_flow_euler(pipe: Any) -> None:
    euler = quiet(SanaControlNetPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)))
    call = {"prompt": PROMPTS[0], "control_image": picture(), "num_inference_steps": 3, **SIZE}
    assert_same(run(euler, generator=seeded(), **call), run(oracle_of(euler), generator=seeded(), **call))


@pytest.mark.parametrize(
    "changes",
    [{"interpolation_scale": 1.0}, {"patch_size": 2}, {"qk_norm": "rms_norm_across_heads"}],
    ids=["positions", "patches", "normalised"],
)
def test_other_transformers(changes: dict[str, Any]) -> None:
    parts = make_tiny_parts(**changes, num_layers=3)
    plain = tiny_transformer(**{**changes, "num_layers": 3, "qk_norm": None})
    pipe = quiet(SanaControlNetPipeline(**parts.components, controlnet=tiny_controlnet(plain)))
    call = {"prompt": PROMPTS[0], "control_image": picture(), "num_inference_steps": 2, **SIZE, "width": 192}
    assert_same(run(pipe, generator=seeded(), **call), run(oracle_of(pipe), generator=seeded(), **call))


def test_half_precision_stays_within_the_references_own_noise(pipe: Any, oracle: Any) -> None:
    halves = {name: copy.deepcopy(getattr(pipe, name)).bfloat16() for name in ("transformer", "controlnet")}
    half = quiet(SanaControlNetPipeline(**{**pipe.components, **halves}))
    call = {"prompt": PROMPTS[0], "control_image": picture(), "num_inference_steps": 4, **SIZE}
    exact = run(oracle, generator=seeded(), **call).latents[-1]
    reference = oracle_of(half)
    encode = reference.vae.encode
    # The reference hands the network the control as the VAE gives it, and fails if that has another dtype.
    reference.vae.encode = lambda image: type("Encoded", (), {"latent": encode(image).latent.bfloat16()})
    theirs = run(reference, generator=seeded(), **call).latents[-1]
    ours = run(half, generator=seeded(), **call).latents[-1]
    noise = rms_rel(theirs, exact)
    assert 0 < rms_rel(ours, exact) < 1.5 * noise
    assert rms_rel(ours, theirs) < 1.5 * noise


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_callbacks_see_the_documented_tensors(pipe: Any, oracle: Any, guidance: float) -> None:
    names = ["latents", "control_image", "prompt_embeds", "negative_prompt_embeds"]
    assert list(pipe._callback_tensor_inputs) == oracle._callback_tensor_inputs
    seen: dict[Any, list[dict[str, Tensor]]] = {pipe: [], oracle: []}

    def keep(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen[who].append(dict(tensors))
        return {"control_image": tensors["control_image"] * 0}  # without effect, as documented

    made = [
        who(
            PROMPTS[:2],
            control_image=[picture(0), picture(1)],
            guidance_scale=guidance,
            generator=seeded(),
            num_inference_steps=2,
            output_type="latent",
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=names,
            **SIZE,
        ).images
        for who in (pipe, oracle)
    ]
    assert rms_rel(*made) < LATENT_GATE
    for ours, theirs in zip(seen[pipe], seen[oracle], strict=True):
        assert rms_rel(ours["control_image"], theirs["control_image"]) < LATENT_GATE
        assert ours["prompt_embeds"].shape == theirs["prompt_embeds"].shape
        assert (ours["negative_prompt_embeds"] is None) == (theirs["negative_prompt_embeds"] is None)


# Where the reference fails, or is silently wrong


def test_scales_in_a_list(pipe: Any, oracle: Any) -> None:
    call = {"prompt": PROMPTS[:2], "control_image": picture(), "num_inference_steps": 2, **SIZE}
    with pytest.raises(TypeError):
        oracle(controlnet_conditioning_scale=[0.5], **call)
    ours = run(pipe, generator=seeded(), controlnet_conditioning_scale=[0.5], **call)
    assert_same(ours, run(oracle, generator=seeded(), controlnet_conditioning_scale=0.5, **call))
    each = run(pipe, generator=seeded(), controlnet_conditioning_scale=[0.5, 1.5], **call)
    for row, scale in enumerate((0.5, 1.5)):
        alone = run(oracle, generator=seeded(), controlnet_conditioning_scale=scale, **call)
        assert rms_rel(each.latents[-1][row], alone.latents[-1][row]) < LATENT_GATE


def test_several_networks_add_up(pipe: Any) -> None:
    """Two networks at half strength are one at full strength; the reference knows only one."""
    two = quiet(SanaControlNetPipeline.from_pipe(pipe, controlnet=[pipe.controlnet, pipe.controlnet]))
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, **SIZE}
    one = run(pipe, control_image=picture(), controlnet_conditioning_scale=1.0, generator=seeded(), **call)
    pictures = [picture(), picture()]
    for scales in ([0.25, 0.75], 0.5):
        ours = run(two, control_image=pictures, controlnet_conditioning_scale=scales, generator=seeded(), **call)
        assert_same(ours, one)
    oracle = oracle_of(pipe)
    with pytest.raises(AttributeError, match="'list' object"):
        oracle.controlnet = [oracle.controlnet, oracle.controlnet]


def test_a_network_is_joined_as_it_says_itself(pipe: Any, tmp_path: Path) -> None:
    """One that was trained beside block 0, as the original code joins it, draws otherwise; it may stand with others."""
    native = copy.deepcopy(pipe.controlnet)
    native.wiring = "native"
    native.save_pretrained(tmp_path)
    read = SanaControlNetModel.from_pretrained(tmp_path)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, **SIZE}
    plain = run(pipe, control_image=picture(), generator=seeded(), **call).latents[-1]
    joined = quiet(SanaControlNetPipeline.from_pipe(pipe, controlnet=read))
    ours = run(joined, control_image=picture(), generator=seeded(), **call).latents[-1]
    assert rms_rel(ours, plain) > 1e-3
    both = quiet(SanaControlNetPipeline.from_pipe(pipe, controlnet=[pipe.controlnet, read]))
    for scales, expected in (([1.0, 0.0], plain), ([0.0, 1.0], ours)):
        options = {"control_image": [picture(), picture()], "controlnet_conditioning_scale": scales}
        assert rms_rel(run(both, generator=seeded(), **options, **call).latents[-1], expected) < LATENT_GATE


def test_start_and_end_of_the_control(pipe: Any, oracle: Any) -> None:
    """Outside of its share of the steps the control acts as at scale 0."""
    call = {"prompt": PROMPTS[0], "control_image": picture(), "num_inference_steps": 4, **SIZE}
    ours = run(pipe, generator=seeded(), control_guidance_start=0.25, control_guidance_end=0.75, **call)
    plain, step = oracle.controlnet.forward, iter(range(4))

    def sometimes(*words: Any, conditioning_scale: float, **rest: Any) -> Any:
        return plain(*words, conditioning_scale=float(next(step) in (1, 2)), **rest)

    right = copy.copy(oracle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(right.controlnet, "forward", sometimes)
        assert_same(ours, run(right, generator=seeded(), **call))


def test_latents_as_control(pipe: Any, oracle: Any) -> None:
    pixels = torch.rand(1, 3, 128, 96, generator=seeded()) * 2 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, **SIZE}
    with pytest.raises(RuntimeError):
        oracle(control_image=latents, **call)
    ours = run(pipe, control_image=latents, generator=seeded(), **call)
    assert_same(ours, run(oracle, control_image=pixels, generator=seeded(), **call))


@pytest.mark.parametrize("mode", ["L", "RGBA", "1"])
def test_pictures_that_are_not_rgb(pipe: Any, oracle: Any, mode: str) -> None:
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, **SIZE}
    image = picture(mode=mode)
    with pytest.raises((RuntimeError, ValueError)):
        oracle(control_image=image, **call)
    right = run(oracle, control_image=image.convert("RGB"), generator=seeded(), **call)
    assert_same(run(pipe, control_image=image, generator=seeded(), **call), right)


def test_several_prompts_times_several_images(pipe: Any, oracle: Any) -> None:
    call = {"num_inference_steps": 2, **SIZE}
    pictures = [picture(0), picture(5)]
    ours = run(pipe, prompt=PROMPTS[:2], control_image=pictures, num_images_per_prompt=2, generator=seeded(), **call)
    twice = {"prompt": [p for p in PROMPTS[:2] for _ in range(2)], "control_image": [p for p in pictures for _ in "12"]}
    right = run(oracle, generator=seeded(), **twice, **call)
    wrong = run(oracle, prompt=PROMPTS[:2], control_image=pictures, num_images_per_prompt=2, generator=seeded(), **call)
    assert_same(ours, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_the_picture_is_encoded_once_and_embedded_once(pipe: Any) -> None:
    """Not once more for guidance, and not in every step, as in the reference."""
    counted: list[int] = []
    handles = [
        pipe.vae.encoder.register_forward_hook(lambda _, words, __: counted.append(len(words[0]))),
        pipe.controlnet.input_block.register_forward_hook(lambda *_: counted.append(-1)),
    ]
    pipe(PROMPTS[0], control_image=picture(), num_inference_steps=3, num_images_per_prompt=2, **SIZE)
    for handle in handles:
        handle.remove()
    assert counted == [1, -1]


# The documented form


def test_default_arguments_are_the_documented_ones() -> None:
    def normal(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    cls, reference = SanaControlNetPipeline, diffusers.SanaControlNetPipeline
    for name in ("__call__", "encode_prompt", "__init__"):
        ours = inspect.signature(getattr(cls, name)).parameters
        theirs = inspect.signature(getattr(reference, name)).parameters
        beyond = [key for key, value in ours.items() if value.kind is value.KEYWORD_ONLY]
        assert list(ours) == [*theirs, *beyond]
        assert beyond == (["control_guidance_start", "control_guidance_end"] if name == "__call__" else [])
        for key, value in theirs.items():
            assert normal(ours[key].default) == normal(value.default), key


def test_what_is_no_control_network_is_refused_in_the_documented_words(pipe: Any, oracle: Any) -> None:
    for who in (SanaControlNetPipeline(**{**pipe.components, "controlnet": pipe.vae}), copy.copy(oracle)):
        if who is not pipe:
            who.controlnet = who.vae
        with pytest.raises(ValueError, match="`controlnet` must be of type `SanaControlNetModel`"):
            who(PROMPTS[0], control_image=picture(), **SIZE)
