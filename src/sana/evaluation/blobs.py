"""Connected regions of a binary picture, without a dependency: runs of pixels joined across neighbouring rows."""

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def grown(mask: Mask) -> Mask:
    """The mask, [H, W], with its eight neighbours added."""
    wide = mask.copy()
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    tall = wide.copy()
    tall[1:] |= wide[:-1]
    tall[:-1] |= wide[1:]
    return tall


def label(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Number the 8-connected regions of a mask, [H, W]: labels [H, W] from 1 (0 is outside), and how many there are."""
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8).ravel())
    # The padding leaves an empty column on either side, so no run crosses from one row into the next.
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    stride = width + 2
    # Runs of the next row that touch run i: they stop after it starts and start before it stops, diagonals included.
    low = np.searchsorted(stops, starts + stride, side="left")
    high = np.searchsorted(starts, stops + stride, side="right")
    count = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(starts)), count)
    lower = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    roots = _joined(len(starts), upper, lower)
    numbers, of_run = np.unique(roots, return_inverse=True)
    steps = np.zeros(height * stride + 1, np.int32)
    np.add.at(steps, starts + 1, of_run.astype(np.int32) + 1)
    np.add.at(steps, stops + 1, -(of_run.astype(np.int32) + 1))
    labels = np.cumsum(steps[:-1], dtype=np.int32).reshape(height, stride)[:, 1:-1]
    return labels, len(numbers)


def _joined(count: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest member of each node's component, [count], for a graph with edges first[i] - second[i]."""
    roots = np.arange(count)
    while True:
        smaller = np.minimum(roots[first], roots[second])
        before = roots.copy()
        np.minimum.at(roots, before[first], smaller)
        np.minimum.at(roots, before[second], smaller)
        roots = roots[roots]
        if np.array_equal(before, roots):
            return roots
