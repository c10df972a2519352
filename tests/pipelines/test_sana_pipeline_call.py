"""What a documented call returns, refuses, warns about and lets a callback change."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sana import DPMSolverMultistepScheduler, SanaPipeline, SanaPipelineOutput
from sana.cards import CARDS
from sana.errors import InvalidInput, NonFinite, OutOfMemory
from tiny_model import make_tiny_parts, tiny_transformer

SMALL = {"height": 64, "width": 96, "use_resolution_binning": False, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(tiny_parts: Any) -> SanaPipeline:
    made = SanaPipeline(**tiny_parts.components)
    made.set_progress_bar_config(disable=True)
    return made


def other(pipe: SanaPipeline, **components: Any) -> SanaPipeline:
    made = SanaPipeline(**{**pipe.components, **components})
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def latents(pipe: SanaPipeline, prompt: Any = "a fox", **arguments: Any) -> Tensor:
    call = {"generator": seeded(), **SMALL, **arguments}
    result: Tensor = pipe(prompt, output_type="latent", **call).images
    return result


# What comes back


def test_output_types(pipe: SanaPipeline) -> None:
    made = {
        kind: pipe("a fox", generator=seeded(), output_type=kind, **SMALL).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert isinstance(made["pil"], list)
    assert isinstance(made["pil"][0], Image.Image)
    assert made["np"].shape == (1, 64, 96, 3)
    assert made["np"].dtype == np.float32
    assert made["pt"].shape == (1, 3, 64, 96)
    assert made["latent"].shape == (1, 4, 2, 3)
    assert np.array_equal(np.asarray(made["pil"][0]), (made["np"][0] * 255).round().astype(np.uint8))


def test_output_objects_index_like_tuples(pipe: SanaPipeline) -> None:
    output = pipe("a fox", **SMALL)
    assert isinstance(output, SanaPipelineOutput)
    assert output[0] is output["images"] is output.images
    (images,) = output
    assert images is output.images
    assert output.to_tuple() == (output.images,)
    plain = pipe("a fox", return_dict=False, **SMALL)
    assert isinstance(plain, tuple)
    assert len(plain) == 1


def test_pt_keeps_the_dtype_of_the_vae(pipe: SanaPipeline) -> None:
    half = other(pipe, vae=copy.deepcopy(pipe.vae).to(torch.bfloat16))
    assert half("a fox", output_type="pt", **SMALL).images.dtype == torch.bfloat16
    assert half("a fox", output_type="np", **SMALL).images.dtype == np.float32


@pytest.mark.parametrize("size", [(256, 256), (300, 200)])
def test_the_small_model_draws_its_one_bin_and_resizes(pipe: SanaPipeline, size: tuple[int, int]) -> None:
    call = {"height": size[0], "width": size[1], "num_inference_steps": 1}
    assert pipe("a fox", **call).images[0].size == size[::-1]
    assert pipe("a fox", output_type="latent", **call).images.shape == (1, 4, 8, 8)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(pipe: SanaPipeline) -> None:
    assert torch.equal(latents(pipe), latents(pipe))
    assert not torch.equal(latents(pipe), latents(pipe, generator=seeded(1)))


def test_none_for_the_number_of_images_is_one(pipe: SanaPipeline) -> None:
    assert len(latents(pipe, num_images_per_prompt=None)) == 1


def test_properties_tell_about_the_call(pipe: SanaPipeline) -> None:
    latents(pipe, guidance_scale=3.0, num_inference_steps=3)
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (3.0, 3, False)
    assert pipe.do_classifier_free_guidance
    assert pipe.attention_kwargs is None
    latents(pipe, guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance


# What is refused

EMBEDS, MASK = torch.zeros(1, 5, 32), torch.ones(1, 5)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"height": 65}, "`height` and `width` have to be divisible by 32 but are 65 and 96."),
    ({"width": -32}, "`width` has to be a whole number of at least 1"),
    (
        {"callback_on_step_end_tensor_inputs": ["latents", "x"]},
        "has to be in ['latents', 'prompt_embeds', 'negative_prompt_embeds'], but found ['x']",
    ),
    (
        {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK},
        "Cannot forward both `prompt`: a fox and `prompt_embeds`",
    ),
    (
        {"prompt": None},
        "Provide either `prompt` or `prompt_embeds`. Cannot leave both `prompt` and `prompt_embeds` undefined.",
    ),
    ({"prompt": 3}, "`prompt` has to be of type `str` or `list` but is <class 'int'>"),
    ({"prompt": []}, "`prompt` is an empty list"),
    ({"prompt": ["a", 3]}, "`prompt` has to be a list of `str`"),
    ({"negative_prompt": ["a", "b"]}, "`negative_prompt` has 2 entries but there are 1 prompts"),
    ({"negative_prompt": 3}, "`negative_prompt` has to be of type"),
    (
        {"negative_prompt_embeds": EMBEDS, "negative_prompt": None},
        "Cannot forward both `prompt`: a fox and `negative_prompt_embeds`",
    ),
    (
        {"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK, "negative_prompt_embeds": EMBEDS},
        "Cannot forward both `negative_prompt`:  and `negative_prompt_embeds`",
    ),
    (
        {"prompt": None, "prompt_embeds": EMBEDS},
        "Must provide `prompt_attention_mask` when specifying `prompt_embeds`.",
    ),
    (
        {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": EMBEDS,
            "prompt_attention_mask": MASK,
            "negative_prompt_embeds": EMBEDS,
        },
        "Must provide `negative_prompt_attention_mask` when specifying `negative_prompt_embeds`.",
    ),
    (
        {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": EMBEDS,
            "prompt_attention_mask": MASK,
            "negative_prompt_embeds": torch.zeros(1, 6, 32),
            "negative_prompt_attention_mask": torch.ones(1, 6),
        },
        "`prompt_embeds` and `negative_prompt_embeds` must have the same shape when passed directly, but got: `prompt_",
    ),
    ({"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": torch.ones(1, 4)}, "must be [B, T, E]"),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 5, 31), "prompt_attention_mask": MASK, "guidance_scale": 1.0},
        "width 31, the transformer reads 32",
    ),
    ({"timesteps": [999, 500], "sigmas": [0.9, 0.5]}, "Only one of `timesteps` or `sigmas` can be passed."),
    (
        {"generator": [seeded(), seeded()]},
        "You have passed a list of generators of length 2, but requested an effective batch size of 1. Make sure",
    ),
    ({"generator": 7}, "`generator` has to be a `torch.Generator` or a list of them but is 7."),
    ({"generator": [7]}, "`generator` has to be a `torch.Generator` or a list of them but is [7]."),
    ({"latents": torch.zeros(1, 4, 9, 9)}, "`latents` has shape (1, 4, 9, 9) but this call needs (1, 4, 2, 3)"),
    ({"latents": torch.zeros(2, 4, 2, 3)}, "this call needs (1, 4, 2, 3)"),
    ({"num_inference_steps": 0}, "`num_inference_steps` has to be a whole number of at least 1"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
    ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
    ({"guidance_scale": float("nan")}, "`guidance_scale` has to be a finite number"),
    ({"guidance_scale": float("inf")}, "`guidance_scale` has to be a finite number"),
    ({"guidance_scale": "4.5"}, "`guidance_scale` has to be a finite number"),
    ({"output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, latent"),
    ({"max_sequence_length": 0}, "`max_sequence_length`"),
    ({"timesteps": [500, 999]}, "must fall from step to step"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_cannot_be_honoured_is_refused(pipe: SanaPipeline, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        pipe(**{"prompt": "a fox", **SMALL, **changes})
    assert isinstance(caught.value, InvalidInput)


def test_sizes_without_bins_are_refused(pipe: SanaPipeline) -> None:
    odd = other(pipe, transformer=tiny_transformer(sample_size=7))
    with pytest.raises(ValueError, match="Invalid sample size"):
        odd("a fox", num_inference_steps=1)
    assert odd("a fox", **SMALL).images[0].size == (96, 64)


def test_a_card_refuses_sizes_it_was_not_trained_for(pipe: SanaPipeline) -> None:
    nano = other(pipe)
    nano.parts.card = dataclasses.replace(CARDS["nano"], name="pet")
    with pytest.raises(InvalidInput, match="pet draws 256 x 256 only, not 96 x 64"):
        nano("a fox", **SMALL)
    assert nano("a fox", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


def test_schedulers_that_take_no_custom_levels_say_so(pipe: SanaPipeline) -> None:
    class Fixed(DPMSolverMultistepScheduler):
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
            super().set_timesteps(num_inference_steps, device=device)

    fixed = other(pipe, scheduler=Fixed(flow_shift=3.0))
    with pytest.raises(ValueError, match="does not support custom timestep schedules"):
        fixed("a fox", timesteps=[999, 500], **SMALL)
    with pytest.raises(ValueError, match="does not support custom sigmas schedules"):
        fixed("a fox", sigmas=[0.9, 0.5], **SMALL)


def test_sprint_checkpoints_are_refused_with_the_way_out(pipe: SanaPipeline) -> None:
    with pytest.raises(InvalidInput, match="SANA-Sprint"):
        other(pipe, transformer=tiny_transformer(guidance_embeds=True))("a fox", **SMALL)


@pytest.mark.parametrize("missing", ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"])
def test_missing_parts_are_named(pipe: SanaPipeline, missing: str) -> None:
    with pytest.raises(InvalidInput, match=f"no {missing}"):
        other(pipe, **{missing: None})("a fox", **SMALL)


# What works although the reference fails


def test_custom_timesteps_and_sigmas_work_with_the_default_scheduler(pipe: SanaPipeline) -> None:
    by_time = latents(pipe, timesteps=[999, 700, 300])
    assert pipe.num_timesteps == 3
    by_sigma = latents(pipe, sigmas=[0.999, 0.7, 0.3])
    assert torch.allclose(by_time, by_sigma, atol=1e-6)
    assert not torch.allclose(by_time, latents(pipe, num_inference_steps=3), atol=1e-3)


def test_none_as_negative_prompt_is_the_empty_one(pipe: SanaPipeline) -> None:
    assert torch.equal(latents(pipe, negative_prompt=None), latents(pipe, negative_prompt=""))


def test_embeddings_need_no_text_encoder(pipe: SanaPipeline) -> None:
    embeds, mask, negative, negative_mask = pipe.encode_prompt("a fox")
    given = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
    }
    headless = other(pipe, text_encoder=None, tokenizer=None)
    assert torch.equal(latents(headless, **given), latents(pipe, complex_human_instruction=None))


def test_text_parts_alone_encode(pipe: SanaPipeline) -> None:
    alone = other(pipe, vae=None, transformer=None, scheduler=None)
    assert torch.equal(alone.encode_prompt("a fox")[0], pipe.encode_prompt("a fox")[0])
    assert alone.vae_scale_factor == 32


def test_encode_prompt_checks_its_text_like_a_call(pipe: SanaPipeline) -> None:
    words = re.escape("`negative_prompt` has 1 entries but there are 2 prompts")
    for encode in (pipe, pipe.encode_prompt):
        with pytest.raises(InvalidInput, match=words):
            encode(["a", "b"], negative_prompt=["x"])


def test_encode_prompt_takes_none_as_the_empty_negative_prompt(pipe: SanaPipeline) -> None:
    for ours, empty in zip(
        pipe.encode_prompt("a fox", negative_prompt=None), pipe.encode_prompt("a fox", negative_prompt=""), strict=True
    ):
        assert torch.equal(ours, empty)


# What is accepted with a warning


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eta": 0.5}, "`eta` is ignored"),
        ({"negative_prompt": "grey", "guidance_scale": 1.0}, "`negative_prompt` is ignored"),
        ({"attention_kwargs": {"scale": 0.5}}, "`attention_kwargs` {'scale': 0.5} is ignored"),
        ({"max_sequence_length": 3, "prompt": "a fox in the snow"}, "end of a prompt was not read"),
    ],
)
def test_what_is_ignored_warns(pipe: SanaPipeline, changes: dict[str, Any], words: str) -> None:
    with pytest.warns(UserWarning, match=re.escape(words)):
        ours = latents(pipe, **changes)
    if "eta" in changes or "attention_kwargs" in changes:
        assert torch.equal(ours, latents(pipe))


def test_clean_caption_without_its_packages_warns(pipe: SanaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.warns(UserWarning, match="`clean_caption` is ignored"):
        ours = latents(pipe, "A FOX @somebody", clean_caption=True)
    assert torch.equal(ours, latents(pipe, "A FOX @somebody"))


def test_clean_caption_cleans(pipe: SanaPipeline) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert torch.equal(latents(pipe, "a fox @somebody", clean_caption=True), latents(pipe, "a fox"))


# Callbacks


def test_a_callback_may_interrupt(pipe: SanaPipeline) -> None:
    seen: list[Tensor] = []

    def stop(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        who._interrupt = index == 1
        return tensors

    final = latents(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert len(seen) == 2
    assert torch.equal(final, seen[-1])
    assert pipe.interrupt
    assert torch.equal(latents(pipe, num_inference_steps=5), latents(pipe, num_inference_steps=5))
    assert not pipe.interrupt


def test_a_callback_may_return_nothing(pipe: SanaPipeline) -> None:
    assert torch.equal(latents(pipe, callback_on_step_end=lambda *_: None), latents(pipe))


def test_a_misspelt_tensor_from_a_callback_is_named(pipe: SanaPipeline) -> None:
    with pytest.warns(UserWarning, match="`latent`, which is ignored.*Did you mean 'latents'"):
        latents(pipe, callback_on_step_end=lambda who, i, t, tensors: {"latent": tensors["latents"]})


@pytest.mark.parametrize("in_place", [True, False])
def test_replaced_latents_are_those_of_the_next_step(pipe: SanaPipeline, in_place: bool) -> None:
    def change(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if index == 1 and in_place:
            tensors["latents"].zero_()
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 1 and not in_place else tensors

    assert latents(pipe, callback_on_step_end=change).abs().max() == 0


@pytest.mark.parametrize("in_place", [True, False])
def test_embeddings_changed_in_place_count_too(pipe: SanaPipeline, in_place: bool) -> None:
    def change(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embeds = tensors["prompt_embeds"]
        if index == 0:
            return {"prompt_embeds": embeds.mul_(0.5) if in_place else embeds * 0.5}
        return tensors

    names = ["prompt_embeds"]
    ours = latents(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert not torch.allclose(ours, latents(pipe), atol=1e-4)


def test_returning_the_positive_half_switches_guidance_off(pipe: SanaPipeline) -> None:
    def change(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        who._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if index == 0 else {}

    def keep(into: list[Tensor]) -> Any:
        def callback(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            into.append(tensors["latents"].clone())
            return {}

        return callback

    names = ["latents", "prompt_embeds"]
    ours = latents(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    guided: list[Tensor] = []
    latents(pipe, callback_on_step_end=keep(guided))
    assert torch.isfinite(ours).all()
    assert not torch.allclose(ours, guided[-1], atol=1e-4)


def test_changing_the_property_alone_changes_nothing_else(pipe: SanaPipeline) -> None:
    def grow(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        who._guidance_scale += 1.0
        return tensors

    assert torch.equal(latents(pipe, callback_on_step_end=grow), latents(pipe))
    latents(pipe, callback_on_step_end=grow, guidance_scale=4.0)
    assert pipe.guidance_scale == 4.0 + pipe.num_timesteps


def test_misfitting_replacements_are_refused(pipe: SanaPipeline) -> None:
    names = ["latents", "prompt_embeds"]
    for bad in ({"latents": torch.zeros(1, 4, 9, 9)}, {"prompt_embeds": torch.zeros(2, 7, 32)}):
        with pytest.raises(InvalidInput):
            latents(pipe, callback_on_step_end=lambda *_, bad=bad: bad, callback_on_step_end_tensor_inputs=names)


def test_callback_objects_bring_their_own_tensor_inputs(pipe: SanaPipeline) -> None:
    from diffusers.callbacks import PipelineCallback

    class Note(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]  # noqa: RUF012

        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: Any) -> Any:
            names.append(list(callback_kwargs))
            return callback_kwargs

    names: list[list[str]] = []
    latents(pipe, callback_on_step_end=Note(cutoff_step_ratio=1.0))
    assert names == [["prompt_embeds"]] * 2


# What must never become a picture


def test_non_finite_values_raise(pipe: SanaPipeline) -> None:
    broken = other(pipe, transformer=copy.deepcopy(pipe.transformer))
    with torch.no_grad():
        broken.transformer.proj_out.bias[0] = float("nan")
    for kind in ("pil", "latent"):
        with pytest.raises(NonFinite, match="transformer gave NaN or infinity in step 1 of"):
            broken("a fox", output_type=kind, **SMALL)
    with pytest.raises(NonFinite, match="latents"):
        pipe("a fox", latents=torch.full((1, 4, 2, 3), float("inf")), **SMALL)


def test_a_finished_latent_survives_a_decoder_without_memory(pipe: SanaPipeline) -> None:
    starved = other(pipe, vae=copy.deepcopy(pipe.vae))

    def fail(z: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    starved.vae._decode = fail
    with pytest.raises(OutOfMemory) as caught, pytest.warns(UserWarning, match="Memory ran out while decoding"):
        starved("a fox", generator=seeded(), **SMALL)
    assert torch.equal(caught.value.latents, latents(pipe))


# The bar


def test_the_progress_bar_counts_and_can_be_switched_off(
    pipe: SanaPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = other(pipe)
    loud.set_progress_bar_config(desc="drawing")
    loud("a fox", **SMALL)
    shown = capsys.readouterr().err
    assert "drawing: 100%" in shown
    assert "2/2" in shown
    loud.set_progress_bar_config(disable=True)
    loud("a fox", **SMALL)
    assert capsys.readouterr().err == ""
    with pytest.raises(InvalidInput):
        loud.progress_bar()


def test_a_fresh_model_of_another_size_bins_like_the_published_ones(tmp_path: Path) -> None:
    large = SanaPipeline(**make_tiny_parts(sample_size=16).components)
    large.set_progress_bar_config(disable=True)
    drawn = large("a fox", height=720, width=1280, num_inference_steps=1, output_type="latent").images
    assert drawn.shape == (1, 4, 12, 21)
