"""What a flow-matching objective learns from: batches of latents and texts, each a function of its draw number.

Shapes: B batch, C latent channels, h w latent size, T text length, E text width.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor


def generator_of(seed: int, draw: int) -> torch.Generator:
    """Return the generator of micro-batch `draw`, which no other draw and no other seed has."""
    number = (seed << 40) + draw
    if number >= 1 << 63:  # torch takes no more
        number = int.from_bytes(hashlib.sha256(f"{seed}/{draw}".encode()).digest()[:7], "little")
    return torch.Generator().manual_seed(number)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one size."""

    latents: Tensor
    """[B, C, h, w] float32, times the scaling factor."""
    embeds: Tensor
    """[B, T, E] float32; rows after the text are 0."""
    mask: Tensor
    """[B, T] int64, 1 at the rows that count."""
    labels: Tensor | None = None
    """Kind and colour under each latent cell [B, 2, h, w]; of the drawn world only."""
    control: Tensor | None = None
    """[B, C, h, w] float32, the encoded control pictures, times the scaling factor."""
    weights: Tensor | None = None
    """[B], what a sample counts for; None is 1 each."""

    def misread(self) -> Self:
        """Return the same pictures under the texts of their neighbours."""
        return replace(self, embeds=self.embeds.roll(1, 0), mask=self.mask.roll(1, 0))


class Batches(Protocol):
    """Where batches come from."""

    null: Tensor
    """The unconditional text [T, E]: the empty prompt without the instruction."""

    def batch(self, draw: int, generator: torch.Generator) -> Batch:
        """Batch number `draw`; captions and dropout are drawn from `generator`."""
        ...

    def held_out(self) -> Iterable[Batch]:
        """Always the same batches, which are never trained on."""
        ...


def joined(one: Batch, other: Batch, weight: float) -> Batch:
    """Return both batches as one, the samples of the second with a weight; texts are padded to one length.

    The mean over the whole is the mean of the first plus `weight` times the mean of the second, as in prior
    preservation (DreamBooth, arXiv 2208.12242, equation 2). Both have control pictures, or neither has.
    """
    controls = [batch.control for batch in (one, other) if batch.control is not None]
    assert len(controls) in (0, 2)
    length = max(one.embeds.shape[1], other.embeds.shape[1])
    first, second = len(one.latents), len(other.latents)
    total = first + second
    weights = torch.cat([torch.full((first,), total / first), torch.full((second,), weight * total / second)])
    return Batch(
        latents=torch.cat([one.latents, other.latents]),
        embeds=torch.cat([_lengthened(one.embeds, length), _lengthened(other.embeds, length)]),
        mask=torch.cat([_lengthened(one.mask, length), _lengthened(other.mask, length)]),
        control=torch.cat(controls) if controls else None,
        weights=weights.to(one.latents.device),
    )


def without_some_controls(batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """Return the batch with a share of its controls emptied, so that a branch also learns to leave the base alone."""
    if batch.control is None or not share:
        return batch
    kept = torch.rand(len(batch.control), generator=generator) >= share
    return replace(batch, control=batch.control * kept.view(-1, 1, 1, 1).to(batch.control))


def collated(rows: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return texts [n_i, E] as float32 embeddings [B, T, E] with a mask [B, T]; T is the longest, or `length`."""
    longest = length or max(1, *map(len, rows))
    embeds = torch.zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        embeds[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return embeds, mask


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1)
