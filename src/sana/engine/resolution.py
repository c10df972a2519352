"""Sizes: the trained size nearest to a request, and the way back to the requested pixels.

Bins follow the published pipelines: the bin whose height:width key is nearest to the request wins, the first of two
equally near ones. Legend: h, w in pixels, always in the order (height, width).
"""

from collections.abc import Collection

from sana.errors import InvalidInput

SIZE_STEP = 32
LEAST_KEPT = 0.5
"""Share of a drawn picture below which cutting it to the requested shape is worth a warning."""

_KEYS_1024: dict[float, tuple[int, int]] = {
    0.25: (512, 2048),
    0.28: (512, 1856),
    0.32: (576, 1792),
    0.33: (576, 1728),
    0.35: (576, 1664),
    0.4: (640, 1600),
    0.42: (640, 1536),
    0.48: (704, 1472),
    0.5: (704, 1408),
    0.52: (704, 1344),
    0.57: (768, 1344),
    0.6: (768, 1280),
    0.68: (832, 1216),
    0.72: (832, 1152),
    0.78: (896, 1152),
    0.82: (896, 1088),
    0.88: (960, 1088),
    0.94: (960, 1024),
    1.0: (1024, 1024),
    1.07: (1024, 960),
    1.13: (1088, 960),
    1.21: (1088, 896),
    1.29: (1152, 896),
    1.38: (1152, 832),
    1.46: (1216, 832),
    1.67: (1280, 768),
    1.75: (1344, 768),
    2.0: (1408, 704),
    2.09: (1472, 704),
    2.4: (1536, 640),
    2.5: (1600, 640),
    3.0: (1728, 576),
    4.0: (2048, 512),
}
_EXTRA_2048: dict[float, tuple[int, int]] = {
    0.26: (1024, 3968),
    0.27: (1024, 3840),
    2.89: (3328, 1152),
    3.11: (3584, 1152),
    3.62: (3712, 1024),
    3.75: (3840, 1024),
    3.88: (3968, 1024),
}


def _scaled(bins: dict[float, tuple[int, int]], factor: float) -> dict[float, tuple[int, int]]:
    return {key: (int(h * factor), int(w * factor)) for key, (h, w) in bins.items()}


_KEYS_2048 = dict(sorted((_scaled(_KEYS_1024, 2) | _EXTRA_2048).items()))


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
    bins = bins_of(sample_size)
    ratio = height / width
    return bins[min(bins, key=lambda key: abs(key - ratio))]


def fitted_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """Return the (height, width) to which a picture is resized so that it covers the target, before the centre crop."""
    ratio = max(target_height / height, target_width / width)
    # Rounding may end a hair below the target, which must stay covered.
    return max(int(height * ratio), target_height), max(int(width * ratio), target_width)


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
    16: _scaled(_KEYS_1024, 0.5),
    32: _KEYS_1024,
    64: _KEYS_2048,
    128: _scaled(_KEYS_2048, 2),
}
