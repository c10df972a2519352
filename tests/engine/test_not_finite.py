"""NaN at the output of any module, in any step: never a picture, always an error that names the place."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sana import Request, SanaPipeline, generate_images
from sana.engine.parts import Parts
from sana.errors import NonFinite

REQUEST = Request(prompt="a red fox", steps=3, seed=4, width=64, height=64, binning=False)


@pytest.fixture(scope="module")
def parts(tiny_parts: Parts) -> Parts:
    return copy.deepcopy(tiny_parts)


def spoiled(output: Any, value: float) -> Any:
    """Return a module's output with one bad value in its first tensor."""
    if isinstance(output, Tensor):
        bad = output.clone()
        bad[(0,) * bad.ndim] = value
        return bad
    if isinstance(output, tuple) and any(isinstance(one, Tensor) for one in output):
        at = next(i for i, one in enumerate(output) if isinstance(one, Tensor))
        return (*output[:at], spoiled(output[at], value), *output[at + 1 :])
    if isinstance(output, ModelOutput):
        output.last_hidden_state = spoiled(output.last_hidden_state, value)
    return output


@contextmanager
def bad_output(module: nn.Module, call: int, value: float) -> Iterator[list[int]]:
    """Spoil the output of one call of a module; the list tells how many calls there were."""
    calls = [0]

    def hook(_: object, __: object, output: Any) -> Any:
        calls[0] += 1
        return spoiled(output, value) if calls[0] == call else output

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def called(parts: Parts, part: nn.Module) -> dict[str, int]:
    """Return how often each module of a part is called by the request."""
    counts: dict[str, int] = {}
    handles = []
    for name, module in part.named_modules():

        def hook(*_: object, name: str = name) -> None:
            counts[name] = counts.get(name, 0) + 1

        handles.append(module.register_forward_hook(hook))
    parts.prompts.clear()
    generate_images(parts, REQUEST)
    for handle in handles:
        handle.remove()
    return counts


def test_any_module_of_the_transformer_in_any_step(parts: Parts) -> None:
    counts = called(parts, parts.transformer)
    modules = dict(parts.transformer.named_modules())
    for name, count in counts.items():
        for call in range(1, count + 1):
            with bad_output(modules[name], call, float("nan")), pytest.raises(NonFinite) as caught:
                generate_images(parts, REQUEST)
            step = call if count == 3 else 1  # what is computed before the first step shows in it
            assert f"The transformer gave NaN or infinity in step {step} of 3" in str(caught.value), (name, call)
    assert len(counts) > 15
    generate_images(parts, REQUEST)


def test_any_module_of_the_decoder(parts: Parts) -> None:
    counts = called(parts, parts.vae)
    modules = dict(parts.vae.named_modules())
    for name in counts:
        with bad_output(modules[name], 1, float("nan")), pytest.raises(NonFinite, match="decoded images"):
            generate_images(parts, REQUEST)
    assert len(counts) > 40


def test_any_module_of_the_text_encoder(parts: Parts) -> None:
    counts = called(parts, parts.text_encoder)
    modules = dict(parts.text_encoder.named_modules())
    tried = 0
    for name, count in counts.items():
        for call in range(1, count + 1):
            parts.prompts.clear()
            with bad_output(modules[name], call, float("nan")), pytest.raises(NonFinite, match="text encoder"):
                generate_images(parts, REQUEST)
            tried += 1
    assert tried > 40
    generate_images(parts, REQUEST)


def test_a_later_step_cannot_hide_it(parts: Parts) -> None:
    class Forgiving:
        """A scheduler that turns NaN into numbers, as a clamp would."""

        def __init__(self, scheduler: Any) -> None:
            self.inner = scheduler

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def set_timesteps(self, *words: Any, **options: Any) -> None:
            self.inner.set_timesteps(*words, **options)

        def step(self, velocity: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
            return self.inner.step(velocity.nan_to_num(), timestep, sample, return_dict=return_dict)

    pipe = SanaPipeline(**{**parts.components, "scheduler": Forgiving(copy.deepcopy(parts.scheduler))})
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 3}
    pipe("a fox", **settings)
    with (
        bad_output(parts.transformer.patch_embed, 2, float("nan")),
        pytest.raises(NonFinite, match="transformer gave NaN or infinity in step 2 of 3"),
    ):
        pipe("a fox", **settings)


def test_bad_start_latents_are_told_apart(parts: Parts) -> None:
    pipe = SanaPipeline(**parts.components)
    start = torch.full((1, 4, 2, 2), float("nan"))
    with pytest.raises(NonFinite, match="latents contain NaN or infinity in step 1"):
        pipe("a", height=64, width=64, use_resolution_binning=False, latents=start, num_inference_steps=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_decoder_that_overflows_is_run_in_float32_once(parts: Parts, dtype: torch.dtype) -> None:
    half = copy.copy(parts)
    half.vae = copy.deepcopy(parts.vae).to(dtype)
    expected = np.asarray(generate_images(half, REQUEST).image).astype(int)
    before = {name: (one.data_ptr(), one.dtype) for name, one in half.vae.named_parameters()}
    seen: list[torch.dtype] = []

    def overflow(_: object, __: object, output: Tensor) -> Tensor:
        seen.append(output.dtype)
        return output if output.dtype == torch.float32 else output * float("inf")

    handle = half.vae.decoder.register_forward_hook(overflow)
    result = generate_images(half, REQUEST)
    handle.remove()
    assert seen == [dtype, torch.float32]
    assert result.warnings == [
        f"The decoder gave NaN or infinity in {str(dtype).removeprefix('torch.')}; it was run in float32."
    ]
    assert {name: (one.data_ptr(), one.dtype) for name, one in half.vae.named_parameters()} == before
    assert np.abs(np.asarray(result.image).astype(int) - expected).max() <= 12
    assert np.array_equal(np.asarray(generate_images(half, REQUEST).image).astype(int), expected)


def test_float32_is_tried_once_only(parts: Parts) -> None:
    half = copy.copy(parts)
    half.vae = copy.deepcopy(parts.vae).to(torch.bfloat16)
    with torch.no_grad():
        half.vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFinite, match="decoded images"):
        generate_images(half, REQUEST)
    assert {one.dtype for one in half.vae.parameters()} == {torch.bfloat16}
