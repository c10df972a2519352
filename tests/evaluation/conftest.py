"""Drawn scenes that the tests of the evaluation share."""

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from sana.data.cutouts import Scene, render, sample_scene

Drawn = list[tuple[Scene, NDArray[np.uint8]]]


@pytest.fixture(scope="session")
def drawn() -> Drawn:
    """Three hundred scenes with their pictures, every third one held out from training."""
    rng = random.Random("evaluation")
    scenes = [sample_scene(rng, held_out=index % 3 == 0) for index in range(300)]
    return [(scene, render(scene)) for scene in scenes]
