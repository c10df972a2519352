"""What an autoencoder learns from: pictures of the drawn world, or crops of pictures on the disk.

Shapes: B batch, H W picture size, h w latent size (H / 32).
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sana.data import cutouts
from sana.data.buckets import cut
from sana.data.cutout_shapes import KINDS
from sana.data.identity import Content, content_of
from sana.data.open import open_source
from sana.data.order import BucketedOrder
from sana.data.samples import Dataset
from sana.errors import BadData, InvalidInput
from sana.training.broken import BrokenSamples

CELL = 32
HELD_OUT_PICTURES = 64
LARGEST_VIEW = 2.0
"""Crops are taken from pictures whose short side is up to so many times that of the crop."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A batch."""

    pixels: Tensor
    """[B, 3, H, W] float32 in -1..1."""
    labels: Tensor | None = None
    """Kind and colour under each latent cell, [B, 2, h, w]; of the drawn world only."""


class PictureSource(Protocol):
    """Where pictures come from."""

    def batch(self, rng: random.Random, draw: int, count: int) -> Pictures:
        """Batch number `draw`: a function of `rng`, which is seeded with seed and draw, and of the number."""
        ...

    held: int
    """How many pictures are never trained on."""

    def held_out(self, first: int, count: int) -> Tensor:
        """Of those `count` from number `first` on, or as many as there are: [B, 3, H, W]."""
        ...


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def cell_labels(scene: cutouts.Scene, side: int = cutouts.SIZE // CELL) -> NDArray[np.int64]:
    """Per latent cell the kind and the colour, [2, side, side]; 0 is paper, a thing covers the cells whose centre it
    reaches.
    """
    labels = np.zeros((2, side, side), np.int64)
    centres = (np.arange(side) + 0.5) * (cutouts.SIZE / side)
    for thing in scene.things:
        near = np.hypot(centres[None] - thing.x, centres[:, None] - thing.y) < thing.radius
        labels[0][near] = 1 + list(KINDS).index(thing.kind)
        labels[1][near] = 1 + list(cutouts.COLOURS).index(thing.colour)
    return labels


class DrawnPictures:
    """Scenes of the drawn world, enlarged where a size other than their own is asked for."""

    def __init__(self, seed: int, size: int = cutouts.SIZE) -> None:
        self.size, self.held = size, HELD_OUT_PICTURES
        held_out = random.Random(f"{seed}/held-out")
        self._scenes = [
            cutouts.sample_scene(held_out, held_out=bool(i % 2), counts=None if i % 2 == 0 else (1, 1))
            for i in range(HELD_OUT_PICTURES)
        ]

    def batch(self, rng: random.Random, draw: int, count: int) -> Pictures:
        """Draw new scenes."""
        scenes = [cutouts.sample_scene(rng) for _ in range(count)]
        labels = np.stack([cell_labels(scene, self.size // CELL) for scene in scenes])
        return Pictures(pixels=self._pixels(scenes), labels=torch.from_numpy(labels))

    def held_out(self, first: int, count: int) -> Tensor:
        """Scenes of which half are of combinations that training never draws."""
        return self._pixels(self._scenes[first : first + count])

    def _pixels(self, scenes: list[cutouts.Scene]) -> Tensor:
        pictures = [cutouts.render(scene) for scene in scenes]
        if self.size != cutouts.SIZE:
            side = (self.size, self.size)
            pictures = [np.asarray(Image.fromarray(p).resize(side, Image.Resampling.LANCZOS)) for p in pictures]
        return to_tensor(np.stack(pictures))


class DatasetPictures:
    """Random square crops of the pictures of a data set, half of them mirrored; a tenth, at most 64, is held out."""

    def __init__(self, path: str | Path, seed: int, size: int, batch_size: int, source: Dataset | None = None) -> None:
        """Open a data set, or take one; captions do not count.

        Raises:
            InvalidInput: it has fewer than two pictures, or one that is smaller than a crop.
            ModelNotFound: there is no data set.
            BadData: there is no picture in it, or more than one in a hundred is broken.
        """
        self.source, self.size, self.path = source or open_source(path, prompt="a picture"), size, path
        self._broken = BrokenSamples(self.source, str(path))
        sound: list[int] = []
        small: list[str] = []
        for index in range(len(self.source)):
            sample = self._broken.read(index, self.source.sample)
            if sample is None:
                continue
            sound.append(index)
            if min(sample.width, sample.height) < size:
                small.append(sample.place)
        count = len(sound)
        self._broken.counted(count)
        if count < 2:
            raise InvalidInput(f"{path} has {count} picture, too few: one must be left to measure with. Add some.")
        if small:
            raise InvalidInput(
                f"{small[0]} is smaller than a crop of {size} pixels, as are {len(small)} of {count} pictures in all. "
                "Take them out, or lower autoencoder.size."
            )
        chosen = random.Random(f"{seed}/held-out").sample(sound, count)
        # Pixels are read here, so that every look is at as many pictures as were promised.
        readable = (i for i in chosen if self._broken.read(i, self.source.picture) is not None)
        self._held = sorted(itertools.islice(readable, min(HELD_OUT_PICTURES, max(1, count // 10))))
        self.held = len(self._held)
        self._trained = sorted(set(chosen).difference(self._held))
        size_of_batch = min(batch_size, len(self._trained))
        self._order = BucketedOrder([0] * len(self._trained), size_of_batch, seed, leftovers="drop")

    @property
    def content(self) -> Content:
        """What tells these pictures from others."""
        return content_of(self.source, {})

    def batch(self, rng: random.Random, draw: int, count: int) -> Pictures:
        """Crop the pictures of a draw; where the data set is smaller than a batch, some come twice.

        Errors: BadData when too many are broken.
        """
        rows = self._order.batch(draw)
        crops = [self._crop(self._picture(draw, rows[i % len(rows)]), rng) for i in range(count)]
        return Pictures(pixels=to_tensor(np.stack(crops)))

    def held_out(self, first: int, count: int) -> Tensor:
        """The middle of the held-out pictures."""
        chosen = self._held[first : first + count]
        pictures = [cut(self.source.picture(index), self.size, self.size) for index in chosen]
        return to_tensor(np.stack([np.asarray(picture) for picture in pictures]))

    def _picture(self, draw: int, position: int) -> Image.Image:
        """The picture at a position of the order, or another if it turns out to be broken."""
        for place in itertools.chain((position,), self._order.stand_ins(draw, position)):
            picture = self._broken.read(self._trained[place], self.source.picture)
            if picture is not None:
                return picture
        raise BadData(f"No picture in {self.path} can be read.")

    def _crop(self, picture: Image.Image, rng: random.Random) -> NDArray[np.uint8]:
        short = min(picture.size)
        wanted = rng.uniform(self.size, min(short, LARGEST_VIEW * self.size))
        width, height = (max(self.size, round(side * wanted / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        left, top = rng.randint(0, width - self.size), rng.randint(0, height - self.size)
        crop = np.asarray(picture.crop((left, top, left + self.size, top + self.size)))
        return crop[:, ::-1] if rng.random() < 0.5 else crop
