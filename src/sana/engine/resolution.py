"""Sizes: the trained size nearest to a request, and the way back to the requested pixels.

Bins follow the published pipelines: the bin whose height:width key is nearest to the request wins, the first of two
equally near ones. Legend: h, w in pixels, always in the order (height, width).
"""

from collections.abc import Collection

from sana.data.buckets import TABLES, fitted_size, nearest
from sana.errors import InvalidInput

SIZE_STEP = 32
LEAST_KEPT = 0.5
"""Share of a drawn picture below which cutting it to the requested shape is worth a warning."""

_TRAINING_ONLY = (0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88)
"""Keys that the published pipelines have from 2048 on only, though smaller models were trained at these shapes too."""


def _published(base: int) -> dict[float, tuple[int, int]]:
    return {key: size for key, size in TABLES[base].items() if base >= 2048 or key not in _TRAINING_ONLY}


def bins_of(sample_size: int) -> dict[float, tuple[int, int]]:
    """Return the trained sizes, height:width ratio -> (height, width), of a transformer with this latent `sample_size`.

    Raises:
        InvalidInput: no bins are published for this `sample_size`.
    """
    if sample_size not in BINS:
        known = ", ".join(str(s) for s in BINS)
        raise InvalidInput(
            f"Invalid sample size: no resolution bins exist for `sample_size` {sample_size} (only for {known})."
            " Switch resolution binning off."
        )
    return BINS[sample_size]


def nearest_bin(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """Return the trained (height, width) whose aspect ratio is nearest to the requested one."""
    return nearest(bins_of(sample_size), height, width)


def check_step(height: int, width: int, step: int = SIZE_STEP) -> None:
    """Raise InvalidInput unless a picture of this very size has whole latents, of `step` pixels each."""
    if height % step or width % step:
        near = [max(step, round(side / step) * step) for side in (width, height)]
        raise InvalidInput(
            f"`height` and `width` have to be divisible by {step} but are {height} and {width}."
            f" Use {near[0]} x {near[1]} (width x height), or resolution binning with a model that has bins."
        )


def check_known(name: str, sizes: Collection[tuple[int, int]] | None, height: int, width: int) -> None:
    """Raise InvalidInput if a model draws certain sizes only, and not this one; None is a model that draws any."""
    if sizes is not None and (height, width) not in {tuple(size) for size in sizes}:
        known = ", ".join(f"{w} x {h}" for h, w in sizes)
        raise InvalidInput(
            f"{name} draws {known} only, not {width} x {height}. Ask for that size or use another model."
        )


def cut_told(drawn: tuple[int, int], height: int, width: int) -> str | None:
    """Return a sentence about how much of a picture of size `drawn` is cut away, if it is most of it."""
    fitted = fitted_size(*drawn, height, width)
    kept = height * width / (fitted[0] * fitted[1])
    if kept >= LEAST_KEPT:
        return None
    return (
        f"No trained shape is near {width} x {height}: the picture is drawn at {drawn[1]} x {drawn[0]}, and"
        f" {1 - kept:.0%} of it is cut away. Ask for a size that is less long and thin."
    )


BINS: dict[int, dict[float, tuple[int, int]]] = {
    8: {1.0: (256, 256)},
    16: _published(512),
    32: _published(1024),
    64: _published(2048),
    128: _published(4096),
}
