"""Memory runs out at the k-th call, for every k: what is finished is kept, less is tried, and nothing stays behind."""

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sana import Request, Result, generate_images
from sana.engine.decode import DecodeOutOfMemory, free_memory, full_memory_told, is_out_of_memory
from sana.engine.generate import generate
from sana.engine.latents import Finished
from sana.engine.parts import Parts
from sana.errors import InvalidInput, OutOfMemory
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

pytestmark = pytest.mark.usefixtures("quick_collection")  # the collector runs at each fault

FORMS: tuple[Callable[[], BaseException], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError,
)
TWO = Request(prompt="a red fox", steps=2, seed=40, count=2, batch_size=2, width=64, height=64, binning=False)


@pytest.fixture(scope="module")
def parts(tiny_parts: Parts) -> Parts:
    return copy.deepcopy(tiny_parts)


def pixels(result: Result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def are_alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures are equal but for rounding: a module with a hook does without its quick way."""
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


class Fault:
    """Counts the calls of every module of a part and fails at the k-th, or in every one from there on."""

    def __init__(self, part: nn.Module, k: int, *, lasting: bool = False) -> None:
        self.k, self.lasting, self.calls = k, lasting, 0
        # Where a module that holds others begins, its first part does, too.
        leaves = [module for module in part.modules() if not list(module.children())]
        self._hooks = [module.register_forward_pre_hook(self._call) for module in leaves]

    def _call(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self.k or (self.lasting and self.calls > self.k):
            raise FORMS[self.k % len(FORMS)]()

    @classmethod
    @contextmanager
    def at(cls, part: nn.Module, k: int, *, lasting: bool = False) -> Iterator["Fault"]:
        fault = cls(part, k, lasting=lasting)
        try:
            yield fault
        finally:
            for hook in fault._hooks:
                hook.remove()


def run(parts: Parts, request: Request, kept: list[Finished]) -> tuple[list[Result], Result]:
    """Return the results of the batches and the whole one."""
    loop = generate(parts, request, rescue=kept.append)
    batches: list[Result] = []
    while True:
        try:
            one = next(loop)
        except StopIteration as end:
            return batches, end.value
        if isinstance(one, Result):
            batches.append(one)


def calls_of(parts: Parts, part: nn.Module) -> int:
    """Return how many calls a run makes, with nothing kept from earlier ones."""
    parts.prompts.clear()
    with Fault.at(part, -1) as fault:
        generate_images(parts, TWO)
    return fault.calls


def test_at_every_call_of_the_transformer_the_batch_is_drawn_one_by_one(parts: Parts) -> None:
    expected = pixels(generate_images(parts, TWO))
    alone = pixels(generate_images(parts, TWO.replace(batch_size=1)))
    for k in range(1, calls_of(parts, parts.transformer) + 1):
        kept: list[Finished] = []
        with Fault.at(parts.transformer, k):
            batches, whole = run(parts, TWO, kept)
        assert not kept
        assert [batch.seeds for batch in batches] == [[40], [41]]
        assert [text for text in whole.warnings if "one by one" in text and "rounding" in text], k
        assert are_alike(pixels(whole), alone), k
        if k % 5 == 0:
            assert are_alike(pixels(generate_images(parts, TWO)), expected), k
    assert k > 20


def test_at_every_call_of_the_decoder_the_latents_are_kept_first(parts: Parts) -> None:
    expected = generate_images(parts, TWO)
    final = [step for step in generate(parts, TWO) if not isinstance(step, Result)][-1].latents
    for k in range(1, calls_of(parts, parts.vae.decoder) + 1):
        kept: list[Finished] = []
        with Fault.at(parts.vae.decoder, k):
            batches, whole = run(parts, TWO, kept)
        assert len(kept) == 1
        assert torch.equal(kept[0].latents, final), k
        assert (list(kept[0].seeds), kept[0].settings) == ([40, 41], expected.settings)
        assert kept[0].model == expected.model
        assert len(batches) == 1
        assert any("one by one" in text for text in whole.warnings)
        assert np.abs(pixels(whole).astype(int) - pixels(expected).astype(int)).max() <= 1, k
        if k % 5 == 0:
            assert np.array_equal(pixels(generate_images(parts, TWO)), pixels(expected)), k
    assert k > 20


def test_at_every_call_of_the_text_encoder_the_next_prompt_is_exact(parts: Parts) -> None:
    def encode() -> Tensor:
        return parts.prompts.encode([TWO.prompt], COMPLEX_HUMAN_INSTRUCTION).embeds

    parts.prompts.clear()
    expected = encode()
    for k in range(1, calls_of(parts, parts.text_encoder) + 1):
        parts.prompts.clear()
        with Fault.at(parts.text_encoder, k), pytest.raises(OutOfMemory, match="max_prompt_tokens"):
            generate_images(parts, TWO)
        if k % 5 == 0:  # the next one may use what was kept, or begin from nothing
            parts.prompts.clear()
        assert torch.equal(encode(), expected), k
    assert k > 20


@pytest.mark.parametrize("stage", ["to_pictures", "resize_and_crop"])
@pytest.mark.parametrize("form", FORMS)
def test_pictures_that_do_not_fit_are_made_one_by_one(
    parts: Parts, stage: str, form: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sana.engine.latents as module

    expected = pixels(generate_images(parts, TWO))
    whole = getattr(module, stage)

    def short(images: Tensor, *rest: Any) -> Any:
        if len(images) > 1:
            raise form()
        return whole(images, *rest)

    monkeypatch.setattr(module, stage, short)
    kept: list[Finished] = []
    _, result = run(parts, TWO, kept)
    assert len(kept) == 1
    assert np.abs(pixels(result).astype(int) - expected.astype(int)).max() <= 1


def test_nothing_is_tried_twice_without_a_change(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.engine.decode.TILES", ((512, 448), (64, 64), (32, 32)))
    tried: list[tuple[str, tuple[int, ...]]] = []

    def transformer(_: object, words: tuple[Any, ...]) -> None:
        tried.append(("transformer", tuple(words[0].shape)))
        raise MemoryError

    def decoder(_: object, words: tuple[Any, ...]) -> None:
        tried.append(("decoder", tuple(words[0].shape)))
        raise MemoryError

    large = TWO.replace(width=96, height=96, steps=1)
    hook = parts.transformer.patch_embed.register_forward_pre_hook(transformer)
    try:
        with pytest.raises(OutOfMemory, match="`width` and `height`"):
            generate_images(parts, large)
    finally:
        hook.remove()
    hook = parts.vae.decoder.register_forward_pre_hook(decoder)
    try:
        with pytest.raises(DecodeOutOfMemory) as caught:
            generate_images(parts, large)
    finally:
        hook.remove()
    assert [shape[0] for name, shape in tried if name == "transformer"] == [4, 2, 1]
    shapes = [shape for name, shape in tried if name == "decoder"]
    assert shapes == [(2, 4, 3, 3), (1, 4, 3, 3), (1, 4, 2, 2), (1, 4, 1, 1)]
    assert caught.value.latents.shape == (2, 4, 3, 3)
    assert "latents" in str(caught.value)


def test_the_branches_of_guidance_go_apart_when_one_picture_is_too_much(parts: Parts) -> None:
    one = TWO.replace(count=1, batch_size=1, guidance_interval=(0.0, 0.9), steps=3)
    expected = generate_images(parts, one)
    rows: list[int] = []

    def short(_: object, words: tuple[Any, ...]) -> None:
        rows.append(len(words[0]))
        if rows[-1] > 1:
            raise MemoryError

    hook = parts.transformer.patch_embed.register_forward_pre_hook(short)
    try:
        result = generate_images(parts, one)
    finally:
        hook.remove()
    # Without guidance there is nothing to take apart.
    with Fault.at(parts.transformer, 1, lasting=True), pytest.raises(OutOfMemory):
        generate_images(parts, one.replace(guidance=1.0))
    assert rows == [1, 2, 1, 1, 1, 1, 1]
    assert "one after the other" in result.warnings[0]
    assert are_alike(pixels(result), pixels(expected))


def test_freed_memory_is_tried_once_before_less_is_done(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixels(generate_images(parts, TWO))
    freed = itertools.repeat(True)
    monkeypatch.setattr("sana.engine.generate.free_memory", lambda: next(freed))
    monkeypatch.setattr("sana.engine.decode.free_memory", lambda: next(freed))
    parts.prompts.clear()
    for part in (parts.text_encoder, parts.transformer, parts.vae.decoder):
        with Fault.at(part, 3):
            result = generate_images(parts, TWO)
        assert result.warnings == []
        assert are_alike(pixels(result), expected)
    parts.prompts.clear()
    with Fault.at(parts.text_encoder, 1, lasting=True) as fault, pytest.raises(OutOfMemory, match="prompt"):
        generate_images(parts, TWO)
    assert fault.calls == 2


def test_batches_after_the_first_stay_small_and_nothing_finished_is_lost(parts: Parts) -> None:
    request = TWO.replace(count=4, steps=1)
    alone = pixels(generate_images(parts, request.replace(batch_size=1)))
    together = pixels(generate_images(parts, request))
    with Fault.at(parts.transformer, -1) as counted:
        generate_images(parts, request.replace(count=2))
    per_batch = counted.calls
    with Fault.at(parts.transformer, per_batch + 3):
        batches, whole = run(parts, request, [])
    assert [list(batch.seeds) for batch in batches] == [[40, 41], [42], [43]]
    assert whole.seeds == [40, 41, 42, 43]
    assert are_alike(pixels(whole), np.concatenate([together[:2], alone[2:]]))


def test_what_happens_to_every_batch_is_told_once_and_each_is_kept(parts: Parts) -> None:
    def full(_: object, words: tuple[Any, ...]) -> None:
        if len(words[0]) > 1:
            raise MemoryError

    hook = parts.vae.decoder.register_forward_pre_hook(full)
    kept: list[Finished] = []
    try:
        batches, whole = run(parts, TWO.replace(count=4, steps=1), kept)
    finally:
        hook.remove()
    assert [list(one.seeds) for one in kept] == [list(one.seeds) for one in batches] == [[40, 41], [42, 43]]
    assert len(whole.warnings) == 1


def test_tiles_that_the_user_set_are_not_made_larger(parts: Parts) -> None:
    tiled = copy.copy(parts)
    tiled.vae = copy.deepcopy(parts.vae)
    tiled.vae.enable_tiling(32, 32, 32, 32)
    shapes: list[tuple[int, ...]] = []

    def full(_: object, words: tuple[Any, ...]) -> None:
        shapes.append(tuple(words[0].shape))
        raise MemoryError

    tiled.vae.decoder.register_forward_pre_hook(full)
    with pytest.raises(DecodeOutOfMemory):
        generate_images(tiled, TWO.replace(width=640, height=640, steps=1))
    assert shapes == [(2, 4, 1, 1), (1, 4, 1, 1)]


def test_a_batch_that_is_not_full_is_filled_up_no_longer(parts: Parts) -> None:
    request = TWO.replace(count=1, batch_size=4, steps=1)
    with Fault.at(parts.vae.decoder, 1):
        batches, _ = run(parts, request, kept := [])
    assert len(batches) == 1
    assert len(batches[0].images) == len(kept[0].latents) == 1


def test_other_errors_pass_through(parts: Parts) -> None:
    for part in (parts.text_encoder, parts.transformer, parts.vae.decoder):

        def fail(*_: object) -> None:
            raise RuntimeError("shapes do not match")

        parts.prompts.clear()
        hook = next(module for module in part.modules() if not list(module.children())).register_forward_pre_hook(fail)
        try:
            with pytest.raises(RuntimeError, match="shapes do not match"):
                generate_images(parts, TWO)
        finally:
            hook.remove()


def test_without_pictures_in_the_whole_memory_does_not_grow(parts: Parts) -> None:
    loop = generate(parts, TWO.replace(batch_size=1, steps=1), keep=False)
    sizes = []
    while True:
        try:
            one = next(loop)
        except StopIteration as end:
            whole = end.value
            break
        sizes += [len(one.images)] if isinstance(one, Result) else []
    assert sizes == [1, 1]
    assert (list(whole.images), whole.seeds) == ([], [40, 41])


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(form()) for form in FORMS)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert not is_out_of_memory(OutOfMemory("out of memory"))  # told already
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_full_memory_is_told_in_one_sentence_and_holds_nothing() -> None:
    held: list[Any] = []

    def fail() -> None:
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        raise MemoryError

    with pytest.raises(OutOfMemory, match="Lower it") as caught, full_memory_told("Lower it."):
        fail()
    assert held[0]() is None
    assert isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(InvalidInput), full_memory_told("x"):
        raise InvalidInput("x")
    with pytest.raises(RuntimeError, match="other"), full_memory_told("x"):
        raise RuntimeError("other")


def test_memory_is_given_back_on_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = [100, 40, 40, 40]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: reserved.pop(0))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    assert free_memory()
    assert not free_memory()
