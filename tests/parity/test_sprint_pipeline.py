"""SanaSprintPipeline against the reference, per step, and where the reference fails. Oracle: diffusers 0.42.1."""

import copy
import inspect
import random
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from reference_pipelines import LATENT_GATE, PROMPTS, SIZE, assert_same, oracle_of, quiet, rms_rel, run, seeded
from sana import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline, SCMScheduler
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION
from tiny_model import make_tiny_sprint


@pytest.fixture(scope="module")
def pipe() -> SanaSprintPipeline:
    return quiet(SanaSprintPipeline(**make_tiny_sprint().components))


@pytest.fixture(scope="module")
def oracle(pipe: SanaSprintPipeline) -> Any:
    return oracle_of(pipe)


def drawn(seed: int) -> dict[str, Any]:
    """Return a call drawn at random, which the reference carries out rightly."""
    draw = random.Random(seed)
    steps = draw.choice([1, 2, 2, 3, 4, 7])
    prompts, images = draw.choice([(1, 1), (1, 2), (2, 1), (3, 1)])
    call: dict[str, Any] = {
        "prompt": PROMPTS[:prompts],
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "guidance_scale": draw.choice([1.0, 4.5, 5.0, draw.uniform(0, 8)]),
        "max_timesteps": draw.choice([1.57080, draw.uniform(1.4, 1.57)]),
        "intermediate_timesteps": draw.choice([1.3, 1.0, None]) if steps == 2 else None,
        "height": 32 * draw.randint(1, 5),
        "width": 32 * draw.randint(1, 5),
        "use_resolution_binning": False,
        "max_sequence_length": draw.choice([300, 30]),
        "complex_human_instruction": draw.choice([None, ["Draw this: "]]),
    }
    if draw.random() < 0.4:
        shape = (prompts * images, 4, call["height"] // 32, call["width"] // 32)
        call["latents"] = torch.randn(shape, generator=seeded(seed))
    return call


@pytest.mark.parametrize("seed", range(10))
def test_calls_drawn_at_random(pipe: Any, oracle: Any, seed: int) -> None:
    call = drawn(seed)
    ours, theirs = seeded(seed), seeded(seed)
    assert_same(run(pipe, generator=ours, **call), run(oracle, generator=theirs, **call))
    assert torch.equal(ours.get_state(), theirs.get_state()), "the generator is left as the reference leaves it"


def test_the_documented_defaults(pipe: Any, oracle: Any) -> None:
    """Two steps, 1.5708 and 1.3; the prompt goes behind the documented instruction."""
    call = {"prompt": PROMPTS[0], **SIZE}
    assert_same(run(pipe, generator=seeded(), **call), run(oracle, generator=seeded(), **call))
    assert (pipe.num_timesteps, pipe.guidance_scale) == (2, 4.5)
    assert not hasattr(pipe, "do_classifier_free_guidance")


def test_resolution_binning() -> None:
    pipe = quiet(SanaSprintPipeline(**make_tiny_sprint(sample_size=32).components))
    call = {"prompt": PROMPTS[0], "height": 300, "width": 900, "num_inference_steps": 1}
    call |= {"intermediate_timesteps": None, "complex_human_instruction": None}
    ours = run(pipe, generator=seeded(), **call)
    assert ours.images.shape == (1, 300, 900, 3)
    assert_same(ours, run(oracle_of(pipe), generator=seeded(), **call))


def test_a_list_of_generators(pipe: Any, oracle: Any) -> None:
    def generators() -> list[torch.Generator]:
        return [seeded(5), seeded(6)]

    call = {"prompt": PROMPTS[:2], **SIZE}
    ours, theirs = generators(), generators()
    assert_same(run(pipe, generator=ours, **call), run(oracle, generator=theirs, **call))
    assert all(torch.equal(one.get_state(), two.get_state()) for one, two in zip(ours, theirs, strict=True))


def test_the_guidance_is_rounded_in_the_published_order(pipe: Any) -> None:
    """The scale is rounded to the dtype of the embeddings before its factor, as a model in bfloat16 was trained."""
    half = quiet(SanaSprintPipeline(**{**pipe.components, "text_encoder": copy.deepcopy(pipe.text_encoder).bfloat16()}))
    oracle = oracle_of(half)
    call = {"prompt": PROMPTS[0], "guidance_scale": 4.513, "num_inference_steps": 1, **SIZE}
    call["intermediate_timesteps"] = None
    theirs = run(oracle, generator=seeded(), **call)
    assert_same(run(half, generator=seeded(), **call), theirs)
    rounded = float(torch.tensor(4.513).bfloat16())
    assert_same(run(half, generator=seeded(), **{**call, "guidance_scale": rounded}), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_the_references_own_noise(pipe: Any, oracle: Any, dtype: torch.dtype) -> None:
    half = quiet(SanaSprintPipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer).to(dtype)}))
    call = {"prompt": PROMPTS[0], **SIZE}
    exact = run(oracle, generator=seeded(), **call).latents[-1]
    theirs = run(oracle_of(half), generator=seeded(), **call).latents[-1]
    ours = run(half, generator=seeded(), **call).latents[-1]
    noise = rms_rel(theirs, exact)
    assert 0 < rms_rel(ours, exact) < 1.5 * noise
    assert rms_rel(ours, theirs) < 1.5 * noise


def test_the_references_own_scheduler_object_drives_the_loop(pipe: Any, oracle: Any) -> None:
    foreign = quiet(SanaSprintPipeline(**{**pipe.components, "scheduler": copy.deepcopy(oracle.scheduler)}))
    for steps in (1, 2, 3):
        call = {"prompt": PROMPTS[0], "num_inference_steps": steps, **SIZE}
        right = {**call, "intermediate_timesteps": 1.3 if steps == 2 else None}
        assert_same(run(foreign, generator=seeded(), **call), run(oracle, generator=seeded(), **right))


def test_another_sigma_data_of_the_scheduler(pipe: Any) -> None:
    other = quiet(SanaSprintPipeline(**{**pipe.components, "scheduler": SCMScheduler(sigma_data=0.8)}))
    call = {"prompt": PROMPTS[0], **SIZE}
    assert_same(run(other, generator=seeded(), **call), run(oracle_of(other), generator=seeded(), **call))


# Callbacks


def test_callbacks_see_and_change_trigflow_latents(pipe: Any, oracle: Any) -> None:
    """The state is TrigFlow's times sigma_data; what is returned replaces it, but the end is the last prediction."""

    def change(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == 1:
            return {"latents": tensors["latents"] * 0.5 + 0.1}
        if index == 2:
            return {"prompt_embeds": tensors["prompt_embeds"].roll(1, dims=-1) * 1.5}
        if index == 3:
            tensors["latents"] *= 0.7
            return tensors
        return {"latents": tensors["latents"] * 0} if index == 5 else {}

    def final(who: Any, callback: Any) -> Tensor:
        names = ["latents", "prompt_embeds"]
        arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        made: Tensor = who(
            PROMPTS[:2],
            generator=seeded(),
            num_inference_steps=6,
            intermediate_timesteps=None,
            output_type="latent",
            **arguments,
            **SIZE,
        ).images
        return made

    ours = final(pipe, change)
    assert rms_rel(ours, final(oracle, change)) < LATENT_GATE
    assert rms_rel(ours, final(pipe, lambda *_: {})) > 0.01


def test_interrupting_gives_the_last_prediction(pipe: Any, oracle: Any) -> None:
    def stop(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        who._interrupt = index == 1
        return tensors

    call = {"num_inference_steps": 4, "intermediate_timesteps": None, "output_type": "latent", **SIZE}
    made = [who(PROMPTS[0], generator=seeded(), callback_on_step_end=stop, **call).images for who in (pipe, oracle)]
    assert rms_rel(*made) < LATENT_GATE


# Where the reference fails


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_other_numbers_of_steps_with_the_default_middle_angle(pipe: Any, oracle: Any, steps: int) -> None:
    call = {"prompt": PROMPTS[0], "num_inference_steps": steps, **SIZE}
    with pytest.raises(ValueError, match="Intermediate timesteps for SCM is not supported"):
        oracle(**call)
    right = run(oracle, generator=seeded(), intermediate_timesteps=None, **call)
    assert_same(run(pipe, generator=seeded(), **call), right)


@pytest.mark.parametrize("given", ["list", "tensor", "none"])
def test_custom_timesteps(pipe: Any, oracle: Any, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = [1.56, 1.2, 0.7, 0.0]
    call = {"prompt": PROMPTS[0], "num_inference_steps": 3, "timesteps": angles, **SIZE}
    strict = {**call, "max_timesteps": None, "intermediate_timesteps": None}
    with pytest.raises(TypeError, match="num_inference_steps"):
        oracle(**strict)
    plain = oracle.scheduler.set_timesteps

    def patched(timesteps: Any, device: Any, **rest: Any) -> None:
        plain(len(timesteps) - 1, timesteps=timesteps, device=device, **rest)

    right = copy.copy(oracle)
    monkeypatch.setattr(right.scheduler, "set_timesteps", patched)
    if given == "tensor":
        call["timesteps"] = torch.tensor(angles)
    ours = run(pipe, generator=seeded(), **(strict if given == "none" else call))
    assert_same(ours, run(right, generator=seeded(), **strict))


def test_several_prompts_times_several_images(pipe: Any, oracle: Any) -> None:
    """The reference pairs the embeddings of one prompt with the mask of another; here each keeps its own."""
    ours = run(pipe, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=seeded(), **SIZE)
    right = run(oracle, prompt=[p for p in PROMPTS[:2] for _ in range(2)], generator=seeded(), **SIZE)
    wrong = run(oracle, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=seeded(), **SIZE)
    assert_same(ours, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_flow_schedulers_drive_sprint_models_too(pipe: Any, oracle: Any) -> None:
    """The network is told sigma, whatever the scheduler counts in; the reference knows no other scheduler."""
    call = {"prompt": PROMPTS[0], "num_inference_steps": 4, "output_type": "latent", **SIZE}
    euler = quiet(SanaSprintPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0)))
    ours = euler(generator=seeded(), **call).images
    theirs = copy.copy(oracle)
    theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    with pytest.raises((AttributeError, TypeError)):
        theirs(generator=seeded(), intermediate_timesteps=None, **call)

    embeds, mask = pipe.encode_prompt(PROMPTS[0], complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION)
    x = torch.randn(1, 4, 4, 3, generator=seeded())
    sigmas = euler.scheduler.sigmas
    for i in range(4):
        with torch.no_grad():
            v = oracle.transformer(
                x,
                encoder_hidden_states=embeds,
                timestep=sigmas[i : i + 1],
                guidance=torch.tensor([0.45]),
                encoder_attention_mask=mask,
            ).sample
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    assert rms_rel(ours, x) < LATENT_GATE


# The documented form


def test_default_arguments_are_the_documented_ones(pipe: Any) -> None:
    def normal(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for name in ("__call__", "encode_prompt", "__init__"):
        ours = inspect.signature(getattr(SanaSprintPipeline, name)).parameters
        theirs = inspect.signature(getattr(diffusers.SanaSprintPipeline, name)).parameters
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert normal(ours[key].default) == normal(value.default), key
    assert list(SanaSprintPipeline._callback_tensor_inputs) == diffusers.SanaSprintPipeline._callback_tensor_inputs


def test_encode_prompt_has_the_documented_shapes_and_values(pipe: Any, oracle: Any) -> None:
    options = {"complex_human_instruction": ["Draw: "], "num_images_per_prompt": 2, "max_sequence_length": 40}
    embeds, mask = pipe.encode_prompt(PROMPTS[0], **options)
    with torch.no_grad():
        their_embeds, their_mask = oracle.encode_prompt(PROMPTS[0], **options)
    assert embeds.shape == their_embeds.shape
    assert torch.equal(mask, their_mask)
    assert rms_rel(embeds[mask.bool()], their_embeds[mask.bool()]) < LATENT_GATE


def test_a_model_of_the_other_kind_is_refused_with_the_right_class(pipe: Any, tiny_parts: Any) -> None:
    plain = quiet(SanaSprintPipeline(**{**tiny_parts.components, "scheduler": SCMScheduler()}))
    with pytest.raises(ValueError, match=r"no SANA-Sprint model.*Use\s+SanaPipeline"):
        plain("a fox", **SIZE)
    with pytest.raises(TypeError):
        oracle_of(plain)("a fox", **SIZE)
    with pytest.raises(ValueError, match=r"is a SANA-Sprint model.*Use\s+SanaSprintPipeline"):
        SanaPipeline.from_pipe(pipe)("a fox", **SIZE)
