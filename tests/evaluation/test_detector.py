"""The detector reads scenes, also damaged ones, and finds nothing where nothing is."""

import io
import math
import random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import BACKGROUNDS, COLOURS, SIZE, Scene, Thing, render, silhouette
from sana.errors import InvalidInput
from sana.evaluation.detector import detect, is_read_right
from sana.evaluation.silhouettes import match

Picture = NDArray[np.uint8]
Drawn = list[tuple[Scene, Picture]]


def blurred(picture: Picture, sigma: float) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(picture: Picture, sigma: float, seed: int) -> Picture:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).round().astype(np.uint8)


def coarse_jpeg(picture: Picture) -> Picture:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def wobbled(picture: Picture, pixels: float, seed: int) -> Picture:
    """Shift every place a little, smoothly: outlines as a model draws them that is not quite sure."""
    rng = np.random.default_rng(seed)
    lattice = [Image.fromarray(rng.normal(size=(9, 9)).astype(np.float32)) for _ in range(2)]
    dy, dx = (np.asarray(one.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in lattice)
    y, x = np.mgrid[:SIZE, :SIZE]
    y = np.clip(y + pixels * dy / dy.std(), 0, SIZE - 1).round().astype(int)
    x = np.clip(x + pixels * dx / dx.std(), 0, SIZE - 1).round().astype(int)
    return blurred(picture[y, x], 0.8)


def one_thing(kind: str, colour: str, *, radius: float = 38.0, turn: float = 0.0, background: str = "cream") -> Picture:
    thing = Thing(kind=kind, colour=colour, x=120.0, y=131.0, radius=radius, turn=turn)
    return render(Scene(groups=(), things=(thing,), relation=None, background=background))


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def test_true_scenes_are_read_entirely_right(drawn: Drawn) -> None:
    assert share([is_read_right(scene, detect(picture)) for scene, picture in drawn]) >= 0.995


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_colour_on_every_paper(kind: str) -> None:
    for number, colour in enumerate(COLOURS):
        radius, turn = (29.0, 40.0, 52.0)[number % 3], (-8.0, 0.0, 8.0)[number % 3]
        background = list(BACKGROUNDS)[number % 4]
        (found,) = detect(one_thing(kind, colour, radius=radius, turn=turn, background=background))
        assert (found.kind, found.colour) == (kind, colour)
        assert found.confidence > 0.95


def test_the_box_is_that_of_the_silhouette() -> None:
    thing = Thing(kind="fish", colour="blue", x=100.0, y=150.0, radius=40.0, turn=5.0)
    cover, left, top = silhouette(thing)
    rows, columns = np.flatnonzero((cover > 0.5).any(1)), np.flatnonzero((cover > 0.5).any(0))
    (found,) = detect(render(Scene(groups=(), things=(thing,), relation=None, background="mint")))
    box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    # The outermost pixels are half covered and half in shadow.
    assert np.abs(np.subtract((found.left, found.top, found.right, found.bottom), box)).max() <= 1
    assert found.centre == ((found.left + found.right) / 2, (found.top + found.bottom) / 2)
    assert found.size == (found.right - found.left, found.bottom - found.top)


def test_the_best_fitting_comes_first(drawn: Drawn) -> None:
    several = [found for _, picture in drawn[:30] if len(found := detect(picture)) > 1]
    assert several
    for found in several:
        assert [d.confidence for d in found] == sorted((d.confidence for d in found), reverse=True)


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        ("blur", 0.99),
        ("noise", 0.99),
        ("jpeg", 0.99),
        ("wobble", 0.9),
    ],
)
def test_slightly_damaged_scenes_are_read_too(drawn: Drawn, damage: str, least: float) -> None:
    flags = []
    for number, (scene, picture) in enumerate(drawn[:100]):
        damaged = {
            "blur": lambda p: blurred(p, 1.5),
            "noise": lambda p, n=number: noisy(p, 8, n),
            "jpeg": coarse_jpeg,
            "wobble": lambda p, n=number: wobbled(p, 1.5, n),
        }[damage](picture)
        flags.append(is_read_right(scene, detect(damaged)))
    assert share(flags) >= least


def test_a_boat_without_its_mast_is_one_boat() -> None:
    thing = Thing(kind="boat", colour="red", x=128.0, y=128.0, radius=30.0)
    picture = render(Scene(groups=(), things=(thing,), relation=None, background="sky"))
    gap = slice(int(128 + 0.26 * 30), int(128 + 0.37 * 30))
    damaged = picture.copy()
    damaged[gap] = np.where((picture[gap] == COLOURS["red"]).all(-1, keepdims=True), BACKGROUNDS["sky"], picture[gap])
    assert (damaged != picture).any()
    assert [(d.kind, d.colour) for d in detect(damaged)] == [("boat", "red")]


def test_a_mirrored_fish_is_a_fish() -> None:
    (found,) = detect(np.ascontiguousarray(one_thing("fish", "green", turn=6.0)[:, ::-1]))
    assert (found.kind, found.colour) == ("fish", "green")


def found_in(pictures: list[Picture]) -> float:
    return share([bool(detect(picture)) for picture in pictures])


def test_nothing_is_found_in_noise() -> None:
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(100):
        cell = (1, 4, 16, 32, 64)[number % 5]
        patches = Image.fromarray(rng.integers(0, 256, (SIZE // cell, SIZE // cell, 3), dtype=np.uint8))
        pictures.append(np.asarray(patches.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    assert found_in(pictures) <= 0.01


def test_nothing_is_found_in_strong_blurs(drawn: Drawn) -> None:
    assert found_in([blurred(picture, 12) for _, picture in drawn[:100]]) <= 0.01


def test_hardly_anything_is_found_in_half_blends(drawn: Drawn) -> None:
    pictures = [picture.astype(np.uint16) for _, picture in drawn]
    rng = random.Random(3)
    blends = []
    while len(blends) < 200:
        one, other = rng.sample(range(len(pictures)), 2)
        blends.append(((pictures[one] + pictures[other]) // 2).astype(np.uint8))
    assert found_in(blends) <= 0.01


def on_paper(colour: str, points: list[tuple[float, float]]) -> Picture:
    canvas = Image.new("RGB", (4 * SIZE, 4 * SIZE), BACKGROUNDS["grey"])
    ImageDraw.Draw(canvas).polygon([(4 * x, 4 * y) for x, y in points], fill=COLOURS[colour])
    return np.asarray(canvas.reduce(4))


def regular(corners: int, radius: float = 45.0, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    return [(128 + radius * math.cos(a), 128 + radius * math.sin(a)) for a in angles]


@pytest.mark.parametrize("corners", [3, 4, 5, 6, 8, 90])
@pytest.mark.parametrize("turn", [0.0, -math.pi / 2])
def test_other_shapes_are_no_things(corners: int, turn: float) -> None:
    assert detect(on_paper("red", regular(corners, turn=turn))) == []


def test_a_bar_is_no_thing() -> None:
    assert detect(on_paper("blue", [(80, 108), (176, 108), (176, 148), (80, 148)])) == []


@pytest.mark.parametrize("colour", [(120, 120, 120), (20, 20, 20), (0, 220, 220), (180, 150, 60)])
def test_other_colours_are_no_things(colour: tuple[int, int, int]) -> None:
    picture = one_thing("star", "red").copy()
    cover, left, top = silhouette(Thing(kind="star", colour="red", x=120.0, y=131.0, radius=38.0))
    patch = picture[top : top + cover.shape[0], left : left + cover.shape[1]]
    patch[cover > 0.5] = colour
    assert detect(picture) == []


def test_a_thing_of_two_colours_is_no_thing() -> None:
    picture = one_thing("heart", "red").copy()
    half = picture[:128]
    half[(half == COLOURS["red"]).all(-1)] = COLOURS["blue"]
    assert detect(picture) == []


def test_a_half_transparent_thing_is_no_thing() -> None:
    picture = one_thing("mushroom", "brown").astype(np.uint16)
    ghost = ((picture + np.asarray(BACKGROUNDS["cream"], np.uint16)) // 2).astype(np.uint8)
    assert detect(ghost) == []


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_picture_is_empty(value: int) -> None:
    assert detect(np.full((SIZE, SIZE, 3), value, np.uint8)) == []


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((SIZE, SIZE, 3), np.float32),
        np.zeros((SIZE, SIZE), np.uint8),
        np.zeros((SIZE, SIZE, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: Picture) -> None:
    with pytest.raises(InvalidInput, match="uint8"):
        detect(array)


def test_reading_right_means_all_and_nothing_else(drawn: Drawn) -> None:
    scene, picture = next(pair for pair in drawn if len(pair[0].groups) == 2)
    found = detect(picture)
    assert is_read_right(scene, found)
    assert not is_read_right(scene, found[1:])
    assert not is_read_right(scene, [*found, found[0]])
    moved = Thing(**{**vars(scene.things[0]), "x": scene.things[0].x + 15})
    other = Thing(**{**vars(scene.things[0]), "colour": "pink" if scene.things[0].colour != "pink" else "red"})
    for changed in (moved, other):
        wrong = Scene(**{**vars(scene), "things": (changed, *scene.things[1:])})
        assert not is_read_right(wrong, found)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_told_apart_by_a_wide_lead(kind: str) -> None:
    cover, _, _ = silhouette(Thing(kind=kind, colour="red", x=0.3, y=0.7, radius=33.0, turn=2.0))
    overlaps = list(match(cover).items())
    assert overlaps[0][0] == kind
    assert overlaps[0][1] - overlaps[1][1] > 0.2
