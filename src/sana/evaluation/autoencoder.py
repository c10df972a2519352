"""What an autoencoder leaves of the drawn world: scenes that are still read right, and the signal-to-noise ratio.

No model that draws through this autoencoder can be expected to do better. Pictures are uint8 [256, 256, 3].
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from sana.data.cutout_captions import caption
from sana.data.cutouts import Scene, render, sample_scene
from sana.errors import InvalidInput
from sana.evaluation.detector import detect, is_read_right
from sana.evaluation.scores import Score, table
from sana.evaluation.seams import Picture, Progress, Restore
from sana.evaluation.sheet import Panel, draw_sheet

SHEET_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class AutoencoderReport:
    """Scenes read right before and after the round trip, and the peak signal-to-noise ratio over all pixels, in dB."""

    read_right: Score
    truth_read_right: Score
    psnr: float
    settings: Mapping[str, Any]
    sheet: Image.Image | None = field(default=None, compare=False)

    def table(self) -> str:
        """One row for the true pictures, one for the restored ones."""
        rows = [
            ["true pictures", self.truth_read_right.with_width, "-"],
            ["restored pictures", self.read_right.with_width, f"{self.psnr:.2f} dB"],
        ]
        return table(["", "scenes read right", "PSNR"], rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; infinity, the ratio of a perfect autoencoder, becomes null."""
        return {
            "metric": "autoencoder",
            "settings": dict(self.settings),
            "read_right": self.read_right.to_dict(),
            "truth_read_right": self.truth_read_right.to_dict(),
            "psnr": round(self.psnr, 4) if math.isfinite(self.psnr) else None,
        }


def evaluate_autoencoder(
    restore: Restore,
    *,
    scenes: int = 256,
    seed: int = 0,
    batch_size: int = 32,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> AutoencoderReport:
    """Restore scenes that training never drew and read them.

    Args:
        restore: the round trip, pictures to pictures.
        scenes: how many; they depend on `seed` only.
        settings: what else the report should record.
        progress: told after every batch.

    Raises:
        InvalidInput: a number is below 1.
    """
    if min(scenes, batch_size) < 1:
        raise InvalidInput("`scenes` and `batch_size` must be 1 or more. Raise them.")
    rng = random.Random(f"{seed}/autoencoder")
    drawn = [sample_scene(rng, held_out=True) for _ in range(scenes)]
    right: list[bool] = []
    true: list[bool] = []
    squares = 0.0
    panels: list[list[Panel]] = []
    for first in range(0, scenes, batch_size):
        batch = drawn[first : first + batch_size]
        pictures = [render(scene) for scene in batch]
        for scene, picture, restored in zip(batch, pictures, restore(pictures), strict=True):
            true.append(is_read_right(scene, detect(picture)))
            right.append(is_read_right(scene, detect(restored)))
            squares += float(np.square(restored.astype(np.float64) - picture).mean()) / scenes
            if len(panels) < SHEET_COLUMNS:
                pair = ("true", picture, true[-1]), ("restored", restored, right[-1])
                panels.append([_panel(scene, *one) for one in pair])
        if progress is not None:
            progress(len(right), scenes)
    return AutoencoderReport(
        read_right=Score.of(right),
        truth_read_right=Score.of(true),
        psnr=10 * math.log10(255**2 / squares) if squares else math.inf,
        settings={"scenes": scenes, "seed": seed, **(settings or {})},
        sheet=_sheet(panels),
    )


def _panel(scene: Scene, tag: str, picture: Picture, right: bool) -> Panel:
    said = caption(scene, random.Random(0), language="en", colours=True, relation=False, plain=True)
    return Panel(picture=picture, tag=tag, caption=said.text, right=right)


def _sheet(panels: Sequence[Sequence[Panel]]) -> Image.Image:
    originals, restored = zip(*panels, strict=True)
    return draw_sheet({"true pictures": originals, "restored pictures": restored})
