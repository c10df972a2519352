"""What the tests of the engine share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """Let the garbage collector pass over what was there before; looking through it takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
