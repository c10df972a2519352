"""Connected regions against a flood fill that is slow but obvious."""

import numpy as np
import pytest

from sana.evaluation.blobs import Mask, grown, label


def flood(mask: Mask) -> list[frozenset[tuple[int, int]]]:
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    regions = []
    while left:
        front, region = [left.pop()], set()
        while front:
            y, x = front.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        regions.append(frozenset(region))
    return regions


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(23, 31), (1, 40), (40, 1), (1, 1)])
def test_regions_are_those_of_a_flood_fill(density: float, shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(int(100 * density)).random(shape) < density
    labels, count = label(mask)
    assert labels.shape == mask.shape
    assert np.array_equal(labels > 0, mask)
    found = {frozenset((int(y), int(x)) for y, x in np.argwhere(labels == n)) for n in range(1, count + 1)}
    assert found == set(flood(mask))


def test_a_spiral_is_one_region() -> None:
    mask = np.zeros((41, 41), bool)
    y = x = 20
    mask[y, x] = True
    for length in range(1, 20):
        dy, dx = ((0, 1), (1, 0), (0, -1), (-1, 0))[length % 4]
        for _ in range(2 * length):
            y, x = y + dy, x + dx
            if 0 <= y < 41 and 0 <= x < 41:
                mask[y, x] = True
    assert label(mask)[1] == 1


def test_rows_do_not_run_into_each_other() -> None:
    mask = np.zeros((3, 5), bool)
    mask[0, 4] = mask[2, 0] = True
    assert label(mask)[1] == 2


def test_grown_adds_the_eight_neighbours() -> None:
    mask = np.zeros((5, 6), bool)
    mask[0, 0] = mask[3, 4] = True
    expected = np.zeros((5, 6), bool)
    expected[0:2, 0:2] = expected[2:5, 3:6] = True
    assert np.array_equal(grown(mask), expected)
    assert mask.sum() == 2
