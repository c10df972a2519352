"""Image-to-image, inpainting and outpainting: equal to plain loops, exact where they must be."""

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
from sana.engine.attachments import FileRef
from sana.engine.edits import encode_picture, latent_mask, to_tensor
from sana.engine.parts import Parts
from sana.engine.predictor import Captions, Predictor
from sana.engine.start import conditions
from sana.errors import InvalidInput, ModelNotFound
from sana.flow.samplers import Step
from sana.flow.schedules import flow_dpm_grid, flow_euler_grid, scm_angles

rng = np.random.default_rng(3)
PICTURE = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
MASK = Image.new("L", (96, 64))
ImageDraw.Draw(MASK).rectangle((30, 10, 80, 50), fill=255)
ODD = PICTURE.resize((90, 50))
PLAIN = Request(prompt="a red fox in the snow", steps=4, seed=40, guidance=1.0, binning=False, image=PICTURE)


@pytest.fixture(scope="module")
def sprint() -> Parts:
    from tiny_model import make_tiny_sprint

    return make_tiny_sprint()


def pixels(result: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def last(parts: Parts, request: Request) -> Tensor:
    """Return the latents that the loop ends with."""
    return [step.latents for step in generate(parts, request) if isinstance(step, Step)][-1]


def network(parts: Parts, request: Request, timesteps: Tensor) -> Any:
    """Return velocity(x, i) of a request without guidance."""
    settings = request.resolve(parts.effective_card)
    captions = Captions.stack(conditions(parts, settings, print))
    predictor = Predictor(parts.transformer, timesteps, captions, guidance=settings.guidance)
    return lambda x, i: predictor(x, i, guided=False)


def noise(seed: int, shape: tuple[int, ...], count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def encoded(parts: Parts, picture: Image.Image = PICTURE) -> Tensor:
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents: Tensor = parts.vae.encode(tensor).latent
    return latents * parts.vae.config.scaling_factor


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.74, 0.76, 0.9, 1.0])
@pytest.mark.parametrize("sampler", ["flow-euler", "flow-dpm"])
def test_image_to_image_is_a_plain_loop(tiny_parts: Parts, sampler: Any, strength: float) -> None:
    """Written again without the engine: mix at the first level that is left, then step down the rest."""
    request = PLAIN.replace(strength=strength, sampler=sampler)
    grid = flow_euler_grid(4) if sampler == "flow-euler" else flow_dpm_grid(4)
    sigmas, timesteps = grid.sigmas.tolist(), grid.timesteps.tolist()
    position = 4 * (1 - strength)
    if position < 1:
        sigmas[0] += position * (sigmas[1] - sigmas[0])
        timesteps[0] = int(1000 * sigmas[0]) if sampler == "flow-dpm" else 1000 * sigmas[0]
    first = int(position)
    velocity = network(tiny_parts, request, torch.tensor(timesteps, dtype=grid.timesteps.dtype))
    (start,) = noise(40, (1, 4, 2, 3))
    x = (1 - sigmas[first]) * encoded(tiny_parts) + sigmas[first] * start
    before: tuple[float, Tensor] | None = None
    for i in range(first, 4):
        now, then = sigmas[i], sigmas[i + 1]
        x0 = x - now * velocity(x, i)
        estimate = x0
        if sampler == "flow-dpm" and before is not None and then > 0:
            lam, lam_then, lam_before = (np.log((1 - s) / s) for s in (now, then, before[0]))
            estimate = x0 + 0.5 * (lam_then - lam) / (lam - lam_before) * (x0 - before[1])
        x = then / now * x + (1 - then / now) * estimate
        before = (now, x0)
    assert relative(last(tiny_parts, request), x) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("steps", "strength"), [(1, 0.3), (1, 1.0), (2, 0.4), (2, 0.6), (2, 0.99), (3, 0.5), (4, 0.7)])
def test_sprint_image_to_image_is_the_published_loop(sprint: Parts, steps: int, strength: float) -> None:
    """In TrigFlow coordinates and with data of deviation 0.5, as SANA-Sprint writes it."""
    request = Request(prompt="a red fox", steps=steps, seed=5, binning=False, image=PICTURE, strength=strength)
    angles = scm_angles(steps).tolist()
    position = steps * (1 - strength)
    if position < 1:
        angles[0] += position * (angles[1] - angles[0])
    angles = angles[int(position) :]
    told = torch.tensor([np.sin(t) / (np.sin(t) + np.cos(t)) for t in angles[:-1]], dtype=torch.float32)
    velocity = network(sprint, request, told)
    first, *fresh = noise(5, (1, 4, 2, 3), steps + 1)
    x = np.cos(angles[0]) * encoded(sprint) * 0.5 + np.sin(angles[0]) * first * 0.5
    for i, (s, t) in enumerate(itertools.pairwise(angles)):
        level = float(told[i])
        scaled = x / 0.5 * np.sqrt(level**2 + (1 - level) ** 2)
        v = velocity(scaled, i)
        output = ((1 - 2 * level) * scaled + (1 - 2 * level + 2 * level**2) * v) / np.sqrt(level**2 + (1 - level) ** 2)
        x0 = np.cos(s) * x - np.sin(s) * output * 0.5
        x = np.cos(t) * x0 + np.sin(t) * fresh[i] * 0.5
    assert relative(last(sprint, request), x0 / 0.5) < 1e-5


def test_sprint_image_to_image_is_that_of_the_documented_pipeline(sprint: Parts) -> None:
    from sana import SanaSprintImg2ImgPipeline

    pipe = SanaSprintImg2ImgPipeline(**sprint.components)
    for steps, strength in ((2, 0.5), (2, 0.6), (4, 0.7)):
        request = Request(
            prompt="a red fox",
            steps=steps,
            seed=5,
            width=96,
            height=64,
            binning=False,
            image=PICTURE,
            strength=strength,
        )
        documented = pipe(
            request.prompt,
            image=PICTURE,
            strength=strength,
            num_inference_steps=steps,
            intermediate_timesteps=1.3 if steps == 2 else None,
            width=96,
            height=64,
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        assert relative(last(sprint, request), documented) < 1e-5


def test_the_effect_grows_with_the_strength_without_a_jump_at_the_end(tiny_parts: Parts, sprint: Parts) -> None:
    for parts, request in ((tiny_parts, PLAIN.replace(steps=2)), (sprint, Request(prompt="a", seed=1, image=PICTURE))):
        one = last(parts, request.replace(strength=1.0))
        gaps = [relative(last(parts, request.replace(strength=s)), one) for s in (0.5, 0.6, 0.75, 0.9, 0.99, 0.9999)]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[0] > 0.05
        assert gaps[-1] < 1e-3


def test_full_strength_without_a_picture_under_it_is_text_to_image(sprint: Parts) -> None:
    """Pure noise holds nothing of the picture."""
    request = Request(prompt="a red fox", seed=5, width=96, height=64, binning=False)
    assert relative(last(sprint, request.replace(image=PICTURE, strength=1.0)), last(sprint, request)) < 1e-4


def test_defaults_of_the_strength(tiny_parts: Parts) -> None:
    card = tiny_parts.effective_card
    assert PLAIN.resolve(card).strength == 0.6
    assert PLAIN.replace(mask=MASK).resolve(card).strength == 1
    assert PLAIN.replace(outpaint=(0, 0, 32, 0)).resolve(card).strength == 0.7
    assert Request(prompt="a").resolve(card).strength is None


@pytest.mark.parametrize("kind", ["multi-step", "sprint"])
@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize(("picture", "size"), [(PICTURE, None), (ODD, None), (ODD, (120, 80)), (ODD, (64, 64))])
@pytest.mark.parametrize("binning", [False, True])
def test_nothing_outside_the_mask_changes(
    tiny_parts: Parts, sprint: Parts, kind: str, strength: float | None, picture: Image.Image, size: Any, binning: bool
) -> None:
    from sana.data.pictures import fit

    parts = tiny_parts if kind == "multi-step" else sprint
    mask = MASK.resize(picture.size, Image.Resampling.NEAREST)
    given = {} if size is None else {"width": size[0], "height": size[1]}
    request = Request(
        prompt="a red fox", steps=2, seed=40, image=picture, mask=mask, strength=strength, binning=binning, **given
    )
    result = generate_images(parts, request)
    fitted = fit(picture, *(size or picture.size))
    assert result.image.size == fitted.size
    old, new = np.asarray(fitted), np.asarray(result.image)
    inside = np.asarray(fit(mask, *fitted.size)) >= 128
    assert 0.1 < inside.mean() < 0.9
    assert np.array_equal(new[~inside], old[~inside])
    assert (new[inside] != old[inside]).mean() > 0.5


def test_kept_latents_follow_the_picture_at_every_level(tiny_parts: Parts, sprint: Parts) -> None:
    mask = latent_mask(MASK, 32) > 0
    assert mask[0, 0].tolist() == [[True, True, True], [True, True, True]]
    small = Image.new("L", (96, 64))
    small.paste(255, (40, 40, 50, 50))
    mask = latent_mask(small, 32) > 0
    assert mask[0, 0].tolist() == [[False, False, False], [False, True, False]]
    for parts, request in ((tiny_parts, PLAIN.replace(sampler="flow-dpm")), (sprint, PLAIN.replace(steps=3))):
        x0, (start,) = encoded(parts), noise(40, (1, 4, 2, 3))
        steps = [step for step in generate(parts, request.replace(mask=small)) if isinstance(step, Step)]
        for step in steps:
            kept = (1 - step.sigma_next) * x0 + step.sigma_next * start
            assert torch.allclose(step.latents[~mask.expand_as(x0)], kept[~mask.expand_as(x0)], atol=1e-6)
            assert not torch.allclose(step.latents[mask.expand_as(x0)], kept[mask.expand_as(x0)], atol=1e-2)
        assert torch.allclose(steps[-1].latents[~mask.expand_as(x0)], x0[~mask.expand_as(x0)], atol=1e-6)


def test_a_mask_over_all_is_image_to_image(tiny_parts: Parts) -> None:
    whole = Image.new("L", PICTURE.size, 255)
    masked = generate_images(tiny_parts, PLAIN.replace(mask=whole, strength=0.5))
    plain = generate_images(tiny_parts, PLAIN.replace(strength=0.5))
    assert np.array_equal(pixels(masked), pixels(plain))


def test_feather_and_prompt_change_only_the_inside(tiny_parts: Parts) -> None:
    hard, soft, other = (
        pixels(generate_images(tiny_parts, PLAIN.replace(mask=MASK, **changes)))[0].astype(int)
        for changes in ({"feather": 0}, {"feather": 12}, {"feather": 0, "prompt": "two cats"})
    )
    old = np.asarray(PICTURE).astype(int)
    assert np.abs(soft - old)[10:51, 30].mean() < 0.2 * np.abs(hard - old)[10:51, 30].mean()
    assert np.array_equal(soft[30, 55], hard[30, 55])
    assert not np.array_equal(other, hard)


def test_outpainting_grows_the_picture_and_keeps_it(tiny_parts: Parts, sprint: Parts) -> None:
    for parts, binning in itertools.product((tiny_parts, sprint), (False, True)):
        request = PLAIN.replace(outpaint=(20, 0, 33, 7), binning=binning, steps=2)
        result = generate_images(parts, request)
        assert result.image.size == (149, 71)
        assert np.array_equal(pixels(result)[0, :64, 20:116], np.asarray(PICTURE))
    fitted = generate_images(tiny_parts, PLAIN.replace(outpaint=(0, 0, 96, 0), width=96, height=32, steps=1))
    assert fitted.image.size == (96, 32)


@pytest.mark.parametrize("changes", [{}, {"mask": MASK}, {"outpaint": (8, 8, 8, 8)}], ids=["image", "mask", "outpaint"])
def test_a_picture_does_not_depend_on_its_company(tiny_parts: Parts, sprint: Parts, changes: dict[str, Any]) -> None:
    for parts in (tiny_parts, sprint):
        request = PLAIN.replace(count=3, batch_size=2, steps=2, **changes)
        together = pixels(generate_images(parts, request))
        for i in range(3):
            alone = generate_images(parts, request.replace(seed=40 + i, count=1))
            assert np.array_equal(pixels(alone)[0], together[i])
        assert not np.array_equal(together[0], together[1])


def test_the_result_has_the_pictures_size_unless_another_is_given(tiny_parts: Parts) -> None:
    request = Request(prompt="a", steps=1, seed=1, image=ODD)
    assert generate_images(tiny_parts, request).image.size == (90, 50)
    assert generate_images(tiny_parts, request.replace(binning=False)).image.size == (90, 50)
    assert generate_images(tiny_parts, request.replace(width=200, height=70)).image.size == (200, 70)
    turned = ODD.copy()
    turned.getexif()[0x0112] = 6
    assert generate_images(tiny_parts, request.replace(image=turned)).image.size == (50, 90)


def test_a_model_of_one_size_edits_any(tiny_parts: Parts) -> None:
    from sana.cards import CARDS

    nano = copy.copy(tiny_parts)
    nano.card = dataclasses.replace(CARDS["nano"], name="pet")
    result = generate_images(nano, Request(prompt="a", steps=1, seed=1, image=PICTURE.resize((700, 500)), mask=None))
    assert result.image.size == (700, 500)
    assert "the model draws 256 x 256" in result.warnings[0]


def test_files_are_named_in_the_result_but_never_their_folder(tiny_parts: Parts, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "fox.png")
    MASK.save(tmp_path / "hole.png")
    request = PLAIN.replace(image=tmp_path / "fox.png", mask=str(tmp_path / "hole.png"), steps=1)
    result = generate_images(tiny_parts, request)
    settings = result.settings.to_dict()
    assert settings["image"]["name"] == "fox.png"
    assert settings["mask"]["name"] == "hole.png"
    assert str(tmp_path) not in str(settings)
    given = generate_images(tiny_parts, request.replace(image=PICTURE, mask=MASK))
    assert np.array_equal(pixels(given), pixels(result))
    assert given.settings.to_dict()["image"] == {**settings["image"], "name": ""}
    with pytest.raises(InvalidInput, match="only known by what its record says"):
        generate_images(tiny_parts, result.settings)


def test_bad_pictures_are_refused_before_anything_is_computed(tiny_parts: Parts, tmp_path: Path) -> None:
    silent = copy.copy(tiny_parts)
    silent.text_encoder = silent.transformer.__class__  # would fail at once
    (tmp_path / "a.png").write_bytes(b"GIF89a")
    hole = Image.new("L", (64, 96), 255)
    for changes, kind, words in (
        ({"image": tmp_path / "none.png"}, ModelNotFound, "There is no file none.png for the image"),
        ({"image": tmp_path / "a.png"}, InvalidInput, "cannot be read"),
        ({"mask": tmp_path / "a.png"}, InvalidInput, "The mask a.png cannot be read"),
        ({"mask": hole}, InvalidInput, "their shapes differ"),
        ({"mask": Image.new("L", PICTURE.size)}, InvalidInput, "black everywhere"),
        ({"image": FileRef(name="fox.png", sha256="0" * 64)}, InvalidInput, "fox.png"),
        ({"outpaint": (16384, 0, 0, 0)}, InvalidInput, "`width`"),
    ):
        with pytest.raises(kind, match=words):
            generate_images(silent, PLAIN.replace(**changes))


def test_see_through_pictures_are_told(tiny_parts: Parts) -> None:
    result = generate_images(tiny_parts, PLAIN.replace(image=PICTURE.convert("RGBA"), steps=1))
    assert result.warnings == ["The picture has see-through pixels; they are taken as white."]


def test_encoding_is_the_vaes_own(tiny_parts: Parts) -> None:
    assert torch.equal(encode_picture(tiny_parts.vae, to_tensor(PICTURE)), encoded(tiny_parts))
    assert to_tensor(Image.new("RGB", (1, 1), (0, 255, 51))).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_rescued_latents_give_the_same_picture(tiny_parts: Parts, monkeypatch: Any, tmp_path: Path) -> None:
    """What is saved when memory runs out while decoding holds the picture that is laid over the result."""
    import sana.engine.latents as module
    from sana.engine.decode import decode_to
    from sana.engine.latents import Finished, load_latents, save_latents

    whole, kept = module.to_pictures, list[Finished]()
    request = PLAIN.replace(image=ODD, mask=MASK.resize(ODD.size), count=2, batch_size=2, steps=1)
    expected = pixels(generate_images(tiny_parts, request))

    def short(images: Tensor) -> Any:
        if len(images) > 1:
            raise MemoryError
        return whole(images)

    monkeypatch.setattr(module, "to_pictures", short)
    for _ in generate(tiny_parts, request, rescue=kept.append):
        pass
    monkeypatch.setattr(module, "to_pictures", whole)
    again = load_latents(save_latents(tmp_path / "a.safetensors", kept[0]))
    made = decode_to(again.pictures, tiny_parts.vae, again.latents, print)
    assert np.array_equal(np.stack([np.asarray(picture) for batch in made for picture in batch]), expected)


def test_timings_tell_of_the_encoding(tiny_parts: Parts) -> None:
    result = generate_images(tiny_parts, PLAIN.replace(steps=1))
    assert set(result.timings) == {"text", "encode", "denoise", "decode", "total"}
