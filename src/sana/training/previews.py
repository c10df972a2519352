"""Preview sheets: fixed prompts drawn from a fixed seed, while the training goes on."""

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sana.flow.guidance import combine
from sana.flow.samplers import flow_dpm
from sana.flow.schedules import flow_dpm_grid
from sana.training.batches import Batch
from sana.training.objectives.base import Check, unasked
from sana.training.origins import Origin
from sana.training.trainables import Trainable

STEPS = 20
MOST_COLUMNS = 4


class PreviewSheet:
    """The prompts of an origin, encoded once."""

    def __init__(self, origin: Origin, guidance: float) -> None:
        """Encode the prompts; `guidance` 1 asks for no unconditional pass."""
        self.origin, self.guidance = origin, guidance
        self._both = self._doubled(origin.preview_batch())

    def _doubled(self, batch: Batch | None) -> Batch | None:
        """The batch with the unconditional texts before the conditional ones."""
        if batch is None or self.guidance == 1:
            return batch
        count, length = batch.embeds.shape[:2]
        null = self.origin.batches.null.to(batch.embeds)
        kept = min(len(null), length)
        empty = F.pad(null[:kept], (0, 0, 0, length - kept)).expand(count, -1, -1)
        seen = F.pad(batch.mask.new_ones(count, kept), (0, length - kept))
        return Batch(
            latents=batch.latents,
            embeds=torch.cat([empty, batch.embeds]),
            mask=torch.cat([seen, batch.mask]),
            control=None if batch.control is None else torch.cat([batch.control, batch.control]),
        )

    @torch.no_grad()
    def draw(self, trainable: Trainable, check: Check = unasked) -> Image.Image | None:
        """Draw the sheet in 20 steps; under a control branch the control pictures stand in a row below each row."""
        both = self._both
        if both is None:
            return None
        grid = flow_dpm_grid(STEPS, self.origin.shift)
        device, scale = both.latents.device, trainable.transformer.config.timestep_scale
        x = torch.randn(both.latents.shape, generator=torch.Generator().manual_seed(0)).to(device)

        def velocity(x: Tensor, i: int) -> Tensor:
            check()
            rows = x if self.guidance == 1 else torch.cat([x, x])
            times = grid.timesteps[i].to(device, torch.float32).expand(len(rows)) * scale
            out = trainable.velocity(rows, both, times).float()
            if self.guidance == 1:
                return out
            unconditional, conditional = out.chunk(2)
            return combine(unconditional, conditional, self.guidance)

        for step in flow_dpm(velocity, x, grid):
            x = step.latents
        check()
        rows = [self.origin.decode(x)]
        if both.control is not None:
            rows.append(self.origin.decode(both.control[: len(x)]))
        return sheet(rows)


def sheet(rows: list[Tensor]) -> Image.Image:
    """Pictures [B, 3, H, W] in [-1, 1] side by side, at most four in a row, further pictures of each below it."""
    count = len(rows[0])
    columns = min(count, MOST_COLUMNS)
    lines = math.ceil(count / columns)
    stacked = torch.stack([F.pad(row, (0, 0, 0, 0, 0, 0, 0, lines * columns - count), value=1.0) for row in rows])
    values = stacked.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
    height, width = values.shape[-2:]
    grid = values.view(len(rows), lines, columns, 3, height, width).permute(1, 0, 4, 2, 5, 3)
    return Image.fromarray(grid.reshape(lines * len(rows) * height, columns * width, 3).numpy())
