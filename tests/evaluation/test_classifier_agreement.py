"""A small network that learnt kinds and colours from crops by itself agrees with the detector."""

import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from sana.data.cutout_shapes import KINDS
from sana.data.cutouts import BACKGROUNDS, COLOURS, RADII, Scene, Thing, render, sample_scene
from sana.evaluation.detector import detect

Picture = NDArray[np.uint8]
SIDE = 32
PER_KIND, STEPS, BATCH = 48, 260, 64


def crop(picture: Picture, left: float, top: float, right: float, bottom: float) -> Tensor:
    """A square around the box, [3, SIDE, SIDE], -1 to 1."""
    half = 0.55 * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    box = (round(x - half), round(y - half), round(x + half), round(y + half))
    patch = Image.fromarray(picture).crop(box).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(patch).copy()).permute(2, 0, 1).float() / 127.5 - 1


def damaged(picture: Picture, how: str, seed: int) -> Picture:
    if how == "blurred":
        return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.2)))
    if how == "noisy":
        noise = np.random.default_rng(seed).normal(0, 6, picture.shape)
        return np.clip(picture + noise, 0, 255).round().astype(np.uint8)
    return picture


def lessons() -> Iterator[tuple[Tensor, int, int]]:
    """Crops of single things with their kind and colour, from the scene alone; places and sizes are a little off."""
    rng = random.Random("lessons")
    for kind in range(len(KINDS)):
        for number in range(PER_KIND):
            colour, size = number % len(COLOURS), rng.choice(list(RADII))
            radius, x, y = rng.uniform(*RADII[size]), rng.uniform(80, 170), rng.uniform(80, 170)
            thing = Thing(
                kind=list(KINDS)[kind],
                colour=list(COLOURS)[colour],
                x=x,
                y=y,
                radius=radius,
                turn=rng.uniform(-8, 8),
            )
            scene = Scene(groups=(), things=(thing,), relation=None, background=rng.choice(list(BACKGROUNDS)))
            picture = damaged(render(scene), ("clean", "blurred", "noisy")[number % 3], number)
            reach = radius * rng.uniform(0.9, 1.1)
            dx, dy = rng.uniform(-4, 4), rng.uniform(-4, 4)
            yield crop(picture, x + dx - reach, y + dy - reach, x + dx + reach, y + dy + reach), kind, colour


class Classifier(nn.Module):
    """Three strided convolutions and a linear layer for kinds and colours."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48)
        convolutions = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.SiLU())))
        self.head = nn.Linear(48 * 16, len(KINDS) + len(COLOURS))

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.body(crops).flatten(1))
        kinds, colours = scores.split([len(KINDS), len(COLOURS)], dim=1)
        return kinds, colours


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    crops, kinds, colours = zip(*lessons(), strict=True)
    inputs, kind, colour = torch.stack(crops), torch.tensor(kinds), torch.tensor(colours)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(inputs), (BATCH,))
            kind_scores, colour_scores = model(inputs[rows])
            loss = F.cross_entropy(kind_scores, kind[rows]) + F.cross_entropy(colour_scores, colour[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def test_the_classifier_agrees_with_the_detector(classifier: Classifier) -> None:
    rng = random.Random("fresh scenes")
    crops, read, true = [], [], []
    for number in range(120):
        scene = sample_scene(rng, held_out=number % 2 == 0)
        picture = damaged(render(scene), ("clean", "blurred", "noisy")[number % 3], number)
        for found in detect(picture):
            crops.append(crop(picture, found.left, found.top, found.right, found.bottom))
            read.append((found.kind, found.colour))
        true.append(len(scene.things))
    assert len(read) >= 0.995 * sum(true)
    with torch.no_grad():
        kinds, colours = classifier(torch.stack(crops))
    told = [
        (list(KINDS)[kind], list(COLOURS)[colour])
        for kind, colour in zip(kinds.argmax(1).tolist(), colours.argmax(1).tolist(), strict=True)
    ]
    agreement = sum(a == b for a, b in zip(read, told, strict=True)) / len(read)
    assert agreement >= 0.98, f"{agreement:.3f} of {len(read)}"
    # Chance would agree on one in a hundred; the figures must come from looking.
    assert len(set(told)) > 60
