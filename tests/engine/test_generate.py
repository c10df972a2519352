import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sana import Request, Result, generate, generate_images
from sana.engine.generate import Change, Plan, denoise
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Predictor
from sana.errors import InvalidInput, NonFinite
from sana.flow.samplers import SAMPLERS, Step, find_sampler

REQUEST = Request(prompt="a red fox in the snow", steps=3, seed=40, width=96, height=64, binning=False)


def pixels(result: Any) -> list[np.ndarray]:
    return [np.asarray(image) for image in result.images]


def plan(parts: Parts, *, guidance: float = 1.0, rows: int = 1, sampler: str = "flow-dpm", steps: int = 4) -> Plan:
    """A plan over random captions, one per latent, with unconditional ones before them under guidance."""
    generator = torch.Generator().manual_seed(0)
    count = 2 * rows if guidance != 1 else rows
    captions = Captions(
        embeds=torch.randn(count, 5, 32, generator=generator), mask=torch.ones(count, 5), rows=tuple(range(count))
    )
    chosen = find_sampler(sampler)
    bound = chosen.on(chosen.make_grid(steps, 3.0))
    return Plan(
        sampler=bound,
        latents=torch.randn(rows, 4, 2, 3, generator=generator),
        predictor=Predictor(parts.transformer, bound.grid.timesteps, captions),
        guidance=guidance,
        noise=lambda i: torch.ones(rows, 4, 2, 3),
    )


def drain(loop: Any, reply: Any = None) -> tuple[list[Step], Any]:
    """Run a generator to its end, sending `reply` first; return its steps and its value."""
    steps = []
    while True:
        try:
            steps.append(loop.send(reply))
            reply = None
        except StopIteration as done:
            return steps, done.value


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_loop_yields_typed_steps_and_returns_the_last_latents(
    tiny_parts: Parts, sampler: str, guidance: float
) -> None:
    ours = plan(tiny_parts, sampler=sampler, guidance=guidance, rows=2, steps=2)
    steps, final = drain(denoise(ours))
    assert [step.index for step in steps] == [0, 1]
    assert [step.sigma for step in steps] == ours.sampler.grid.sigmas[:-1].tolist()
    assert all(step.latents.shape == step.x0.shape == (2, 4, 2, 3) for step in steps)
    assert final is steps[-1].latents
    assert steps[-1].sigma_next == 0
    assert torch.equal(steps[-1].latents, steps[-1].x0)


def test_a_consumer_may_stop_the_loop(tiny_parts: Parts) -> None:
    ours = plan(tiny_parts)
    calls = 0
    forward = tiny_parts.transformer.denoise

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    ours.predictor.transformer = copy.copy(tiny_parts.transformer)
    ours.predictor.transformer.denoise = counted
    loop = denoise(ours)
    next(loop)
    loop.close()
    assert calls == 1
    with pytest.raises(StopIteration):
        next(loop)


@pytest.mark.parametrize("wrapped", [False, True])
def test_sent_latents_replace_the_state(tiny_parts: Parts, wrapped: bool) -> None:
    other = torch.full((1, 4, 2, 3), 0.25)
    loop = denoise(plan(tiny_parts))
    next(loop)
    second = loop.send(Change(latents=other) if wrapped else other)
    plain = denoise(plan(tiny_parts))
    next(plain)
    assert not torch.allclose(second.latents, next(plain).latents)
    sigma, velocity = second.sigma, plan(tiny_parts).predictor(other, 1, guided=False)
    assert torch.allclose(second.x0, other - sigma * velocity, atol=1e-6)


def test_latents_sent_after_the_last_step_are_the_result(tiny_parts: Parts) -> None:
    loop = denoise(plan(tiny_parts, steps=1))
    next(loop)
    other = torch.zeros(1, 4, 2, 3)
    assert drain(loop, other)[1] is other


def test_latents_of_another_shape_are_refused(tiny_parts: Parts) -> None:
    loop = denoise(plan(tiny_parts))
    next(loop)
    with pytest.raises(InvalidInput, match="shape"):
        loop.send(torch.zeros(1, 4, 9, 9))


def test_sent_captions_rebuild_what_was_computed_from_them(tiny_parts: Parts) -> None:
    new = Captions(embeds=torch.full((1, 7, 32), 0.5), mask=torch.ones(1, 7), rows=(0,))
    loop = denoise(plan(tiny_parts))
    first = next(loop)
    second = loop.send(Change(captions=new))
    fresh = Predictor(tiny_parts.transformer, plan(tiny_parts).sampler.grid.timesteps, new)
    expected = first.latents - second.sigma * fresh(first.latents, 1, guided=False)
    assert torch.allclose(second.x0, expected, atol=1e-6)


def test_guidance_can_be_switched_off_on_the_way(tiny_parts: Parts) -> None:
    ours = plan(tiny_parts, guidance=4.0)
    embeds = ours.predictor.captions.embeds
    loop = denoise(ours)
    first = next(loop)
    second = loop.send(Change(guidance=1.0))
    positive = Captions(embeds=embeds[1:], mask=torch.ones(1, 5), rows=(0,))
    fresh = Predictor(tiny_parts.transformer, ours.sampler.grid.timesteps, positive)
    expected = first.latents - second.sigma * fresh(first.latents, 1, guided=False)
    assert torch.allclose(second.x0, expected, atol=1e-6)


def test_the_loop_leaves_the_consumers_grad_mode_alone(tiny_parts: Parts) -> None:
    loop = denoise(plan(tiny_parts))
    step = next(loop)
    assert torch.is_grad_enabled()
    assert not step.latents.requires_grad


def test_guidance_interval_runs_half_the_rows_outside(tiny_parts: Parts) -> None:
    rows: list[int] = []
    parts = copy.deepcopy(tiny_parts)
    forward = parts.transformer.denoise
    parts.transformer.denoise = lambda latents, *rest: rows.append(len(latents)) or forward(latents, *rest)
    generate_images(parts, REQUEST.replace(steps=6, guidance_interval=(0.5, 0.95)))
    assert rows == [1, 2, 2, 2, 2, 1]
    rows.clear()
    generate_images(parts, REQUEST.replace(guidance=1.0))
    assert rows == [1, 1, 1]


def test_a_request_gives_its_pictures_and_tells_everything(tiny_parts: Parts) -> None:
    result = generate_images(tiny_parts, REQUEST.replace(count=2))
    assert result.seeds == [40, 41]
    assert [image.size for image in result.images] == [(96, 64)] * 2
    assert not np.array_equal(*pixels(result))
    assert (result.settings.sampler, result.settings.guidance) == ("flow-dpm", 4.5)
    assert set(result.timings) == {"text", "denoise", "decode", "total"}
    assert result.timings["total"] >= result.timings["decode"] > 0
    assert result.model["name"] == "tiny"
    assert result.warnings == []
    assert result.image is result.images[0]
    assert result.seed == 40


def test_the_result_is_the_generators_return_value(tiny_parts: Parts) -> None:
    yielded, result = drain(generate(tiny_parts, REQUEST.replace(count=2)))
    assert [step.index for step in yielded if isinstance(step, Step)] == [0, 1, 2, 0, 1, 2]
    assert len(result.images) == 2


def test_each_batch_is_handed_over_when_it_is_finished(tiny_parts: Parts) -> None:
    yielded, whole = drain(generate(tiny_parts, REQUEST.replace(count=3, batch_size=2, steps=1)))
    assert [type(one) for one in yielded] == [Step, Result, Step, Result]
    first, second = (one for one in yielded if isinstance(one, Result))
    assert (first.seeds, second.seeds, whole.seeds) == ([40, 41], [42], [40, 41, 42])
    assert [*first.images, *second.images] == whole.images
    assert first.settings == second.settings == whole.settings
    assert first.model == whole.model
    assert first.timings["total"] < second.timings["total"] == whole.timings["total"]


def test_image_i_is_the_picture_of_seed_plus_i(tiny_parts: Parts) -> None:
    both = pixels(generate_images(tiny_parts, REQUEST.replace(count=2)))
    for offset, picture in enumerate(both):
        alone = pixels(generate_images(tiny_parts, REQUEST.replace(seed=40 + offset)))[0]
        assert np.array_equal(picture, alone)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_picture_does_not_depend_on_its_company(tiny_parts: Parts, batch_size: int) -> None:
    """At one batch shape, latents are equal to the last bit: alone, among others, first or last."""

    def latents(seed: int, count: int) -> Tensor:
        request = REQUEST.replace(seed=seed, count=count, batch_size=batch_size)
        steps = [step for step in generate(tiny_parts, request) if isinstance(step, Step)]
        last = [step.latents for step in steps if step.index == 2]
        return torch.cat(last)[:count]

    together = latents(40, 4)
    assert len(together) == 4
    for row in range(4):
        assert torch.equal(latents(40 + row, 1)[0], together[row])


def test_batch_sizes_agree_within_rounding(tiny_parts: Parts) -> None:
    one = pixels(generate_images(tiny_parts, REQUEST.replace(count=2)))
    two = pixels(generate_images(tiny_parts, REQUEST.replace(count=2, batch_size=2)))
    for left, right in zip(one, two, strict=True):
        assert np.abs(left.astype(int) - right.astype(int)).max() <= 1


def test_binning_draws_the_trained_size_and_resizes(tiny_parts: Parts) -> None:
    request = REQUEST.replace(binning=True, width=200, height=100, steps=1)
    drawn = next(generate(tiny_parts, request)).latents
    assert drawn.shape == (1, 4, 8, 8)
    assert generate_images(tiny_parts, request).image.size == (200, 100)


def test_a_model_without_bins_draws_what_is_asked(tiny_parts: Parts) -> None:
    from tiny_model import tiny_transformer

    other = copy.copy(tiny_parts)
    other.transformer = tiny_transformer(sample_size=2)
    request = REQUEST.replace(binning=True, steps=1)
    assert generate_images(other, request).image.size == (96, 64)
    assert generate_images(other, Request(prompt="a", steps=1, seed=1)).image.size == (64, 64)
    with pytest.raises(InvalidInput, match="divisible by 32 but are 64 and 100"):
        generate_images(other, request.replace(width=100))


def test_a_cards_sizes_are_kept(tiny_parts: Parts) -> None:
    import dataclasses

    from sana.cards import CARDS

    nano = copy.copy(tiny_parts)
    nano.card = dataclasses.replace(CARDS["nano"], name="pet")
    with pytest.raises(InvalidInput, match="pet draws 256 x 256 only"):
        generate_images(nano, REQUEST)
    assert generate_images(nano, Request(prompt="a", steps=1, seed=1)).image.size == (256, 256)


def test_the_prompt_matters_and_so_do_guidance_and_negative_prompt(tiny_parts: Parts) -> None:
    requests = [
        REQUEST,
        REQUEST.replace(prompt="two cats"),
        REQUEST.replace(negative_prompt="snow"),
        REQUEST.replace(guidance=2.0),
        REQUEST.replace(instruction=False),
        REQUEST.replace(sampler="flow-euler"),
    ]
    made = [pixels(generate_images(tiny_parts, request))[0] for request in requests]
    for left, right in itertools.combinations(made, 2):
        assert not np.array_equal(left, right)


def test_the_same_request_gives_the_same_bits(tiny_parts: Parts) -> None:
    first, second = (pixels(generate_images(tiny_parts, REQUEST))[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_overlong_prompts_are_told(tiny_parts: Parts) -> None:
    result = generate_images(tiny_parts, REQUEST.replace(max_prompt_tokens=3, steps=1))
    assert "longer than 3 tokens" in result.warnings[0]
    assert "snow" in result.warnings[0]


def test_what_a_request_cannot_mean_is_told(tiny_parts: Parts) -> None:
    empty = generate_images(tiny_parts, REQUEST.replace(prompt=" ", steps=1))
    assert empty.warnings == ["The prompt is empty, so nothing says what the picture should show."]
    thin = generate_images(tiny_parts, REQUEST.replace(binning=True, width=300, height=10, steps=1))
    assert thin.image.size == (300, 10)
    assert "drawn at 256 x 256, and 97% of it is cut away" in thin.warnings[0]


def test_the_end_of_a_long_prompt_is_quoted_shortly(tiny_parts: Parts) -> None:
    result = generate_images(tiny_parts, REQUEST.replace(prompt="red fox " * 10_000, steps=1))
    assert len(result.warnings[0]) < 250


def test_sprint_models_run_with_their_own_sampler(tiny_parts: Parts) -> None:
    from tiny_model import tiny_transformer

    sprint = copy.copy(tiny_parts)
    sprint.transformer = tiny_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    result = generate_images(sprint, Request(prompt="a red fox", seed=3, count=2, batch_size=2))
    assert (result.settings.sampler, result.settings.steps) == ("scm", 2)
    assert not np.array_equal(*pixels(result))
    other = generate_images(sprint, Request(prompt="a red fox", seed=3, guidance=2.0))
    assert not np.array_equal(pixels(result)[0], pixels(other)[0])
    with pytest.raises(InvalidInput, match="no negative prompt"):
        generate_images(sprint, Request(prompt="a", negative_prompt="b"))


def test_missing_parts_are_named_before_any_work(tiny_parts: Parts) -> None:
    headless = copy.copy(tiny_parts)
    headless.text_encoder = None
    with pytest.raises(InvalidInput, match="no text_encoder"):
        generate_images(headless, REQUEST)


def test_a_non_finite_transformer_is_named_with_the_step(tiny_parts: Parts) -> None:
    broken = copy.deepcopy(tiny_parts)
    with torch.no_grad():
        broken.transformer.proj_out.bias[0] = float("nan")
    with pytest.raises(NonFinite, match="transformer gave NaN or infinity in step 1 of 3"):
        generate_images(broken, REQUEST)


def test_non_finite_pictures_raise(tiny_parts: Parts) -> None:
    broken = copy.deepcopy(tiny_parts)
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(NonFinite, match="decoded images"):
        generate_images(broken, REQUEST)
