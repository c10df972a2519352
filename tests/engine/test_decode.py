"""Out of memory while decoding, injected at every stage: the finished latents are never lost."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sana import Request, generate_images
from sana.engine.decode import DecodeOutOfMemory, decode, is_out_of_memory
from sana.engine.parts import Parts
from sana.errors import NonFinite, OutOfMemory

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
