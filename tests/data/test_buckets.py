"""Shapes that pictures are trained at: the published tables, the nearest one, and never an enlargement in silence."""

import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sana.data.buckets import TABLES, bucket_for, cut, enlargement, fitted_size
from sana.errors import InvalidInput

sizes = st.integers(1, 6000)


@pytest.mark.parametrize(("base", "oracle"), [(2048, sigma.ASPECT_RATIO_2048_BIN), (4096, ASPECT_RATIO_4096_BIN)])
def test_large_tables_are_the_published_ones(base: int, oracle: dict[str, list[float]]) -> None:
    published = {float(key): (int(h), int(w)) for key, (h, w) in oracle.items()}
    assert dict(TABLES[base]) == published


@pytest.mark.parametrize("base", TABLES)
def test_every_shape_has_whole_latents_and_about_the_area_of_the_square(base: int) -> None:
    keys = list(TABLES[base])
    assert keys == sorted(keys)
    assert len(keys) == (11 if base == 256 else 40)
    assert (keys[0], keys[-1], TABLES[base][1.0]) == (0.25, 4.0, (base, base))
    for key, (height, width) in TABLES[base].items():
        assert height % 32 == width % 32 == 0
        assert abs(height / width - key) <= (0.1 if key > 3.9 else 0.03)
        assert 0.87 <= height * width / base**2 <= 1.0


@pytest.mark.parametrize("base", [512, 1024, 2048, 4096])
def test_the_tables_are_one_table_scaled(base: int) -> None:
    assert {key: (h * 1024 // base, w * 1024 // base) for key, (h, w) in TABLES[base].items()} == TABLES[1024]


def test_the_published_example() -> None:
    """1000 x 1500 (height x width) has ratio 0.667: key 0.68, resized to 832 x 1248, cut to 832 x 1216."""
    assert bucket_for(1500, 1000, 1024) == (832, 1216)
    assert fitted_size(1000, 1500, 832, 1216) == (832, 1248)
    assert cut(Image.new("RGB", (1500, 1000)), 832, 1216).size == (1216, 832)


@pytest.mark.parametrize(
    ("size", "base", "bucket"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((3000, 100), 512, (256, 1024)),
        ((100, 3000), 512, (1024, 256)),
        ((640, 480), 256, (224, 288)),
        ((720, 1280), 2880, (3840, 2112)),
    ],
)
def test_known_buckets(size: tuple[int, int], base: int, bucket: tuple[int, int]) -> None:
    assert bucket_for(*size, base) == bucket


@given(sizes, sizes, st.sampled_from(sorted(TABLES)))
def test_no_other_bucket_is_nearer(width: int, height: int, base: int) -> None:
    table = TABLES[base]
    chosen = bucket_for(width, height, base)
    key = next(key for key, size in table.items() if size == chosen)
    assert abs(key - height / width) == min(abs(other - height / width) for other in table)


def test_squares_alone() -> None:
    assert bucket_for(900, 100, 256, aspect=False) == (256, 256)
    assert bucket_for(900, 100, 96, aspect=False) == (96, 96)
    with pytest.raises(InvalidInput, match="a multiple of 32, not 100"):
        bucket_for(9, 9, 100, aspect=False)


def test_other_bases_are_refused() -> None:
    with pytest.raises(InvalidInput, match="published for 768 pixels, only for 256, 512, 1024, 2048, 2880, 4096"):
        bucket_for(9, 9, 768)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 90), st.integers(1, 90))
def test_a_cut_covers_its_bucket_or_is_refused(width: int, height: int, high: int, wide: int) -> None:
    picture = Image.new("RGB", (width, height), (9, 99, 199))
    if enlargement(width, height, (high, wide)) > 1:
        with pytest.raises(InvalidInput, match=f"{width} x {height} does not cover its bucket of {wide} x {high}"):
            cut(picture, high, wide)
        made = cut(picture, high, wide, upscale=True)
    else:
        made = cut(picture, high, wide)
    assert made.size == (wide, high)
    assert made.getextrema() == ((9, 9), (99, 99), (199, 199))


def test_a_cut_takes_the_middle_and_keeps_the_shape() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    picture.paste("red", (100, 0, 200, 100))
    assert cut(picture, 100, 100).getextrema() == ((255, 255), (0, 0), (0, 0))
    assert cut(picture, 50, 50).getpixel((25, 25)) == (255, 0, 0)


def test_a_picture_of_its_bucket_stays_as_it_is() -> None:
    picture = Image.effect_noise((64, 32), 90).convert("RGB")
    assert cut(picture, 32, 64).tobytes() == picture.tobytes()


def test_the_filter_is_the_published_one() -> None:
    """Lanczos for the table of 2048, bicubic elsewhere."""
    from PIL.Image import Resampling

    picture = Image.effect_noise((2560, 1280), 90).convert("RGB")
    made = cut(picture, 1408, 2816, upscale=True)
    assert made.tobytes() == picture.resize((2816, 1408), Resampling.LANCZOS).tobytes()
    made = cut(picture, 640, 1280)
    assert made.tobytes() == picture.resize((1280, 640), Resampling.BICUBIC).tobytes()
