"""Values with a notation of their own: `--size 1024x768` or `16:9`, `--seed 1-4` or `3,17`, `--device cuda:1`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sana.cards import Card
from sana.engine.request import MAX_SEED
from sana.engine.resolution import BINS, nearest_bin
from sana.errors import InvalidInput, did_you_mean

MOST_SEEDS = 10_000
MOST_SHARDS = 10_000
SHAPE_TOLERANCE = 0.1
"""How far a trained shape may be from the wanted one."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A size in pixels, or only a ratio of the sides."""

    width: int
    height: int
    ratio: bool = False

    def __str__(self) -> str:
        return f"{self.width}{':' if self.ratio else 'x'}{self.height}"

    def pixels(self, card: Card) -> tuple[int, int]:
        """Return (width, height) in pixels: of a ratio, the nearest size that the model was trained on.

        Raises:
            InvalidInput: the model was trained on no shape like it.
        """
        if not self.ratio:
            return self.width, self.height
        sample_size = card.transformer.sample_size
        square = (card.base_size, card.base_size)
        fits = sample_size in BINS and card.sizes is None
        height, width = nearest_bin(self.height, self.width, sample_size) if fits else square
        if abs(width * self.height / (height * self.width) - 1) > SHAPE_TOLERANCE:
            raise InvalidInput(
                f"{card.name} was not trained on the shape {self.width}:{self.height}; the nearest it has is"
                f" {width}x{height}. Ask for that, or use another model."
            )
        return width, height


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of several equal shares of a batch."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def read_shard(text: str) -> Shard:
    """Read `2/8`."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text, re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]) <= MOST_SHARDS:
        raise InvalidInput(f"takes a share such as 1/8, the first of eight, up to 8/8, not '{text[:40]}'.")
    return Shard(number=int(found[1]), of=int(found[2]))


def read_size(text: str) -> Shape:
    """Read `WIDTHxHEIGHT`, one number for a square, or `WIDTH:HEIGHT` for a ratio."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:([x×*:])\s*(\d{1,6}))?\s*", text, re.IGNORECASE)
    if found is None or not int(found[1]) or not int(found[3] or found[1]):
        raise InvalidInput(f"takes a size such as 1024x768 or a shape such as 16:9, not '{text[:40]}'.")
    return Shape(width=int(found[1]), height=int(found[3] or found[1]), ratio=found[2] == ":")


def read_seeds(text: str) -> list[int] | None:
    """Read `7`, `1-4`, `3,17,20-22`, or `random` (also -1), which is None."""
    if text.strip().lower() in ("random", "-1"):
        return None
    if re.fullmatch(r"\s*-\d+\s*", text):
        raise InvalidInput(f"takes 0 or more, or -1, which draws a random seed as 'random' does, not '{text[:40]}'.")
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4000})\s*(?:-\s*(\d{1,4000})\s*)?", part)
        if found is None:
            raise InvalidInput(f"takes a number, a range such as 1-4, or a list such as 3,17, not '{text[:40]}'.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last > MAX_SEED:
            raise InvalidInput(f"takes numbers from 0 to {MAX_SEED} in rising order, not '{text[:40]}'.")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise InvalidInput(f"takes at most {MOST_SEEDS} seeds at once; '{text[:40]}' are more.")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise InvalidInput(f"names a seed twice in '{text[:40]}'.")
    return seeds


def read_counts(text: str) -> list[int]:
    """Read `4` or `1,2,4`."""
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", text, re.ASCII):
        raise InvalidInput(f"takes a number or a list such as 1,2,4, not '{text[:40]}'.")
    counts = [int(part) for part in text.split(",")]
    if len(set(counts)) < len(counts):
        raise InvalidInput(f"names a number twice in '{text[:40]}'.")
    return counts


def read_device(text: str) -> str:
    """Read `auto` or the name of a device, which need not be there."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", text):
        hint = did_you_mean(text[:40], ("auto", "cpu", "cuda", "xpu", "mps"))
        raise InvalidInput(f"must be auto, cpu, cuda, cuda:N, xpu or mps, not '{text[:40]}'.{hint}")
    return text


def seeds_text(seeds: Sequence[int]) -> str:
    """Return seeds as `read_seeds` reads them, consecutive ones as ranges."""
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs_of(seeds))


def runs_of(seeds: Sequence[int]) -> Iterator[range]:
    """Cut seeds into runs of consecutive ones."""
    start = 0
    for end in range(1, len(seeds) + 1):
        if end == len(seeds) or seeds[end] != seeds[end - 1] + 1:
            yield range(seeds[start], seeds[start] + end - start)
            start = end


def read_bytes(text: str) -> str:
    """Read a size of memory such as `8GB` or `900MB`; it stays a text, as it is written in files of settings.

    Raises:
        InvalidInput: it is none.
    """
    bytes_of(text)
    return text.strip()


def bytes_of(text: str) -> int:
    """Return how many bytes `8GB` or `900MB` are, with 1000 bytes in a kB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|MB|G|M)\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InvalidInput("takes a size such as 8GB or 900MB.")
    return round(float(found[1]) * (10**9 if found[2][0] in "gG" else 10**6))
