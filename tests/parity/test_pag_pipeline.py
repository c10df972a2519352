"""SanaPAGPipeline against the reference, per step, and where that is silently wrong. Oracle: diffusers 0.42.1."""

import copy
import inspect
import random
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reference_pipelines import LATENT_GATE, PROMPTS, SIZE, assert_same, oracle_of, quiet, rms_rel, run, seeded
from sana import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    SanaPAGPipeline,
    SanaPipeline,
)
from tiny_model import make_tiny_parts, tiny_transformer

LAYERS = (
    "transformer_blocks.0",
    "transformer_blocks.2",
    ["transformer_blocks.2", "transformer_blocks.0"],
    ["blocks.0", "blocks.1"],
    "blocks.(0|2)",
    r"blocks\.1",
    "blocks.0.attn1",
    "attn1",
)


@pytest.fixture(scope="module")
def pipe() -> SanaPAGPipeline:
    return quiet(SanaPAGPipeline(**make_tiny_parts(num_layers=3).components))


@pytest.fixture(scope="module")
def oracle(pipe: SanaPAGPipeline) -> Any:
    return oracle_of(pipe)


def of(pipe: SanaPAGPipeline, **transformer: Any) -> SanaPAGPipeline:
    """Return a pipeline with another transformer."""
    return quiet(SanaPAGPipeline.from_pipe(pipe, transformer=tiny_transformer(**transformer)))


def drawn(seed: int) -> tuple[Any, dict[str, Any]]:
    """Return layers and a call drawn at random, which the reference carries out rightly."""
    draw = random.Random(seed)
    prompts, images = draw.choice([(1, 1), (1, 2), (2, 1), (3, 1)])
    call: dict[str, Any] = {
        "prompt": PROMPTS[:prompts],
        "negative_prompt": draw.choice(["", "a blurry picture"]),
        "num_images_per_prompt": images,
        "num_inference_steps": draw.choice([1, 2, 3, 5]),
        "guidance_scale": draw.choice([1.5, 4.5, draw.uniform(1.1, 8)]),
        "pag_scale": draw.choice([3.0, draw.uniform(0.1, 5), 0.0]),
        "pag_adaptive_scale": draw.choice([0.0, 0.0, draw.uniform(0, 0.01)]),
        "height": 32 * draw.randint(1, 5),
        "width": 32 * draw.randint(1, 5),
        "use_resolution_binning": False,
        "max_sequence_length": draw.choice([300, 30]),
        "complex_human_instruction": draw.choice([None, ["Draw this: "]]),
    }
    if draw.random() < 0.4:
        call |= {"guidance_scale": 1.0, "negative_prompt": ""}
    if draw.random() < 0.3:
        shape = (prompts * images, 4, call["height"] // 32, call["width"] // 32)
        call["latents"] = torch.randn(shape, generator=seeded(seed))
    return draw.choice(LAYERS), call


@pytest.mark.parametrize("seed", range(12))
def test_calls_drawn_at_random(pipe: Any, oracle: Any, seed: int) -> None:
    layers, call = drawn(seed)
    for who in (pipe, oracle):
        options = {} if who is pipe else {"pag_attn_processors": oracle._pag_attn_processors}
        who.set_pag_applied_layers(layers, **options)
    assert_same(run(pipe, generator=seeded(seed), **call), run(oracle, generator=seeded(seed), **call))
    for name in (
        *("guidance_scale", "do_classifier_free_guidance", "num_timesteps", "pag_scale", "pag_adaptive_scale"),
        *("do_pag_adaptive_scaling", "do_perturbed_attention_guidance", "pag_applied_layers"),
    ):
        assert getattr(pipe, name) == getattr(oracle, name), name


@pytest.mark.parametrize("layers", [layer for layer in LAYERS if layer != "attn1"], ids=str)
def test_every_form_of_a_layer_changes_the_picture_as_in_the_reference(pipe: Any, oracle: Any, layers: Any) -> None:
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, "complex_human_instruction": None, **SIZE}
    pipe.set_pag_applied_layers(layers)
    oracle.set_pag_applied_layers(layers, pag_attn_processors=oracle._pag_attn_processors)
    ours = run(pipe, generator=seeded(), **call)
    assert_same(ours, run(oracle, generator=seeded(), **call))
    off = run(pipe, generator=seeded(), pag_scale=0.0, **call)
    assert rms_rel(ours.latents[-1], off.latents[-1]) > 1e-3


def test_twenty_steps_with_the_documented_defaults(pipe: Any, oracle: Any) -> None:
    fresh, reference = quiet(SanaPAGPipeline(**pipe.components)), oracle_of(pipe)
    call = {"prompt": PROMPTS[0], **SIZE}
    assert_same(run(fresh, generator=seeded(), **call), run(reference, generator=seeded(), **call))


def test_resolution_binning(pipe: Any) -> None:
    wide = of(pipe, num_layers=3, sample_size=16)
    call = {"prompt": PROMPTS[0], "height": 300, "width": 500, "num_inference_steps": 1}
    ours = run(wide, generator=seeded(), **call)
    assert ours.images.shape == (1, 300, 500, 3)
    assert_same(ours, run(oracle_of(wide), generator=seeded(), **call))


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler(flow_shift=6.0)]
)
def test_other_schedulers(pipe: Any, scheduler: Any) -> None:
    other = quiet(SanaPAGPipeline.from_pipe(pipe, scheduler=scheduler, pag_applied_layers="blocks.1"))
    call = {"prompt": PROMPTS[0], "num_inference_steps": 3, "pag_adaptive_scale": 0.004, **SIZE}
    theirs = oracle_of(other, pag_applied_layers="blocks.1")
    assert_same(run(other, generator=seeded(), **call), run(theirs, generator=seeded(), **call))


def test_given_embeddings(pipe: Any, oracle: Any) -> None:
    embeds, mask, negative, negative_mask = pipe.encode_prompt(PROMPTS[:2], negative_prompt="grey")
    call = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "num_inference_steps": 3,
        **SIZE,
    }
    ours = run(quiet(SanaPAGPipeline(**pipe.components)), generator=seeded(), **call)
    assert_same(ours, run(oracle_of(pipe), generator=seeded(), **call))


def test_scale_zero_is_sana_pipeline_to_the_last_bit(pipe: Any) -> None:
    call = {"prompt": PROMPTS[0], "num_inference_steps": 3, "generator": None, "output_type": "latent", **SIZE}
    made = [
        quiet(who)(**{**call, "generator": seeded(), **more}).images
        for who, more in ((pipe, {"pag_scale": 0.0}), (SanaPipeline.from_pipe(pipe), {}))
    ]
    assert torch.equal(*made)


def test_half_precision_stays_within_the_references_own_noise(pipe: Any) -> None:
    half = of(pipe, num_layers=3)
    exact_pipe = oracle_of(half)
    half.transformer.to(torch.bfloat16)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 4, **SIZE}
    exact = run(exact_pipe, generator=seeded(), **call).latents[-1]
    theirs = run(oracle_of(half), generator=seeded(), **call).latents[-1]
    ours = run(half, generator=seeded(), **call).latents[-1]
    noise = rms_rel(theirs, exact)
    assert 0 < rms_rel(ours, exact) < 1.5 * noise
    assert rms_rel(ours, theirs) < 1.5 * noise


# Callbacks


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_callbacks_see_and_change_the_same(pipe: Any, guidance: float) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    ours, oracle = quiet(SanaPAGPipeline(**pipe.components)), oracle_of(pipe)
    shapes: dict[Any, list[Any]] = {ours: [], oracle: []}

    def change(who: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes[who].append({name: None if one is None else one.shape for name, one in tensors.items()})
        if index == 0:
            return {"latents": tensors["latents"] * 0.5}
        return {"prompt_embeds": tensors["prompt_embeds"].roll(1, dims=-1) * 1.5} if index == 1 else {}

    made = [
        who(
            PROMPTS[:2],
            generator=seeded(),
            guidance_scale=guidance,
            num_inference_steps=4,
            output_type="latent",
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=names,
            **SIZE,
        ).images
        for who in (ours, oracle)
    ]
    assert rms_rel(*made) < LATENT_GATE
    rows = [shape["prompt_embeds"][0] for shape in shapes[ours]]
    assert rows == [shape["prompt_embeds"][0] for shape in shapes[oracle]] == [6 if guidance > 1 else 4] * 4


# Where the reference is silently wrong


class RightGuided:
    """The reference's processor with the normalisation of queries and keys that it leaves out."""

    groups = 3

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        *real, perturbed = hidden_states.chunk(self.groups)
        x = torch.cat(real)
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        query = F.relu(query.transpose(1, 2).unflatten(1, (attn.heads, -1)))
        key = F.relu(key.transpose(1, 2).unflatten(1, (attn.heads, -1)).transpose(2, 3))
        value = F.pad(value.transpose(1, 2).unflatten(1, (attn.heads, -1)), (0, 0, 0, 1), value=1.0)
        out = (value @ key) @ query
        out = (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2)
        made: Tensor = attn.to_out[0](torch.cat([out, attn.to_v(perturbed)]))
        return made


class RightUnguided(RightGuided):
    groups = 2


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_models_with_normalised_queries_and_keys(pipe: Any, guidance: float) -> None:
    """The reference drops the norm in the perturbed layer, for all rows; SANA 1.5 needs it."""
    normed = of(pipe, qk_norm="rms_norm_across_heads")
    call = {"prompt": PROMPTS[0], "num_inference_steps": 3, "guidance_scale": guidance, "pag_scale": 2.0, **SIZE}
    ours = run(normed, generator=seeded(), **call)
    oracle = oracle_of(normed)
    wrong = run(oracle, generator=seeded(), **call)
    oracle.set_pag_applied_layers("transformer_blocks.0", pag_attn_processors=(RightGuided(), RightUnguided()))
    right = run(oracle, generator=seeded(), **call)
    assert_same(ours, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_a_number_in_a_layer_is_a_whole_number(pipe: Any) -> None:
    """The reference takes "transformer_blocks.1" for the blocks 1, 10 and 11 of twelve."""
    deep = of(pipe, num_layers=12)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, **SIZE}

    def both(layers: Any) -> tuple[Any, Any]:
        deep.set_pag_applied_layers(layers)
        ours = run(deep, generator=seeded(), **call)
        return ours, run(oracle_of(deep, pag_applied_layers=layers), generator=seeded(), **call)

    ours, wrong = both("transformer_blocks.1")
    assert list(deep.pag_attn_processors) == ["transformer_blocks.1.attn1.processor"]
    three, _ = both(["transformer_blocks.1", "transformer_blocks.10", "transformer_blocks.11"])
    _, right = both("transformer_blocks.1.attn1")
    assert_same(ours, right)
    assert_same(three, wrong)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_the_timestep_scale_of_a_model_counts(pipe: Any) -> None:
    """The reference tells the network unscaled timesteps here, though not in SanaPipeline."""
    scaled = of(pipe, timestep_scale=0.001)
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, **SIZE}
    ours = run(scaled, generator=seeded(), **call)
    oracle = oracle_of(scaled)
    wrong = run(oracle, generator=seeded(), **call)
    plain = oracle.transformer.forward

    def told_right(hidden_states: Tensor, *, timestep: Tensor, **rest: Any) -> Any:
        return plain(hidden_states, timestep=timestep * 0.001, **rest)

    oracle.transformer.forward = told_right
    right = run(oracle, generator=seeded(), **call)
    assert_same(ours, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_several_prompts_times_several_images(pipe: Any) -> None:
    call = {"num_inference_steps": 2, **SIZE}
    ours = quiet(SanaPAGPipeline(**pipe.components))
    oracle = oracle_of(pipe)
    mine = run(ours, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=seeded(), **call)
    right = run(oracle, prompt=[p for p in PROMPTS[:2] for _ in range(2)], generator=seeded(), **call)
    wrong = run(oracle, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=seeded(), **call)
    assert_same(mine, right)
    assert rms_rel(wrong.latents[-1], right.latents[-1]) > 100 * LATENT_GATE


def test_an_exception_leaves_the_model_as_it_was(pipe: Any) -> None:
    """The reference leaves its perturbed layers behind when a call breaks off."""
    ours, oracle = quiet(SanaPAGPipeline(**pipe.components)), oracle_of(pipe)

    def fail(*_: Any) -> Any:
        raise KeyError

    call = {"num_inference_steps": 1, **SIZE}
    for who in (ours, oracle):
        with pytest.raises(KeyError):
            who(PROMPTS[0], callback_on_step_end=fail, **call)
    expected = run(oracle_of(pipe), prompt=PROMPTS[0], pag_scale=0.0, generator=seeded(), **call)
    assert_same(run(ours, prompt=PROMPTS[0], pag_scale=0.0, generator=seeded(), **call), expected)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        assert_same(run(oracle, prompt=PROMPTS[0], pag_scale=0.0, generator=seeded(), **call), expected)


# The documented form


def test_default_arguments_are_the_documented_ones() -> None:
    def normal(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    for name in ("__call__", "encode_prompt", "__init__"):
        ours = inspect.signature(getattr(SanaPAGPipeline, name)).parameters
        theirs = inspect.signature(getattr(diffusers.SanaPAGPipeline, name)).parameters
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert normal(ours[key].default) == normal(value.default), key


def test_the_output_is_the_documented_one(pipe: Any) -> None:
    output = pipe(PROMPTS[0], num_inference_steps=1, **SIZE)
    assert type(output) is ImagePipelineOutput
    assert output[0] is output.images
    assert isinstance(pipe(PROMPTS[0], num_inference_steps=1, return_dict=False, **SIZE), tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_prompt_gives_the_dtype_of_the_transformer(pipe: Any, dtype: torch.dtype) -> None:
    half = quiet(SanaPAGPipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer).to(dtype)}))
    options = {"negative_prompt": "grey", "max_sequence_length": 20}
    ours = half.encode_prompt(PROMPTS[:2], **options)
    with torch.no_grad():
        theirs = oracle_of(half).encode_prompt(PROMPTS[:2], **options)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)


def test_negative_prompts_get_the_length_of_given_embeddings(pipe: Any, oracle: Any) -> None:
    embeds, mask, *_ = pipe.encode_prompt("a", max_sequence_length=5)
    given = {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask, "negative_prompt": "grey"}
    ours = pipe.encode_prompt(**given)
    with torch.no_grad():
        theirs = oracle.encode_prompt(**given)
    assert [one.shape for one in ours] == [one.shape for one in theirs] == [(1, 5, 32), (1, 5)] * 2


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("transformer_blocks.99", "Cannot find PAG layer to set attention processor for: transformer_blocks.99"),
        (["blocks.0", "mid"], "Cannot find PAG layer to set attention processor for: mid"),
        (3, "Expected either a string or a list of string but got type <class 'int'>"),
        (["blocks.0", 3], "Expected either a string or a list of string but got type <class 'int'>"),
    ],
)
def test_documented_errors(pipe: Any, layers: Any, words: str) -> None:
    def call(who: Any) -> None:
        who.set_pag_applied_layers(layers, pag_attn_processors=getattr(who, "_pag_attn_processors", None))
        quiet(who)(PROMPTS[0], num_inference_steps=1, **SIZE)

    for who in (SanaPAGPipeline(**pipe.components), oracle_of(pipe)):
        with pytest.raises(ValueError, match=words):
            call(who)
