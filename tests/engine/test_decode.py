"""Out of memory while decoding, injected at every stage: the finished latents are never lost."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sana import Request, SanaPipeline, generate_images
from sana.engine.decode import DecodeOutOfMemory, decode, encode_from, is_out_of_memory
from sana.engine.parts import Parts
from sana.errors import InvalidInput, NonFinite, OutOfMemory

OOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


def latents(rows: int = 2, side: int = 3) -> Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(0))


def limited(vae: Any, pixels: int, error: BaseException) -> Any:
    """A copy of the autoencoder whose decoder has memory for so many latent pixels at a time."""
    small = copy.deepcopy(vae)
    whole = small._decode

    def decode_or_fail(z: Tensor) -> Tensor:
        if z.shape[0] * z.shape[2] * z.shape[3] > pixels:
            raise error
        return whole(z)

    small._decode = decode_or_fail
    return small


def test_decoding_equals_the_plain_call(tiny_parts: Parts) -> None:
    expected = tiny_parts.vae.decode(latents() / tiny_parts.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.allclose(decode(tiny_parts.vae, latents()), expected, atol=1e-5)


@pytest.mark.parametrize("error", OOM, ids=lambda error: type(error).__name__)
def test_a_batch_is_split_first(tiny_parts: Parts, error: BaseException) -> None:
    said: list[str] = []
    images = decode(limited(tiny_parts.vae, 9, error), latents(), said.append)
    assert torch.allclose(images, decode(tiny_parts.vae, latents()), atol=1e-5)
    assert len(said) == 1
    assert "one by one" in said[0]


def short_of_memory(vae: Any, part: str, tried: list[str], *, frugal: bool, pixels: int = 0) -> Any:
    """A copy of the autoencoder with memory for frugal strips, or for a tile of so many positions, and nothing else."""
    small = copy.deepcopy(vae)
    whole = getattr(small, part)

    def run(x: Tensor) -> Tensor:
        strips = small.streaming_min_pixels is not None and x.shape[-2:].numel() > small.streaming_min_pixels
        tried.append("frugal" if small.frugal_streaming else "strips" if strips else "whole")
        if not (frugal and small.frugal_streaming) and len(x) * x.shape[-2:].numel() > pixels:
            raise OOM[len(tried) % len(OOM)]
        out: Tensor = whole(x)
        return out

    setattr(small, part, run)
    return small


def switches(vae: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(vae).items() if "stream" in name or "til" in name}


@pytest.mark.parametrize(("part", "side"), [("_decode", 3), ("_encode", 64)])
@pytest.mark.parametrize("pixels", [0, None])
def test_then_strips_with_the_least_memory_give_the_same(
    tiny_parts: Parts, pixels: int | None, part: str, side: int
) -> None:
    first = "whole" if pixels is None else "strips"
    work: Any = decode if part == "_decode" else encode_from
    x = latents(side=side) if part == "_decode" else latents(side=side)[:, :3].tanh()
    tried, said = list[str](), list[str]()
    small = short_of_memory(tiny_parts.vae, part, tried, frugal=True)
    small.streaming_min_pixels = pixels
    before = switches(small)
    assert torch.allclose(work(small, x, said.append), work(tiny_parts.vae, x), atol=1e-5)
    assert tried == [first, first, "frugal", "frugal"]
    assert [("one by one" in text, "strips" in text) for text in said] == [(True, False), (False, True)]
    assert all("encod" in text if part == "_encode" else "decod" in text for text in said)
    assert switches(small) == before
    tried.clear()
    said.clear()
    work(small, x[:1], said.append)
    assert tried == [first, "frugal"]
    assert len(said) == 1


def test_tiles_come_only_after_strips(tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.engine.decode.TILES", ((32, 32),))
    tried, said = list[str](), list[str]()
    small = short_of_memory(tiny_parts.vae, "_decode", tried, frugal=False, pixels=1)
    assert decode(small, latents(rows=1), said.append).shape == (1, 3, 96, 96)
    assert tried == ["whole", "frugal", *["whole"] * 9]
    assert "seams" in said[-1]
    tried.clear()
    small.enable_streaming(frugal=True)
    decode(small, latents(rows=1), said.append)
    assert tried == ["frugal"] * 10  # what is used already is not tried again
    tried.clear()
    small.disable_streaming()
    small.enable_tiling(64, 64, 64, 64)
    decode(small, latents(rows=1), said.append)
    assert "frugal" not in tried  # who asks for tiles gets tiles


def test_a_picture_is_encoded_for_the_loop(tiny_parts: Parts) -> None:
    pictures = latents(side=64)[:, :3].tanh()
    expected = tiny_parts.vae.encode(pictures).latent * tiny_parts.vae.config.scaling_factor
    found = encode_from(tiny_parts.vae, pictures.double())
    assert found.dtype == tiny_parts.vae.dtype
    assert torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(OutOfMemory, match="smaller image"):
        encode_from(short_of_memory(tiny_parts.vae, "_encode", [], frugal=False), pictures, lambda text: None)
    with pytest.raises(NonFinite, match="images"):
        encode_from(tiny_parts.vae, pictures * float("nan"))
    with pytest.raises(InvalidInput, match="multiples of 32"):
        encode_from(tiny_parts.vae, pictures[..., :63])


def test_then_the_picture_is_tiled_and_the_users_settings_survive(
    tiny_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sana.engine.decode.TILES", ((64, 32),))
    said: list[str] = []
    small = limited(tiny_parts.vae, 4, OOM[0])
    before = {name: value for name, value in vars(small).items() if "til" in name}
    images = decode(small, latents(side=4), said.append)
    assert images.shape == (2, 3, 128, 128)
    assert "tiles of 64 pixels" in said[-1]
    assert {name: value for name, value in vars(small).items() if "til" in name} == before
    tiled = copy.deepcopy(tiny_parts.vae)
    tiled.enable_tiling(64, 64, 32, 32)
    assert torch.allclose(images, decode(tiled, latents(side=4)), atol=1e-5)


def test_at_last_the_latents_are_on_the_error(tiny_parts: Parts) -> None:
    with pytest.raises(OutOfMemory, match="latents") as caught:
        decode(limited(tiny_parts.vae, 0, OOM[0]), latents(), lambda text: None)
    assert isinstance(caught.value, DecodeOutOfMemory)
    assert torch.equal(caught.value.latents, latents())
    assert torch.allclose(decode(tiny_parts.vae, caught.value.latents), decode(tiny_parts.vae, latents()))


def test_by_default_a_warning_is_given(tiny_parts: Parts) -> None:
    with pytest.warns(UserWarning, match="one by one"):
        decode(limited(tiny_parts.vae, 9, OOM[0]), latents())


def test_a_request_tells_it_in_its_result(tiny_parts: Parts) -> None:
    parts = copy.copy(tiny_parts)
    parts.vae = limited(tiny_parts.vae, 4, OOM[0])
    request = Request(prompt="a", steps=1, seed=1, count=2, batch_size=2, width=64, height=64, binning=False)
    result = generate_images(parts, request)
    assert len(result.images) == 2
    assert "one by one" in result.warnings[0]


@pytest.mark.parametrize("pipeline", [False, True])
def test_large_pictures_stream_through_every_door(
    tiny_parts: Parts, pipeline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget counts the pixels of the whole batch; two pictures of 64 by 64 are just above it here."""
    parts, streams = copy.copy(tiny_parts), list[int]()
    parts.vae = copy.deepcopy(tiny_parts.vae)
    whole = parts.vae.decoder.stream
    monkeypatch.setattr(parts.vae.decoder, "stream", lambda z, frugal: streams.append(len(z)) or whole(z, frugal))
    request = Request(prompt="a", steps=1, seed=1, count=2, batch_size=2, width=64, height=64, binning=False)

    def draw() -> Any:
        if not pipeline:
            return np.stack([np.asarray(image) for image in generate_images(parts, request).images]) / 255
        made = SanaPipeline(**parts.components)
        options: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "np"}
        seed = torch.Generator().manual_seed(1)
        made.set_progress_bar_config(disable=True)
        return made("a", num_inference_steps=1, num_images_per_prompt=2, generator=seed, **options).images

    parts.vae.enable_streaming(min_pixels=2 * 64 * 64)
    expected = draw()
    assert streams == []
    parts.vae.enable_streaming(min_pixels=2 * 64 * 64 - 1)
    assert np.abs(draw() - expected).max() <= 1.01 / 255
    assert streams == [2]


def test_other_errors_pass_through(tiny_parts: Parts) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        decode(limited(tiny_parts.vae, 0, RuntimeError("shapes do not match")), latents())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


def test_bad_latents_are_refused_before_the_decoder_runs(tiny_parts: Parts) -> None:
    bad = latents()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match="latents"):
        decode(limited(tiny_parts.vae, 0, RuntimeError("the decoder ran")), bad)
