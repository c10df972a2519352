"""SanaPipeline against the reference: latents at every step, pictures, embeddings. Oracle: diffusers 0.42.1."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from reference_pipelines import LATENT_GATE, PROMPTS, SIZE, assert_same, oracle_of, rms_rel, run, seeded
from sana import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline
from tiny_model import make_tiny_parts, tiny_transformer


@pytest.fixture(scope="module")
def pipe(tiny_parts: Any) -> SanaPipeline:
    made = SanaPipeline(**tiny_parts.components)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def oracle(pipe: SanaPipeline) -> Any:
    return oracle_of(pipe)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
@pytest.mark.parametrize(("prompts", "images"), [(1, 1), (1, 2), (2, 1), (3, 1)])
def test_prompts_images_and_guidance(pipe: Any, oracle: Any, prompts: int, images: int, guidance: float) -> None:
    call = {"prompt": PROMPTS[:prompts], "num_images_per_prompt": images, "guidance_scale": guidance, **SIZE}
    ours = run(pipe, generator=seeded(), num_inference_steps=4, **call)
    assert ours.images.shape == (prompts * images, 128, 96, 3)
    assert_same(ours, run(oracle, generator=seeded(), num_inference_steps=4, **call))


def test_twenty_steps_with_a_negative_prompt(pipe: Any, oracle: Any) -> None:
    call = {"prompt": PROMPTS[0], "negative_prompt": "a blurry picture", **SIZE}
    assert_same(run(pipe, generator=seeded(), **call), run(oracle, generator=seeded(), **call))


def test_one_negative_prompt_per_prompt(pipe: Any, oracle: Any) -> None:
    call = {"prompt": PROMPTS[:2], "negative_prompt": ["grey", "a dog on a lawn"], "num_inference_steps": 3, **SIZE}
    assert_same(run(pipe, generator=seeded(), **call), run(oracle, generator=seeded(), **call))


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(pipe: Any, oracle: Any, steps: int) -> None:
    call = {"prompt": PROMPTS[0], "num_inference_steps": steps, **SIZE}
    assert_same(run(pipe, generator=seeded(), **call), run(oracle, generator=seeded(), **call))


def test_several_prompts_times_several_images(pipe: Any, oracle: Any) -> None:
    """The reference pairs the embeddings of one prompt with the mask of another; here each keeps its own."""
    call = {"num_inference_steps": 3, **SIZE}
    ours = run(pipe, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=seeded(), **call)
    right = run(oracle, prompt=[p for p in PROMPTS[:2] for _ in range(2)], generator=seeded(), **call)
    wrong = run(oracle, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=seeded(), **call)
    assert_same(ours, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_a_list_of_generators_gives_each_image_its_own(pipe: Any, oracle: Any) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator("cpu").manual_seed(seed) for seed in (5, 6)]

    call = {"prompt": PROMPTS[0], "num_images_per_prompt": 2, "num_inference_steps": 2, **SIZE}
    ours = run(pipe, generator=generators(), **call)
    assert_same(ours, run(oracle, generator=generators(), **call))
    alone = run(pipe, generator=generators()[1], **{**call, "num_images_per_prompt": 1})
    assert rms_rel(ours.latents[-1][1:], alone.latents[-1]) < LATENT_GATE


@pytest.mark.parametrize("size", [(512, 512), (300, 500), (720, 200)])
def test_resolution_binning(size: tuple[int, int]) -> None:
    pipe = SanaPipeline(**make_tiny_parts(sample_size=16).components)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "height": size[0], "width": size[1], "num_inference_steps": 2}
    ours = run(pipe, generator=seeded(), **call)
    assert ours.images.shape == (1, *size, 3)
    assert_same(ours, run(oracle_of(pipe), generator=seeded(), **call))


def test_given_latents_and_embeddings(pipe: Any, oracle: Any) -> None:
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS[:2], negative_prompt="grey")
    call = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "latents": torch.randn(2, 4, 4, 3, generator=seeded()),
        "num_inference_steps": 3,
        **SIZE,
    }
    assert_same(run(pipe, **call), run(oracle, **call))


def test_embeddings_without_negative_ones(pipe: Any, oracle: Any) -> None:
    embeds, mask, *_ = pipe.encode_prompt(PROMPTS[:1], do_classifier_free_guidance=False)
    call = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "num_inference_steps": 2, **SIZE}
    assert_same(run(pipe, generator=seeded(), **call), run(oracle, generator=seeded(), **call))


def test_a_row_without_any_token_reads_everything(pipe: Any, oracle: Any) -> None:
    embeds, mask, *_ = pipe.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    mask[1] = 0
    call = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 1.0, "num_inference_steps": 2}
    ours, theirs = (run(p, generator=seeded(), **call, **SIZE) for p in (pipe, oracle))
    assert rms_rel(ours.latents[-1], theirs.latents[-1]) < 1e-3  # the reference rounds its scores by 10,000


@pytest.mark.parametrize("instruction", [None, ["Draw this: "], []])
def test_other_instructions_and_lengths(pipe: Any, oracle: Any, instruction: list[str] | None) -> None:
    call = {"prompt": PROMPTS[:2], "complex_human_instruction": instruction, "max_sequence_length": 40, **SIZE}
    ours = run(pipe, generator=seeded(), num_inference_steps=2, **call)
    assert_same(ours, run(oracle, generator=seeded(), num_inference_steps=2, **call))


def test_flow_euler(pipe: Any) -> None:
    euler = SanaPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
    euler.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 5, **SIZE}
    assert_same(run(euler, generator=seeded(), **call), run(oracle_of(euler), generator=seeded(), **call))


def test_the_references_own_scheduler_object_drives_the_loop(pipe: Any, oracle: Any) -> None:
    foreign = SanaPipeline(**{**pipe.components, "scheduler": copy.deepcopy(oracle.scheduler)})
    foreign.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 4, **SIZE}
    assert_same(run(foreign, generator=seeded(), **call), run(oracle, generator=seeded(), **call))


def test_custom_sigmas_of_flow_euler(pipe: Any) -> None:
    euler = SanaPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)})
    euler.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "sigmas": [1.0, 0.7, 0.2], **SIZE}
    assert_same(run(euler, generator=seeded(), **call), run(oracle_of(euler), generator=seeded(), **call))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "rms_norm_across_heads", "interpolation_scale": 1.0},
        {"out_channels": 8},
        {"timestep_scale": 0.001, "qk_norm": "rms_norm_across_heads"},
        {"patch_size": 2},
    ],
    ids=["positions", "learned-sigma", "teacher", "patches"],
)
def test_other_transformers(pipe: Any, changes: dict[str, Any]) -> None:
    other = SanaPipeline(**{**pipe.components, "transformer": tiny_transformer(**changes)})
    other.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 3, **SIZE, "width": 192}
    assert_same(run(other, generator=seeded(), **call), run(oracle_of(other), generator=seeded(), **call))


@pytest.mark.parametrize("switch", ["tiling", "slicing"])
def test_tiling_and_slicing(pipe: Any, switch: str) -> None:
    ours = SanaPipeline(**{**pipe.components, "vae": copy.deepcopy(pipe.vae)})
    ours.set_progress_bar_config(disable=True)
    oracle = oracle_of(ours)
    getattr(ours, f"enable_vae_{switch}")()
    getattr(oracle.vae, f"enable_{switch}")()
    for vae in (ours.vae, oracle.vae):
        vae.tile_sample_min_height = vae.tile_sample_min_width = 64
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 32
    if switch == "tiling":
        oracle.vae.tile_latent_min_height = oracle.vae.tile_latent_min_width = 2
    call = {"prompt": PROMPTS[:2], "num_inference_steps": 1, **SIZE}
    assert_same(run(ours, generator=seeded(), **call), run(oracle, generator=seeded(), **call))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_the_references_own_noise(pipe: Any, oracle: Any, dtype: torch.dtype) -> None:
    half = SanaPipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer).to(dtype)})
    half.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 4, **SIZE}
    exact = run(oracle, generator=seeded(), **call).latents[-1]
    theirs = run(oracle_of(half), generator=seeded(), **call).latents[-1]
    ours = run(half, generator=seeded(), **call).latents[-1]
    noise = rms_rel(theirs, exact)
    assert 0 < rms_rel(ours, exact) < 1.5 * noise
    assert rms_rel(ours, theirs) < 1.5 * noise


def test_encode_prompt_has_the_documented_shapes_and_values(pipe: Any, oracle: Any) -> None:
    ours = pipe.encode_prompt(PROMPTS, negative_prompt="grey", complex_human_instruction=["Draw: "])
    with torch.no_grad():
        theirs = oracle.encode_prompt(PROMPTS, negative_prompt="grey", complex_human_instruction=["Draw: "])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
    for embeds, mask in ((0, 1), (2, 3)):
        assert torch.equal(ours[mask], theirs[mask])
        valid = ours[mask].bool()
        assert rms_rel(ours[embeds][valid], theirs[embeds][valid]) < LATENT_GATE
        assert ours[embeds][~valid].abs().max() == 0
    unguided = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False, max_sequence_length=7)
    assert unguided[0].shape == (1, 7, 32)
    assert unguided[2:] == (None, None)


def test_encode_prompt_repeats_embeddings_and_masks_alike(pipe: Any) -> None:
    single = pipe.encode_prompt(PROMPTS[:2])
    double = pipe.encode_prompt(PROMPTS[:2], num_images_per_prompt=2)
    for one, two in zip(single, double, strict=True):
        assert torch.equal(two, one[[0, 0, 1, 1]])


def test_the_callback_sees_the_documented_tensors(pipe: Any, oracle: Any) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    seen: dict[Any, list[dict[str, Tensor]]] = {}

    def keep(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert list(tensors) == names
        seen.setdefault(who, []).append(dict(tensors))
        return tensors

    for who in (pipe, oracle):
        who(
            PROMPTS[:2],
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=names,
            generator=seeded(),
            num_inference_steps=2,
            output_type="latent",
            **SIZE,
        )
    for ours, theirs in zip(seen[pipe], seen[oracle], strict=True):
        for name in names:
            assert ours[name].shape == theirs[name].shape
            assert ours[name].dtype == theirs[name].dtype


def test_replaced_latents_and_embeddings_take_effect_alike(pipe: Any, oracle: Any) -> None:
    """The reference replaces the concatenated embeddings; so do we, and rebuild what was computed from them."""

    def change(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == 0:
            return {"latents": tensors["latents"] * 0.5}
        if index == 1:
            return {"prompt_embeds": tensors["prompt_embeds"].roll(1, dims=-1) * 1.5}
        return {}

    def final(who: Any, callback: Any) -> Tensor:
        names = ["latents", "prompt_embeds"]
        arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        latents: Tensor = who(
            PROMPTS[:2], generator=seeded(), num_inference_steps=5, output_type="latent", **arguments, **SIZE
        ).images
        return latents

    ours = final(pipe, change)
    assert rms_rel(ours, final(oracle, change)) < LATENT_GATE
    assert rms_rel(ours, final(pipe, lambda *_: {})) > 0.01


def test_default_arguments_are_the_documented_ones() -> None:
    import inspect

    def normal(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for name in ("__call__", "encode_prompt"):
        ours = inspect.signature(getattr(SanaPipeline, name)).parameters
        theirs = inspect.signature(getattr(diffusers.SanaPipeline, name)).parameters
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert normal(ours[key].default) == normal(value.default), key


def test_folders_work_both_ways(tiny_folder: Any, tmp_path: Any) -> None:
    """What we save the reference loads, and what it saves we load, with the same picture."""
    theirs = diffusers.SanaPipeline.from_pretrained(tiny_folder)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SanaPipeline.from_pretrained(tmp_path / "theirs")
    ours.set_progress_bar_config(disable=True)
    assert isinstance(ours.scheduler, DPMSolverMultistepScheduler)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, **SIZE}
    assert_same(run(ours, generator=seeded(), **call), run(theirs, generator=seeded(), **call))
