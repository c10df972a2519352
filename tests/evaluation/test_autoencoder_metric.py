"""The autoencoder's metric on round trips whose result is known."""

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sana.errors import InvalidInput
from sana.evaluation.autoencoder import evaluate_autoencoder

Picture = NDArray[np.uint8]


def test_a_perfect_round_trip() -> None:
    steps: list[tuple[int, int]] = []
    report = evaluate_autoencoder(
        lambda pictures: pictures, scenes=20, batch_size=8, progress=lambda *done: steps.append(done)
    )
    assert report.psnr == math.inf
    assert report.read_right.share == report.truth_read_right.share == 1
    assert report.read_right.total == 20
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["psnr"] is None
    assert steps == [(8, 20), (16, 20), (20, 20)]


def test_the_ratio_is_pooled_over_all_pixels() -> None:
    def shifted(pictures: list[Picture]) -> list[Picture]:
        """The first picture by 30 levels, the others by 6."""
        return [
            (picture.astype(int) - (6 if index else 30)).clip(0).astype(np.uint8)
            for index, picture in enumerate(pictures)
        ]

    report = evaluate_autoencoder(shifted, scenes=4, batch_size=4)
    # Every channel is at least 20, so only the first picture is clipped here and there.
    assert report.psnr == pytest.approx(10 * math.log10(255**2 / ((900 + 3 * 36) / 4)), abs=0.1)
    assert "dB" in report.table()


def test_a_useless_round_trip() -> None:
    report = evaluate_autoencoder(lambda pictures: [np.full_like(p, 128) for p in pictures], scenes=6)
    assert report.read_right.share == 0
    assert report.truth_read_right.share == 1
    assert report.psnr < 12


def test_scenes_depend_on_the_seed_only() -> None:
    seen: dict[tuple[int, int], list[Picture]] = {}

    def keep(seed: int, batch_size: int) -> None:
        def restore(pictures: list[Picture]) -> list[Picture]:
            seen.setdefault((seed, batch_size), []).extend(pictures)
            return pictures

        evaluate_autoencoder(restore, scenes=5, seed=seed, batch_size=batch_size)

    keep(0, 5)
    keep(0, 2)
    keep(1, 5)
    assert np.array_equal(seen[0, 5], seen[0, 2])
    assert not np.array_equal(seen[0, 5], seen[1, 5])


def test_the_sheet_shows_both_rows() -> None:
    sheet = evaluate_autoencoder(lambda pictures: pictures, scenes=3).sheet
    assert sheet is not None
    assert sheet.height > 2 * 168


def test_no_scenes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="1 or more"):
        evaluate_autoencoder(lambda pictures: pictures, scenes=0)
