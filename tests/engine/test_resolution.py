import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from hypothesis import given
from hypothesis import strategies as st

from sana.data.buckets import fitted_size
from sana.engine.resolution import BINS, bins_of, check_known, check_step, cut_told, nearest_bin
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


def test_a_size_is_refused_with_the_nearest_one() -> None:
    check_step(64, 96)
    check_step(64, 128, 64)
    with pytest.raises(InvalidInput, match=r"divisible by 64 but are 96 and 10\. Use 64 x 128"):
        check_step(96, 10, 64)


def test_a_model_of_certain_sizes_is_named_with_them() -> None:
    check_known("toy", None, 7, 9)
    check_known("toy", ((256, 512),), 256, 512)
    with pytest.raises(InvalidInput, match="toy draws 512 x 256, 64 x 64 only, not 256 x 512"):
        check_known("toy", ((256, 512), (64, 64)), 512, 256)


@pytest.mark.parametrize("sample_size", sorted(set(BINS) - {8}))
@given(ratio=st.floats(0.25, 4))
def test_no_shape_among_the_bins_is_cut_by_half(sample_size: int, ratio: float) -> None:
    height, width = round(1000 * ratio), 1000
    assert cut_told(nearest_bin(height, width, sample_size), height, width) is None


def test_what_is_mostly_cut_away_is_told() -> None:
    told = cut_told((512, 2048), 10, 9000)
    assert told is not None
    assert "drawn at 2048 x 512" in told
    assert "100% of it is cut away" in told
