"""Controls, PAG, adapters and pictures in one request: each does its part, in any company."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sana import Request, generate, generate_images
from sana.engine.adapters import Adapters
from sana.engine.attachments import ControlRequest, FileRef, LoraRequest
from sana.engine.edits import to_tensor
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Control, Predictor
from sana.engine.start import conditions
from sana.errors import CheckpointError, InvalidInput, ModelNotFound
from sana.flow.samplers import Step
from sana.flow.schedules import flow_euler_grid, scm_grid

rng = np.random.default_rng(3)
PICTURE, SKETCH, OTHER = (Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(3))
MASK = Image.new("L", (96, 64))
ImageDraw.Draw(MASK).rectangle((30, 10, 80, 50), fill=255)
FOLLOW = ControlRequest(kind="map", image=SKETCH, scale=0.8)
SPACE = {"width": 96, "height": 64, "binning": False}
REQUEST = Request(prompt="a red fox", steps=2, seed=40, **SPACE)  # type: ignore[arg-type]


def make(sprint: bool) -> Parts:
    from tiny_model import make_tiny_parts, make_tiny_sprint, tiny_controlnet

    parts = make_tiny_sprint() if sprint else make_tiny_parts()
    parts.controlnet = tiny_controlnet(parts.transformer)
    parts.card = dataclasses.replace(parts.effective_card, pag_layers=("transformer_blocks.1",))
    return parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make(sprint=False)


@pytest.fixture(scope="module")
def sprint() -> Parts:
    return make(sprint=True)


@pytest.fixture(scope="module")
def lora(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter file that visibly changes pictures, and the transformer as it was."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_v"):
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, 32, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(32, 2, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, path)
    return path


def pixels(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def drawn(parts: Parts, request: Request, **changes: Any) -> np.ndarray:
    return pixels(generate_images(parts, request.replace(**changes)))[0]


def last(parts: Parts, request: Request) -> Tensor:
    return [step.latents for step in generate(parts, request) if isinstance(step, Step)][-1]


EXTRAS: dict[str, dict[str, Any]] = {
    "control": {"controls": (FOLLOW,)},
    "image": {"image": PICTURE, "strength": 0.7},
    "mask": {"image": PICTURE, "mask": MASK},
    "outpaint": {"image": PICTURE, "outpaint": (0, 0, 32, 0), "width": None, "height": None},
    "pag": {"pag_scale": 2.0},
    "lora": {},
}
PAIRS = [pair for pair in itertools.combinations(EXTRAS, 2) if not {"image", "mask", "outpaint"} >= set(pair)]


@pytest.mark.parametrize(
    "pair", [*PAIRS, ("control", "pag", "mask"), ("control", "pag", "lora", "image")], ids="+".join
)
@pytest.mark.parametrize("kind", ["multi-step", "sprint"])
def test_any_of_them_combine(
    parts: Parts, sprint: Parts, lora: Path, pair: tuple[str, ...], kind: str, request: pytest.FixtureRequest
) -> None:
    """Each of a combination changes the picture, and a picture of a batch is the same alone."""
    model = parts if kind == "multi-step" else sprint
    if kind == "sprint" and "pag" in pair:
        with pytest.raises(InvalidInput, match="has no PAG"):
            generate_images(model, REQUEST.replace(pag_scale=1.0))
        return
    extras = {**EXTRAS, "lora": {"loras": (LoraRequest(source=lora, scale=0.5),)}}
    whole = REQUEST.replace(**{name: value for one in pair for name, value in extras[one].items()})
    together = pixels(generate_images(model, whole.replace(count=3, batch_size=2)))
    for i in range(3):
        assert np.array_equal(drawn(model, whole, seed=40 + i, batch_size=2), together[i])
    for left in pair:
        if left == "outpaint":
            continue
        rest = REQUEST.replace(**{name: value for one in pair if one != left for name, value in extras[one].items()})
        without = drawn(model, rest)
        assert without.shape != together[0].shape or not np.array_equal(without, together[0]), left
    assert Adapters(model.transformer).acting == {}


def test_a_control_is_the_plain_loop(parts: Parts) -> None:
    """Encoded by hand, added by hand: the same latents."""
    request = REQUEST.replace(sampler="flow-euler", guidance=3.0, controls=(FOLLOW,))
    grid = flow_euler_grid(2)
    tensor = torch.from_numpy(np.array(SKETCH)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = parts.vae.encode(tensor).latent * parts.vae.config.scaling_factor
        settings = request.resolve(parts.effective_card)
        captions = Captions.stack(conditions(parts, settings, print))
        control = Control(network=parts.controlnet, latents=latents, scale=0.8)
        predict = Predictor(parts.transformer, grid.timesteps, captions, controls=[control])
        x = torch.randn((1, 4, 2, 3), generator=torch.Generator().manual_seed(40))
        for i in range(2):
            u, c = predict(x, i, guided=True).chunk(2)
            x = x + (grid.sigmas[i + 1] - grid.sigmas[i]) * (u + 3.0 * (c - u))
    assert torch.allclose(last(parts, request), x, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_sprint_with_a_control_is_the_plain_loop(sprint: Parts, steps: int) -> None:
    """Drawing from a sketch in one or two steps: each step predicts the picture, and noises it to the next level."""
    request = REQUEST.replace(steps=steps, controls=(FOLLOW,))
    grid = scm_grid(steps)
    generator = torch.Generator().manual_seed(40)
    with torch.no_grad():
        latents = sprint.vae.encode(to_tensor(SKETCH)).latent * sprint.vae.config.scaling_factor
        settings = request.resolve(sprint.effective_card)
        captions = Captions.stack(conditions(sprint, settings, print))
        control = Control(network=sprint.controlnet, latents=latents, scale=0.8)
        predict = Predictor(sprint.transformer, grid.timesteps, captions, guidance=4.5, controls=[control])
        x = torch.randn((1, 4, 2, 3), generator=generator)
        for i in range(steps):
            x0 = x - grid.sigmas[i] * predict(x, i, guided=False)
            noise = torch.randn((1, 4, 2, 3), generator=generator)
            x = (1 - grid.sigmas[i + 1]) * x0 + grid.sigmas[i + 1] * noise
    assert torch.allclose(last(sprint, request), x, atol=1e-5)


def test_pag_is_the_plain_loop(parts: Parts) -> None:
    request = REQUEST.replace(sampler="flow-euler", guidance=3.0, pag_scale=2.0, pag_layers="blocks.0")
    adaptive = request.replace(pag_adaptive_scale=0.003)
    grid = flow_euler_grid(2)
    settings = request.resolve(parts.effective_card)
    for one, scales in ((request, [2.0, 2.0]), (adaptive, [2 - 0.003 * (1000 - t) for t in grid.timesteps.tolist()])):
        with torch.no_grad():
            captions = Captions.stack(conditions(parts, settings, print))
            predict = Predictor(parts.transformer, grid.timesteps, captions, perturbed_layers=[0])
            x = torch.randn((1, 4, 2, 3), generator=torch.Generator().manual_seed(40))
            for i in range(2):
                u, c, p = predict(x, i, guided=True, perturbed=True).chunk(3)
                v = u + 3.0 * (c - u) + max(scales[i], 0) * (c - p)
                x = x + (grid.sigmas[i + 1] - grid.sigmas[i]) * v
        assert torch.allclose(last(parts, one), x, atol=1e-5)


def test_the_cards_layers_are_taken_and_recorded(parts: Parts) -> None:
    result = generate_images(parts, REQUEST.replace(pag_scale=2.0))
    assert result.settings.pag_layers == ("transformer_blocks.1",)
    assert np.array_equal(pixels(result)[0], drawn(parts, REQUEST, pag_scale=2.0, pag_layers="transformer_blocks.1"))
    assert not np.array_equal(
        pixels(result)[0], drawn(parts, REQUEST, pag_scale=2.0, pag_layers="transformer_blocks.0")
    )
    with pytest.raises(InvalidInput, match="Cannot find PAG layer"):
        drawn(parts, REQUEST, pag_scale=2.0, pag_layers=("transformer_blocks.7",))


def test_pictures_are_encoded_once(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = parts.vae.encode
    monkeypatch.setattr(parts.vae, "encode", lambda x, *rest, **more: sizes.append(len(x)) or encode(x, *rest, **more))
    twice = (FOLLOW, ControlRequest(kind="map", image=OTHER))
    generate_images(parts, REQUEST.replace(image=PICTURE, controls=twice, count=4, batch_size=2, guidance=3.0))
    assert sizes == [1, 1, 1]


def test_controls_have_scales_and_shares_and_add_up(parts: Parts) -> None:
    plain = drawn(parts, REQUEST)
    assert np.array_equal(drawn(parts, REQUEST, controls=(dataclasses.replace(FOLLOW, scale=0.0),)), plain)
    first, second = (dataclasses.replace(FOLLOW, start=s, end=e) for s, e in ((0.0, 0.5), (0.5, 1.0)))
    seen = [drawn(parts, REQUEST, controls=c) for c in ((FOLLOW,), (first,), (second,), (first, second))]
    assert np.array_equal(seen[0], seen[3])
    assert len({one.tobytes() for one in (plain, *seen)}) == 4
    with pytest.raises(InvalidInput, match="None of the 2 steps"):
        drawn(parts, REQUEST, controls=(dataclasses.replace(FOLLOW, start=0.1, end=0.4),))


def test_several_networks_take_a_picture_each(parts: Parts) -> None:
    from tiny_model import tiny_controlnet

    several = copy.copy(parts)
    several.controlnet = [parts.controlnet, tiny_controlnet(parts.transformer, seed=9)]
    two = (FOLLOW, ControlRequest(kind="map", image=OTHER))
    assert not np.array_equal(drawn(several, REQUEST, controls=two), drawn(parts, REQUEST, controls=two))
    with pytest.raises(InvalidInput, match="2 control networks for 1"):
        drawn(several, REQUEST, controls=(FOLLOW,))
    bare = copy.copy(parts)
    bare.controlnet = None
    with pytest.raises(InvalidInput, match="needs a control network"):
        drawn(bare, REQUEST, controls=(FOLLOW,))


def test_a_control_picture_gives_its_shape(parts: Parts) -> None:
    """Without a size, the trained one nearest to the picture; this model has only one."""
    request = Request(prompt="a", steps=1, seed=1, controls=(FOLLOW,))
    wide = dataclasses.replace(parts.card, transformer=dataclasses.replace(parts.card.transformer, sample_size=32))  # type: ignore[union-attr, type-var]
    assert (request.resolve(wide).width, request.resolve(wide).height) == (1216, 832)
    named = generate_images(parts, request.replace(width=64, height=64)).settings.controls[0]
    assert isinstance(named.image, FileRef)
    assert (named.scale, named.kind) == (0.8, "map")


def test_adapters_act_for_their_request_alone(parts: Parts, lora: Path, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in parts.transformer.state_dict().items()}
    plain = drawn(parts, REQUEST)
    result = generate_images(parts, REQUEST.replace(loras=(LoraRequest(source=lora, scale=0.5),)))
    assert not np.array_equal(pixels(result)[0], plain)
    assert np.array_equal(drawn(parts, REQUEST), plain)
    assert all(torch.equal(weight, before[name]) for name, weight in parts.transformer.state_dict().items())
    twice = drawn(parts, REQUEST, loras=(LoraRequest(source=lora, scale=0.2), LoraRequest(source=str(lora), scale=0.3)))
    assert np.abs(twice.astype(int) - pixels(result)[0]).max() <= 1
    none = drawn(parts, REQUEST, loras=(LoraRequest(source=lora, scale=0.0),))
    assert np.array_equal(none, plain)
    (told,) = result.settings.to_dict()["loras"]
    assert told["source"]["name"] == "style.safetensors"
    assert len(told["source"]["sha256"]) == 64
    with pytest.raises(InvalidInput, match=r"only known by what its record says \(style.safetensors\)"):
        generate_images(parts, result.settings)
    with pytest.raises(ModelNotFound):
        drawn(parts, REQUEST, loras=(LoraRequest(source=tmp_path / "none.safetensors"),))
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError):
        drawn(parts, REQUEST, loras=(LoraRequest(source=tmp_path / "bad.safetensors"),))


def test_adapters_that_act_anyway_are_recorded(lora: Path) -> None:
    parts = make(sprint=False)
    Adapters(parts.transformer).load(lora, "style", weight=0.5)
    assert "style" in generate_images(parts, REQUEST).model["adapters"]
    other = generate_images(parts, REQUEST.replace(loras=(LoraRequest(source=lora, scale=0.5),)))
    assert "adapters" not in other.model
    assert np.array_equal(pixels(other)[0], drawn(parts, REQUEST))


def test_sprint_takes_its_angles(sprint: Parts) -> None:
    plain = drawn(sprint, REQUEST)
    assert np.array_equal(drawn(sprint, REQUEST, intermediate_timesteps=1.3, max_timesteps=1.5708), plain)
    assert not np.array_equal(drawn(sprint, REQUEST, intermediate_timesteps=1.0), plain)
    assert not np.array_equal(drawn(sprint, REQUEST, max_timesteps=1.5), plain)
    assert Request(prompt="a", intermediate_timesteps=1.0).resolve(sprint.effective_card).steps == 2
    steps = [s for s in generate(sprint, REQUEST.replace(steps=1, max_timesteps=1.5)) if isinstance(s, Step)]
    assert steps[0].sigma == pytest.approx(np.sin(1.5) / (np.sin(1.5) + np.cos(1.5)), abs=1e-6)


def test_a_full_memory_is_met_with_smaller_parts(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is split, then the branches; the pictures stay, but for rounding."""
    request = REQUEST.replace(
        image=PICTURE, mask=MASK, controls=(FOLLOW,), pag_scale=2.0, guidance=3.0, count=2, batch_size=2
    )
    expected = pixels(generate_images(parts, request)).astype(int)
    whole = parts.transformer.denoise
    for most in (3, 1):

        def short(latents: Tensor, *rest: Any, most: int = most, **more: Any) -> Tensor:
            if len(latents) > most:
                raise torch.OutOfMemoryError("full")
            return whole(latents, *rest, **more)

        monkeypatch.setattr(parts.transformer, "denoise", short)
        result = generate_images(parts, request)
        assert np.abs(pixels(result).astype(int) - expected).max() <= 2
        assert any("one by one" in text for text in result.warnings)
    assert any("one after the other" in text for text in result.warnings)
    outside = np.asarray(MASK) == 0
    assert np.array_equal(pixels(result)[0][outside], np.asarray(PICTURE)[outside])
