import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from hypothesis import given
from hypothesis import strategies as st

from sana.engine.resolution import BINS, bins_of, fitted_size, nearest_bin
from sana.errors import InvalidInput

ORACLE = {
    16: alpha.ASPECT_RATIO_512_BIN,
    32: alpha.ASPECT_RATIO_1024_BIN,
    64: sigma.ASPECT_RATIO_2048_BIN,
    128: ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("sample_size", ORACLE)
def test_bins_equal_the_published_tables(sample_size: int) -> None:
    oracle = {float(key): tuple(int(v) for v in size) for key, size in ORACLE[sample_size].items()}
    assert list(bins_of(sample_size).items()) == list(oracle.items())


@given(st.integers(32, 4096), st.integers(32, 4096), st.sampled_from(sorted(ORACLE)))
def test_the_nearest_bin_is_the_references(height: int, width: int, sample_size: int) -> None:
    oracle = PixArtImageProcessor.classify_height_width_bin(height, width, ratios=ORACLE[sample_size])
    assert nearest_bin(height, width, sample_size) == oracle


@pytest.mark.parametrize("size", [(720, 1280, 768, 1344), (1024, 1024, 1024, 1024), (64, 6400, 512, 2048)])
def test_known_bins(size: tuple[int, int, int, int]) -> None:
    assert nearest_bin(size[0], size[1], 32) == size[2:]


def test_the_small_model_has_one_bin() -> None:
    assert nearest_bin(1000, 300, 8) == (256, 256)
    assert all(h % 32 == w % 32 == 0 for bins in BINS.values() for h, w in bins.values())


def test_unknown_sample_sizes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="Invalid sample size"):
        nearest_bin(64, 64, 7)


@given(st.sampled_from(sorted(BINS)), st.data(), st.integers(32, 4096), st.integers(32, 4096))
def test_a_fitted_picture_always_covers_the_target(
    sample_size: int, data: st.DataObject, height: int, width: int
) -> None:
    old = data.draw(st.sampled_from(sorted(BINS[sample_size].values())))
    fitted = fitted_size(*old, height, width)
    assert fitted[0] >= height
    assert fitted[1] >= width
    assert min(fitted[0] - height, fitted[1] - width) <= 1
