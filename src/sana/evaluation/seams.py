"""What a metric asks of its caller. Pictures are uint8 [256, 256, 3]."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Draw = Callable[[list[str], list[int]], Iterable[Picture]]
"""Prompts and seeds, one of each per picture, to the pictures."""
Follow = Callable[[list[str], list[int], list[Picture]], Iterable[Picture]]
"""Prompts, seeds and control pictures, one of each per picture, to the pictures."""
Restore = Callable[[list[Picture]], Iterable[Picture]]
"""Pictures through an autoencoder and back."""
Progress = Callable[[int, int], None]
"""Told how many pictures are done, and of how many."""
